"""Run an agent over questions: several rollouts each, then one probe of every dead end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rex_rag.answers import exact_match
from rex_rag.probes.pool import ExplorationPool, draw_probe
from rex_rag.rollout.engine import RolloutEngine
from rex_rag.types import Trajectory


@dataclass(slots=True)
class EvaluatedQuestion:
    """A question's rollouts. `probes` holds one probe of each wrong answer where the question was a dead end."""

    question: str
    golden_answers: list[str]
    hops: int | None = None
    rollouts: list[Trajectory] = field(default_factory=list)
    probes: list[Trajectory] = field(default_factory=list)

    def is_correct(self, trajectory: Trajectory) -> bool:
        return exact_match(trajectory.answer, self.golden_answers)

    @property
    def accuracy(self) -> float:
        return sum(map(self.is_correct, self.rollouts)) / len(self.rollouts)

    @property
    def is_dead_end(self) -> bool:
        return not any(map(self.is_correct, self.rollouts))

    @property
    def is_rescued(self) -> bool:
        return self.is_dead_end and any(map(self.is_correct, self.probes))


def evaluate_questions(
    engine: RolloutEngine,
    rows: Sequence[dict],
    encode_prompt: Callable[[str], list[int]],
    *,
    samples: int,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda rollouts: None,
) -> list[EvaluatedQuestion]:
    """Run `samples` rollouts of every question, `batch_size` rollouts at a time.

    Args:
        rows: FlashRAG rows: `question`, `golden_answers`, optionally `metadata.hops`.
        encode_prompt: question -> prompt token ids.
        progress: called with the number of rollouts just finished.
    """
    questions = [
        EvaluatedQuestion(row["question"], list(row["golden_answers"]), (row.get("metadata") or {}).get("hops"))
        for row in rows
    ]
    work = [question for question in questions for _ in range(samples)]
    for start in range(0, len(work), batch_size):
        batch = work[start : start + batch_size]
        trajectories = engine.rollout([encode_prompt(question.question) for question in batch])
        for question, trajectory in zip(batch, trajectories, strict=True):
            question.rollouts.append(trajectory)
        progress(len(batch))
    return questions


def probe_dead_ends(
    engine: RolloutEngine, questions: Sequence[EvaluatedQuestion], pool: ExplorationPool, *, seed: int
) -> None:
    """Probe every wrong answer of every dead end once, in place, with prompts drawn from the seed."""
    probes: list[tuple[EvaluatedQuestion, Trajectory]] = []
    for index, question in enumerate(questions):
        if not question.is_dead_end:
            continue
        for row, original in enumerate(question.rollouts):
            if original.answer is None:
                continue
            draw = draw_probe(1.0, len(pool), seed=seed, step=(index,), row=row)
            probe = engine.start_probe(original, row, pool, draw.prompt)
            if probe is not None:
                probes.append((question, probe))
    engine.resume([probe for _, probe in probes])
    for question, probe in probes:
        question.probes.append(probe)
