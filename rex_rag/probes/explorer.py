"""What an explorer is: it looks at failed originals and proposes where to re-open each, and with which text.

Its place in the correction (METHOD: probe policy density, eq. 6): a probe's prefix is a copy of its original's first
tokens, and what is inserted has the log-probabilities that the explorer gives it. Whatever else the explorer chose at
random, such as the cut, belongs into the first inserted token's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rex_rag.types import Segment, SegmentKind, Trajectory

if TYPE_CHECKING:
    from rex_rag.rollout.agent import Agent
    from rex_rag.training.config import REXRAGConfig

# Log-probabilities of ids behind contexts, row by row: (contexts, ids) -> one a token. A collective.
Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[list[float]]]


@dataclass(frozen=True, slots=True)
class Failed:
    """An original that answered wrongly and is to be probed. `draws` are its own, whatever happens to others."""

    original: Trajectory
    index: int  # among the originals of this process
    draws: np.random.Generator


@dataclass(frozen=True, slots=True)
class Proposal:
    """Where an original is re-opened, and what is inserted there.

    The first `segment` segments are kept whole, and `tokens` tokens of the next one, which say `head`. `logprobs`
    holds the log-probability of every inserted id under the explorer, given the ids before it; `None` where it is not
    known, which only forms that read no density can train.
    """

    index: int
    segment: int
    tokens: int
    head: str
    ids: list[int]
    text: str
    logprobs: list[float] | None


class Explorer(ABC):
    """Proposes explorations.

    Attributes:
        name: the value of the setting `explorer`.
        has_density: whether its proposals come with log-probabilities.
    """

    name: ClassVar[str]
    has_density: ClassVar[bool] = True

    @classmethod
    def make(cls, agent: Agent, args: REXRAGConfig, score: Score | None) -> Explorer:
        """The explorer of a run: of its agent, its settings, and what scores ids; of one's own class `cls(agent, args,
        score)`."""
        return cls(agent, args, score)  # type: ignore[call-arg]  # what a class of a user's own is made of

    @staticmethod
    def problems(args: REXRAGConfig) -> list[str]:
        """What is wrong with the settings, where probes are on: value, reason, way out."""
        return []

    @abstractmethod
    def propose(self, failed: Sequence[Failed]) -> list[Proposal | None]:
        """One proposal for each, or `None` where it has none. A collective: every process calls it, with however
        many it has."""


def draws(seed: int, step: tuple[int, ...], row: int) -> np.random.Generator:
    """The random numbers of one original: they follow from (seed, step, row) and nothing else.

    They depend neither on other rows nor on how often random numbers were drawn before: a resumed run and a run on
    another number of processes make the same choices.
    """
    # The last number tells this use of the seed from others; numpy takes missing trailing numbers for zeros.
    return np.random.default_rng([seed, *step, row, 1])


def reopen(original: Trajectory, proposal: Proposal, max_sequence_length: int) -> Trajectory | None:
    """The probe that a proposal begins: live, with all the turns left that its prefix has not taken.

    The kept ids are exactly the sampled ones.

    Returns:
        A trajectory for `Agent.resume`, or `None` where the inserted text does not fit into `max_sequence_length`.
    """
    whole, cut = original.segments[: proposal.segment], original.segments[proposal.segment :]
    segments = [*whole, *([_head_of(cut[0], proposal)] if proposal.tokens else [])]
    length = sum(len(segment.ids) for segment in segments)
    segments.append(Segment(SegmentKind.PROBE, list(proposal.ids), proposal.text))
    uses = [use for use in original.tool_uses if use.segment < len(segments) - 1]
    all_kept = proposal.segment == len(original.segments) - 1
    probe = Trajectory(
        prompt_ids=original.prompt_ids,
        segments=segments,
        tool_uses=uses,
        turns=sum(segment.kind is SegmentKind.POLICY for segment in whole),  # the turn of the cut is open again
        invalid_actions=sum(segment.kind is SegmentKind.FEEDBACK for segment in whole),
        # Of an earlier cut nobody knows which of them stand before it.
        truncations=original.truncations.copy() if all_kept else Counter(),
        parent=proposal.index,
        cut=length,
        pool_logprobs=None if proposal.logprobs is None else list(proposal.logprobs),
    )
    return probe if probe.length < max_sequence_length else None


def _head_of(segment: Segment, proposal: Proposal) -> Segment:
    logprobs = None if segment.logprobs is None else segment.logprobs[: proposal.tokens]
    return Segment(segment.kind, segment.ids[: proposal.tokens], proposal.head, logprobs)
