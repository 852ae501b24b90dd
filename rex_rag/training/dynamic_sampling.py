"""Questions that teach nothing make room for fresh ones: dynamic sampling and the difficulty buffer.

A group has signal where its originals and kept probes are neither all right nor all wrong by exact match; without, its
advantages are zero. Dynamic sampling (DAPO, arXiv 2503.14476) asks fresh questions in the place of groups without, a
bounded number of times. The difficulty buffer (prime-rl) lets questions rest that were always right of late. Both
replace questions by one mechanism, in the rows of the batch itself.

Invariant: the fresh questions are a function of the seed, the step, and the questions that are to be replaced, the
same on every process and for any number of them; every process makes the same number of rollouts, with or without
groups of its own to replace. So a resumed run asks what the uninterrupted one asks.

The batch that is optimised consists of the groups that are left in the end. N, z, a and the number of probes that the
filter keeps are those of that batch: a probe's original stands beside it, so that log mu is the density of the mixture
that the rows come from. That groups are chosen by their outcome is dynamic sampling's own bias; nothing corrects it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rex_rag.answers import exact_match
from rex_rag.probes.mixed_sampling import MixedBatch, MixedSampler
from rex_rag.types import Trajectory

if TYPE_CHECKING:
    from datasets import Dataset

    from rex_rag.training.config import REXRAGConfig

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Group:
    """A question's originals and kept probes, and which of them are right; a probe's `parent` is an original here."""

    question: str
    originals: list[Trajectory]
    correct: list[bool]
    probes: list[Trajectory]
    probe_correct: list[bool]

    @property
    def has_signal(self) -> bool:
        """Whether right and wrong answers stand side by side. A rescue gives a dead end signal."""
        outcomes = self.correct + self.probe_correct
        return any(outcomes) and not all(outcomes)

    @property
    def failed(self) -> int:
        """Originals that answered and were wrong."""
        return sum(
            original.answer is not None and not right
            for original, right in zip(self.originals, self.correct, strict=True)
        )


def split_groups(batch: MixedBatch, questions: Sequence[str], originals: int) -> list[Group]:
    """The groups of one process's batch, `originals` adjacent originals each; probes' parents count from their own."""
    groups = [
        Group(question, batch.originals[first : first + originals], batch.correct[first : first + originals], [], [])
        for first, question in zip(range(0, len(batch.originals), originals), questions, strict=True)
    ]
    for probe, right in zip(batch.probes, batch.probe_correct, strict=True):
        index, probe.parent = divmod(probe.origin, originals)
        groups[index].probes.append(probe)
        groups[index].probe_correct.append(right)
    return groups


def join_groups(groups: Sequence[Group], batch: MixedBatch, originals: int) -> MixedBatch:
    """The inverse of `split_groups`, with the counts of `batch`."""
    for index, group in enumerate(groups):
        for probe in group.probes:
            probe.parent = probe.origin + index * originals
    return replace(
        batch,
        originals=[original for group in groups for original in group.originals],
        correct=[right for group in groups for right in group.correct],
        probes=[probe for group in groups for probe in group.probes],
        probe_correct=[right for group in groups for right in group.probe_correct],
    )


class FreshQuestions:
    """Draws questions from the training set, which must be indexable."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._texts = list(dataset["question"])
        self._seed = seed

    def draw(self, count: int, avoided: set[str], step: tuple[int, ...]) -> list[dict[str, Any]]:
        """Up to `count` rows in an order seeded by (seed, step), none whose question is in `avoided`; they join it."""
        rows: list[dict[str, Any]] = []
        if not count:
            return rows
        # The last number tells this use of the seed from others; numpy takes missing trailing numbers for zeros.
        for index in np.random.default_rng([self._seed, *step, 3]).permutation(len(self._texts)).tolist():
            if len(rows) == count:
                break
            if self._texts[index] not in avoided:
                avoided.add(self._texts[index])
                rows.append(self._dataset[index])
        return rows


class DifficultyBuffer:
    """Lets a question rest once all its originals were right `rest_after` times in a row.

    It then rests as many times as it comes up; asked again and right again, it rests anew, and one wrong answer ends
    the series. So rest is counted in a question's own turns, which an epoch or a fresh draw gives it, and needs no
    setting of its own. Questions are known by their text. The state belongs into checkpoints.
    """

    def __init__(self, rest_after: int) -> None:
        self._rest_after = rest_after
        self._right: dict[str, int] = {}  # times in a row, at most `rest_after`
        self._turns_off: dict[str, int] = {}

    @property
    def resting(self) -> set[str]:
        return set(self._turns_off)

    def takes_turn_off(self, question: str) -> bool:
        """Whether the question rests now that it has come up; if so, one turn of its rest is over."""
        if question not in self._turns_off:
            return False
        self._turns_off[question] -= 1
        if not self._turns_off[question]:
            del self._turns_off[question]
        return True

    def note(self, question: str, all_right: bool) -> None:
        """The question was asked."""
        if not all_right:
            self._right.pop(question, None)
            self._turns_off.pop(question, None)  # it was asked in its rest, for want of others
            return
        self._right[question] = min(self._right.get(question, 0) + 1, self._rest_after)
        if self._right[question] == self._rest_after:
            self._turns_off[question] = self._rest_after

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"right_in_a_row": self._right, "turns_off": self._turns_off}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self._right, self._turns_off = dict(state["right_in_a_row"]), dict(state["turns_off"])


