"""Runs as reports read them: the run card, the scores of every benchmark, and what is missing.

Invariant: scores come from predictions whose questions hash to what the card says; a run that answered fewer questions
than its card names says how many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rex_rag.evaluation.benchmarks import Benchmark
from rex_rag.evaluation.bootstrap import RESAMPLES, Estimate
from rex_rag.evaluation.judge import count_verdicts, judge_of, read_judge
from rex_rag.evaluation.records import PREDICTIONS_FILE, RUN_FILE, Prediction, Question, questions_in_chunks
from rex_rag.evaluation.run_card import read_card, scorer_row, shared_protocol
from rex_rag.evaluation.scores import BenchmarkScores, macro_scores, read_predictions, read_seconds, score_benchmark
from rex_rag.support.errors import UserError


class ReportError(UserError):
    """A directory is not a run that can be reported; the message names it, the reason and the way out."""


@dataclass(frozen=True)
class FinishedRun:
    """One run.

    card: as it was written, but with the scorer that scored the predictions here. benchmarks: set -> its row of the
    card (`Benchmark.as_row`), in the card's order. scores: of the sets that are whole; a part of a set says little of
    the rest. missing: set -> questions without a prediction, of the other sets. judge: who judged the answers, if
    anybody did. verdicts: how many came of that, and how many of them could not be read.
    """

    path: Path
    card: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]]
    scores: dict[str, BenchmarkScores]
    missing: dict[str, int]
    judge: dict[str, Any] | None = None
    verdicts: tuple[int, int] = (0, 0)

    @property
    def method(self) -> str:
        """The method's title."""
        return str(self.card["method"]["title"])

    @property
    def model(self) -> str:
        return str(self.card["model"]["name"])

    @property
    def protocol(self) -> str:
        """Twelve hexadecimal digits over what must agree for figures to be compared, but prompts and questions."""
        shared = json.dumps(shared_protocol(self.card, self.card["method"]["uses_retriever"]), sort_keys=True)
        return hashlib.sha256(shared.encode()).hexdigest()[:12]

    @property
    def missing_text(self) -> str:
        """What is missing, for people; empty for a run that is whole."""
        return ", ".join(
            f"{name}: {count:,} of {self.benchmarks[name]['questions']:,} questions missing"
            for name, count in self.missing.items()
        )

    def mean(self, sets: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate | None:
        """The unweighted mean over `sets` of the main metric, or `None` if any of them is not there whole."""
        if not sets or any(name not in self.scores for name in sets):
            return None
        return macro_scores([self.scores[name] for name in sets], resamples=resamples, seed=seed)


def run_directories(paths: Sequence[str | Path], say: Callable[[str], object] | None = None) -> list[Path]:
    """The runs that `paths` name: each is a run's directory, or one that holds runs, then all of them by name.

    Args:
        say: takes a line that names what is neither, as a shell's `outputs/*` finds beside runs; it is left out then,
            as long as one run is there. Without it, it is refused.

    Raises:
        ReportError: for a path that is neither, or not there at all, or a run named twice.
    """
    found: list[Path] = []
    others: list[Path] = []
    for path in map(Path, paths):
        inside = [path] if (path / RUN_FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{RUN_FILE}"))
        if not inside and (say is None or not path.exists()):
            raise ReportError(f"{path} holds no {RUN_FILE}; name the directory that an evaluation wrote (--output)")
        found += inside
        others += [] if inside else [path]
    if others and not found:
        raise ReportError(
            f"{_listed(others)} hold no {RUN_FILE}; name at least one directory that an evaluation wrote (--output)"
        )
    if others and say is not None:  # without it, they were refused above
        say(f"left out, since no run is there (no {RUN_FILE}): {_listed(others)}")
    resolved = [path.resolve() for path in found]
    twice = sorted({str(path) for path, real in zip(found, resolved, strict=True) if resolved.count(real) > 1})
    if twice:
        raise ReportError(f"{', '.join(twice)} is named twice; name each run once")
    return found


def _listed(paths: Sequence[Path]) -> str:
    return f"{', '.join(map(str, paths[:5]))}{f' and {len(paths) - 5:,} more' if len(paths) > 5 else ''}"


def read_run(path: str | Path, *, resamples: int = RESAMPLES, seed: int = 0) -> FinishedRun:
    """Read a run and score it.

    Raises:
        ReportError: for a card that cannot be read, and predictions of other questions than the card's.
        ScoreError: for predictions that cannot be scored.
    """
    path = Path(path)
    try:
        card = {**read_card(path), "scorer": scorer_row()}
    except ValueError as error:
        raise ReportError(str(error)) from error
    scores, missing = {}, {}
    for name, row in card["benchmarks"].items():
        folder = path / name
        if not (folder / PREDICTIONS_FILE).is_file():
            missing[name] = row["questions"] - questions_in_chunks(folder)
            continue
        predictions = read_predictions(folder)
        if questions_sha256(predictions) != row["sha256"]:
            raise ReportError(
                f"{folder / PREDICTIONS_FILE} holds {len(predictions):,} predictions that are not those of the "
                f"{row['questions']:,} questions in {path / RUN_FILE}; evaluate into a new directory"
            )
        scores[name] = score_benchmark(
            predictions,
            seconds=read_seconds(folder),
            resamples=resamples,
            seed=seed,
            judge=read_judge(path, name, predictions),
        )
    judge = judge_of(path)
    verdicts = (0, 0) if judge is None else count_verdicts(path, list(scores))
    return FinishedRun(path, card, card["benchmarks"], scores, missing, judge, verdicts)


def unlike_judges(first: FinishedRun, second: FinishedRun) -> list[str]:
    """What keeps the judged scores of two runs from being compared; empty where nothing does."""
    judges = [run.judge for run in (first, second) if run.judge is not None]
    if len(judges) < 2 or judges[0] == judges[1]:
        return []
    names = [f"{judge['model']} (prompt {judge['prompt_sha256'][:12]})" for judge in judges]
    return [f"judge: {names[0]} against {names[1]}"]


def unread_verdicts(runs: Sequence[FinishedRun]) -> str:
    """A sentence on verdicts that could not be read, which say nothing of the answer and yet count against it."""
    found = [
        f"{unread:,} of {count:,} ({run.path.name})" for run in runs for count, unread in [run.verdicts] if unread
    ]
    said = f"{', '.join(found)}; they count as incorrect" if found else "none"
    return f"Verdicts that could not be read: {said}."


def questions_sha256(predictions: Sequence[Prediction]) -> str:
    """The hash that a benchmark of these questions has."""
    questions = tuple(
        Question(prediction.id, prediction.question, prediction.golden_answers, prediction.choices)
        for prediction in predictions
    )
    return Benchmark(name="", kind="", questions=questions, source="", size=len(questions)).sha256
