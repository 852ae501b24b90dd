"""Mixed sampling (paper section 3.3): originals, then probes from inside the failed ones.

The trajectory filter runs before the probes are continued. It ranks by the mean log pi_old of the inserted prompt,
which is fixed once the prompt is inserted, so that filtering first keeps the very same probes and never pays for the
continuation of one that would be thrown away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rex_rag.probes.explorer import Explorer, Failed, draws, reopen
from rex_rag.probes.filter import keep_best, keep_count, keep_random
from rex_rag.rollout.agent import Agent
from rex_rag.types import Trajectory


@dataclass(frozen=True, slots=True)
class MixedSamplingConfig:
    """What is sampled: `probe_probability` per failed original, at most `probe_slots` probes a question."""

    originals_per_question: int
    probe_slots: int
    probe_probability: float
    probe_filter: str  # "likelihood", "random" or "none"
    seed: int


@dataclass(slots=True)
class MixedBatch:
    """One process's share of a mixed batch, with the counts of the global batch.

    `correct` belongs to `originals`, `probe_correct` to `probes`. A probe's `parent` is the index of its original.
    `dropped` counts, by cause, this process's probes that the filter kept and the correction form could not train.
    """

    originals: list[Trajectory]
    correct: list[bool]
    probes: list[Trajectory]
    probe_correct: list[bool]
    probes_made: int  # on this process
    global_originals: int
    global_failed: int
    global_made: int
    global_kept: int
    dropped: Counter = field(default_factory=Counter)

    @property
    def failure_rate(self) -> float:
        """z: the fraction of originals of the global batch that answered wrongly: what probes are drawn from.

        The reference takes 1 - accuracy, which counts originals without an answer too; none of those is ever probed.
        """
        return self.global_failed / self.global_originals

    @property
    def mixing_share(self) -> float:
        """a: kept probes over all kept rows of the global batch."""
        return self.global_kept / (self.global_originals + self.global_kept)


class MixedSampler:
    """Samples originals and probes with one agent.

    Args:
        agent: runs the rollouts.
        explorer: proposes where failed originals are re-opened, and with what.
        config: what is sampled.
        score_probes: mean log pi_old over the `PROBE` tokens of started probes. A collective call: it is made on
            every process, with however many probes that process has.
        trained: a finished probe -> what is trained in its place, or why it is dropped (`CorrectionForm.trained`).
        gather: one object per process -> the list of all processes' objects, in rank order.
        rank: this process's place in that order.
    """

    def __init__(
        self,
        agent: Agent,
        explorer: Explorer,
        config: MixedSamplingConfig,
        score_probes: Callable[[Sequence[Trajectory]], list[float]],
        trained: Callable[[Trajectory], Trajectory | str] = lambda probe: probe,
        gather: Callable[[object], list] = lambda item: [item],
        rank: int = 0,
    ) -> None:
        self.agent = agent
        self.explorer = explorer
        self.config = config
        self._score_probes = score_probes
        self._trained = trained
        self._gather = gather
        self._rank = rank

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        is_correct: Callable[[int, Trajectory], bool],
        *,
        step: tuple[int, ...],
        rows: Sequence[int],
        keep_ratio: float,
        standing: tuple[int, int] = (0, 0),
    ) -> MixedBatch:
        """Sample a mixed batch.

        Args:
            prompts: token ids of every original of this process, those of a question adjacent.
            is_correct: (index of the original, trajectory) -> whether its answer is right.
            step: seeds the draws together with the configured seed and the row.
            rows: the global index of every original of this process.
            keep_ratio: the filter keeps the best floor(keep_ratio * N) probes, N originals in the global batch.
            standing: originals and kept probes of the global batch that an earlier call sampled and that stay; the
                filter counts them in.
        """
        originals = self.agent.rollout(prompts)
        correct = [is_correct(row, trajectory) for row, trajectory in enumerate(originals)]
        failed = [
            row
            for row, (trajectory, right) in enumerate(zip(originals, correct, strict=True))
            if trajectory.answer is not None and not right
        ]
        started = self._start_probes(originals, failed, step=step, rows=rows)
        counts = self._gather((len(originals), len(failed), len(started)))
        num_originals, num_failed, num_made = (sum(column) for column in zip(*counts, strict=True))
        num_keep = keep_count(keep_ratio, num_originals + standing[0]) - standing[1]
        kept = self._filter(started, num_made, num_keep, step) if num_made else []
        global_kept, dropped = num_made, Counter[str]()
        if num_made:
            self.agent.resume(kept)
            kept, dropped = self._drop_untrainable(kept)
            global_kept = sum(self._gather(len(kept)))
        return MixedBatch(
            originals=originals,
            correct=correct,
            probes=kept,
            probe_correct=[is_correct(probe.origin, probe) for probe in kept],
            probes_made=len(started),
            global_originals=num_originals,
            global_failed=num_failed,
            global_made=num_made,
            global_kept=global_kept,
            dropped=dropped,
        )

    def _start_probes(
        self, originals: list[Trajectory], failed: list[int], *, step: tuple[int, ...], rows: Sequence[int]
    ) -> list[Trajectory]:
        drawn = [(index, draws(self.config.seed, step, rows[index])) for index in failed]
        probed = [
            Failed(originals[index], index, own)
            for index, own in drawn
            if own.random() < self.config.probe_probability
        ]
        started: list[Trajectory] = []
        per_question: Counter[int] = Counter()
        for one, proposal in zip(probed, self.explorer.propose(probed), strict=True):
            question = one.index // self.config.originals_per_question
            if proposal is None or per_question[question] >= self.config.probe_slots:
                continue
            probe = reopen(one.original, proposal, self.agent.budget.max_sequence_length)
            if probe is not None:
                started.append(probe)
                per_question[question] += 1
        return started

    def _drop_untrainable(self, probes: list[Trajectory]) -> tuple[list[Trajectory], Counter]:
        """Give finished probes what is trained in their places; count, by cause, those that cannot be trained."""
        kept: list[Trajectory] = []
        dropped: Counter[str] = Counter()
        for probe in probes:
            trained = self._trained(probe)
            if isinstance(trained, str):
                dropped[trained] += 1
                continue
            probe.trained = trained
            kept.append(probe)
        return kept, dropped

    def _filter(
        self, started: list[Trajectory], num_made: int, num_keep: int, step: tuple[int, ...]
    ) -> list[Trajectory]:
        """The trajectory filter (METHOD 4.1) over the global batch; returns this process's kept probes."""
        if self.config.probe_filter == "none":
            return started
        scores_by_rank = self._gather(
            self._score_probes(started) if self.config.probe_filter == "likelihood" else [0.0] * len(started)
        )
        if self.config.probe_filter == "likelihood":
            flags = keep_best([score for scores in scores_by_rank for score in scores], num_keep)
        else:
            flags = keep_random(num_made, num_keep, seed=self.config.seed, step=step)
        first = sum(len(scores) for scores in scores_by_rank[: self._rank])
        own = flags[first : first + len(started)]
        return [probe for probe, flag in zip(started, own, strict=True) if flag]