def signal_problems(args: REXRAGConfig) -> list[str]:
    """What is wrong with the settings of dynamic sampling and the difficulty buffer."""
    problems = [
        f"{name} is {getattr(args, name)}; use 0 (off) or a positive number"
        for name in ("dynamic_sampling_rounds", "rest_after")
        if getattr(args, name) < 0
    ]
    if args.dynamic_sampling_rounds > 0 and args.reward_weights and args.reward_weights[0] <= 0:
        problems.append(
            f"reward_weights is {args.reward_weights}, so that exact match does not count, but "
            f"dynamic_sampling_rounds {args.dynamic_sampling_rounds} judges by it which groups have signal: set it "
            "to 0"
        )
    return problems


def fresh_questions(dataset: Any, args: REXRAGConfig) -> FreshQuestions | None:
    """Where the settings have fresh questions drawn from; `None` where they replace none."""
    if not (args.dynamic_sampling_rounds or args.rest_after) or dataset is None:
        return None
    return FreshQuestions(dataset, args.seed)


@dataclass(slots=True)
class DynamicBatch:
    """One process's batch to optimise, the groups that were replaced, and what the global batch is reported as."""

    batch: MixedBatch
    discarded: MixedBatch | None
    metrics: dict[str, float]


class DynamicSampler:
    """Samples a mixed batch whose questions may be replaced.

    Args:
        sampler: samples originals and probes of the questions it is given.
        encode: a row's prompt -> its token ids.
        group: rows per question, originals and probe slots.
        fresh: where other questions come from; `None` where none is ever replaced.
        rounds: how many times groups without signal are replaced; 0 is off.
        rest_after: see `DifficultyBuffer`; 0 is off.
        gather, rank: as in `MixedSampler`.
    """

    def __init__(
        self,
        sampler: MixedSampler,
        encode: Callable[[Any], list[int]],
        group: int,
        fresh: FreshQuestions | None = None,
        rounds: int = 0,
        rest_after: int = 0,
        gather: Callable[[object], list] = lambda item: [item],
        rank: int = 0,
    ) -> None:
        self.buffer = DifficultyBuffer(rest_after) if rest_after else None
        self._sampler = sampler
        self._encode = encode
        self._group = group
        self._fresh = fresh
        self._rounds = rounds
        self._gather = gather
        self._rank = rank
        self._originals = sampler.config.originals_per_question
        self._last_draw = (-1, 0)

    def sample(
        self, examples: list[dict], prompt_ids: list[list[int]], *, step: int, keep_ratio: float
    ) -> DynamicBatch:
        """Sample a mixed batch, replacing questions in place.

        Args:
            examples: this process's rows of the training set, each repeated over its group's rows; equally many on
                every process. The rows of a replaced group hold the fresh question afterwards.
            prompt_ids: their prompts' token ids, likewise.
            step: the optimiser's; with the number of the generation within it, it seeds the draws.
            keep_ratio: as in `MixedSampler.sample`.
        """
        count, draw = len(examples) // self._group, self._next_draw(step)
        if self._fresh is None:
            return DynamicBatch(self._ask(examples, prompt_ids, range(count), draw, keep_ratio), None, {})
        asked = self._gathered([examples[group * self._group]["question"] for group in range(count)])
        avoided = set(asked)
        metrics: dict[str, float] = {}
        if self.buffer is not None:
            avoided |= self.buffer.resting
            off = [self.buffer.takes_turn_off(question) for question in asked]
            metrics["difficulty/rested"] = float(len(self._replace(examples, prompt_ids, off, avoided, draw)))
        batch = self._ask(examples, prompt_ids, range(count), draw, keep_ratio)
        groups, first = self._split(batch, examples, range(count)), self._rank * count
        discarded: list[Group] = []
        replaced = rounds = 0
        while rounds < self._rounds:
            state = self._gathered([(group.has_signal, len(group.probes)) for group in groups])
            lacking = [not has_signal for has_signal, _ in state]
            places = self._replace(examples, prompt_ids, lacking, avoided, (*draw, rounds + 1))
            if not places:
                break
            rounds, replaced = rounds + 1, replaced + len(places)
            own = [place - first for place in places if first <= place < first + count]
            discarded += [groups[group] for group in own]
            left = [probes for place, (_, probes) in enumerate(state) if place not in set(places)]
            standing = (len(left) * self._originals, sum(left))
            part = self._ask(examples, prompt_ids, own, (*draw, rounds), keep_ratio, standing)
            for group, fresh in zip(own, self._split(part, examples, own), strict=True):
                groups[group] = fresh
            batch.probes_made += part.probes_made
            batch.global_made += part.global_made
            batch.dropped += part.dropped
        if self._rounds:
            metrics |= {"dynamic_sampling/rounds": float(rounds), "dynamic_sampling/replaced": float(replaced)}
        return self._finish(batch, groups, discarded, metrics)

    def _next_draw(self, step: int) -> tuple[int, int]:
        """Optimiser step and number of the generation within it: the same in a resumed run."""
        last, count = self._last_draw
        self._last_draw = (step, count + 1 if step == last else 0)
        return self._last_draw

    def state_dict(self) -> dict[str, Any]:
        return {} if self.buffer is None else {"difficulty": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_draw = (-1, 0)  # this process may have generated for the same step before
        if self.buffer is None:
            return
        if "difficulty" in state:
            self.buffer.load_state_dict(state["difficulty"])
        else:
            logger.warning("the checkpoint was written without a difficulty buffer (rest_after); it begins empty")

    def _finish(
        self, batch: MixedBatch, groups: list[Group], discarded: list[Group], metrics: dict[str, float]
    ) -> DynamicBatch:
        """Count the batch that is left, and tell the buffer what became of every question that was asked."""
        outcomes = [(group.question, all(group.correct)) for group in (*discarded, *groups)]
        tokens = sum(row.model_length for group in discarded for row in (*group.originals, *group.probes))
        mine = (sum(group.failed for group in groups), sum(len(group.probes) for group in groups), tokens, outcomes)
        parts = self._gather(mine)
        if self.buffer is not None:
            for question, all_right in (outcome for part in parts for outcome in part[3]):
                self.buffer.note(question, all_right)
            metrics["difficulty/resting"] = float(len(self.buffer.resting))
        if self._rounds:
            metrics["dynamic_sampling/discarded_tokens"] = float(sum(part[2] for part in parts))
        final = replace(
            join_groups(groups, batch, self._originals),
            global_failed=sum(part[0] for part in parts),
            global_kept=sum(part[1] for part in parts),
        )
        nothing = replace(batch, probes_made=0, dropped=Counter())  # these are counted in `final`
        return DynamicBatch(final, join_groups(discarded, nothing, self._originals) if discarded else None, metrics)

    def _ask(
        self,
        examples: list[dict],
        prompt_ids: list[list[int]],
        groups: Sequence[int],
        step: tuple[int, ...],
        keep_ratio: float,
        standing: tuple[int, int] = (0, 0),
    ) -> MixedBatch:
        """Originals and probes of some of this process's groups. A collective, also where these are none."""
        chosen = [group * self._group + place for group in groups for place in range(self._originals)]
        first = self._rank * (len(examples) // self._group) * self._originals
        return self._sampler.sample(
            [prompt_ids[row] for row in chosen],
            lambda index, row: exact_match(row.answer, examples[chosen[index]]["golden_answers"]),
            step=step,
            rows=[first + group * self._originals + place for group in groups for place in range(self._originals)],
            keep_ratio=keep_ratio,
            standing=standing,
        )

    def _replace(
        self,
        examples: list[dict],
        prompt_ids: list[list[int]],
        lacking: Sequence[bool],
        avoided: set[str],
        step: tuple[int, ...],
    ) -> list[int]:
        """Put fresh questions into groups of the global batch, this process's in its rows; returns the groups' places.

        Args:
            lacking: of every group of the global batch, whether it is to be replaced.
        """
        assert self._fresh is not None  # else nothing is replaced
        fresh = self._fresh.draw(sum(lacking), avoided, step)
        places = [place for place, lacks in enumerate(lacking) if lacks][: len(fresh)]
        if len(fresh) < sum(lacking) and self._rank == 0:
            logger.warning(
                "step %d: %d questions are to be replaced, but the training set holds %d others that neither rest nor "
                "stand in the batch; the rest is asked as it is",
                step[0],
                sum(lacking),
                len(fresh),
            )
        first = self._rank * (len(examples) // self._group)
        for place, question in zip(places, fresh, strict=True):
            rows = range((place - first) * self._group, (place - first + 1) * self._group)
            if 0 <= rows.start < len(examples):
                ids = self._encode(question["prompt"])
                for row in rows:
                    examples[row], prompt_ids[row] = dict(question), ids
        return places

    def _split(self, batch: MixedBatch, examples: list[dict], groups: Sequence[int]) -> list[Group]:
        questions = [examples[group * self._group]["question"] for group in groups]
        return split_groups(batch, questions, self._originals)

    def _gathered(self, items: list) -> list:
        return [item for part in self._gather(items) for item in part]
