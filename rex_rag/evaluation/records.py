"""What an evaluation run reads and leaves behind, as plain data: questions, and what a method wrote for each.

A run's directory holds `run.json` (the run card) and, for each benchmark, a folder with `predictions.jsonl` (one
`Prediction` a line, in the order of the questions) and `timings.jsonl`; until a benchmark is finished, a folder of
chunks, each the predictions of a batch. Predictions hold nothing that depends on the
clock or the machine, so that equal runs give equal bytes; scores are worked out from them and never stored in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rex_rag.types import Trajectory

RUN_FILE = "run.json"
PREDICTIONS_FILE = "predictions.jsonl"
TIMINGS_FILE = "timings.jsonl"
CHUNKS_FOLDER = "chunks"


@dataclass(frozen=True, slots=True)
class Question:
    """One test question. `choices` (letter -> text) makes it multiple choice; its gold answers are letters then.

    documents: ids of the passages that a search should find, of sets that name such.
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    choices: dict[str, str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt at a question.

    answer: what the method took as its answer, from model-written text alone; `None` if it gave none. segments: as
    `Trajectory.segment_texts`. searches: as `Trajectory.search_rows`. tokens: written by the model.
    truncations: cause -> how often, causes of `Truncation`.
    """

    answer: str | None
    segments: list[dict[str, str]]
    searches: list[dict[str, Any]]
    tokens: int
    invalid_actions: int
    truncations: dict[str, int]

    @classmethod
    def of(cls, trajectory: Trajectory) -> Sample:
        return cls(
            answer=trajectory.answer,
            segments=trajectory.segment_texts(),
            searches=trajectory.search_rows(),
            tokens=trajectory.model_length,
            invalid_actions=trajectory.invalid_actions,
            truncations={str(cause): count for cause, count in sorted(trajectory.truncations.items())},
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a method made of one question: k samples, one where it decodes greedily."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    samples: tuple[Sample, ...]
    choices: dict[str, str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    documents: tuple[str, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """A JSON-able row of `predictions.jsonl`; `documents` stands there only where a set names some."""
        row = asdict(self)
        return row if self.documents else {key: value for key, value in row.items() if key != "documents"}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Prediction:
        """The inverse of `as_row`.

        Raises:
            TypeError, KeyError: for a row of another form.
        """
        samples = tuple(Sample(**sample) for sample in row["samples"])
        lists = {name: tuple(row.get(name, ())) for name in ("golden_answers", "documents")}
        return cls(**{**row, **lists, "samples": samples})


def finished_chunks(folder: Path) -> list[Path]:
    """The finished chunks of a benchmark's folder, in the order of the questions; none once it is all together."""
    return sorted(folder.glob(f"{CHUNKS_FOLDER}/*.jsonl"))


def questions_in_chunks(folder: Path) -> int:
    """How many questions the finished chunks hold, one a line."""
    count = 0
    for chunk in finished_chunks(folder):
        with chunk.open("rb") as file:
            count += sum(1 for _ in file)
    return count
