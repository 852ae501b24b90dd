"""Run an agent over questions: several rollouts each, then one probe of every dead end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rex_rag.answers import exact_match
from rex_rag.probes.explorer import Explorer, Failed, draws, reopen
from rex_rag.rollout.agent import Agent
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
    agent: Agent,
    rows: Sequence[dict],
    *,
    samples: int,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda rollouts: None,
) -> list[EvaluatedQuestion]:
    """Run `samples` rollouts of every question, `batch_size` rollouts at a time.

    Args:
        rows: FlashRAG rows: `question`, `golden_answers`, optionally `metadata.hops`.
        progress: called with the number of rollouts just finished.
    """
    questions = [
        EvaluatedQuestion(row["question"], list(row["golden_answers"]), (row.get("metadata") or {}).get("hops"))
        for row in rows
    ]
    work = [question for question in questions for _ in range(samples)]
    for start in range(0, len(work), batch_size):
        batch = work[start : start + batch_size]
        trajectories = agent.rollout([agent.script.encode(question.question) for question in batch])
        for question, trajectory in zip(batch, trajectories, strict=True):
            question.rollouts.append(trajectory)
        progress(len(batch))
    return questions


def probe_dead_ends(agent: Agent, questions: Sequence[EvaluatedQuestion], explorer: Explorer, *, seed: int) -> None:
    """Probe every wrong answer of every dead end once, in place, as drawn from the seed."""
    failed: list[Failed] = []
    asked: list[EvaluatedQuestion] = []
    for index, question in enumerate(questions):
        for row, original in enumerate(question.rollouts if question.is_dead_end else ()):
            if original.answer is not None:
                own = draws(seed, (index,), row)
                own.random()  # training draws here whether to probe
                failed.append(Failed(original, row, own))
                asked.append(question)
    proposals = explorer.propose(failed)
    probes = [
        None if proposal is None else reopen(one.original, proposal, agent.budget.max_sequence_length)
        for one, proposal in zip(failed, proposals, strict=True)
    ]
    agent.resume([probe for probe in probes if probe is not None])
    for question, probe in zip(asked, probes, strict=True):
        if probe is not None:
            question.probes.append(probe)
