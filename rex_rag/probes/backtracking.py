"""Backtracking: an original is re-opened after an earlier turn, not before its answer.

The paper names it as a limit of its own probes that they keep the whole reasoning, wrong steps included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rex_rag.probes.explorer import Explorer, Failed, Proposal, Score
from rex_rag.probes.pool import ExplorationPool
from rex_rag.types import SegmentKind

if TYPE_CHECKING:
    from rex_rag.rollout.agent import Agent
    from rex_rag.training.config import REXRAGConfig


class BacktrackingExplorer(Explorer):
    """Cuts behind one of the observations, drawn uniformly, and inserts a prompt of the pool there.

    Its place in eq. 6: the prefix o' ends at the cut, so log(z) / |o'| is spread over fewer tokens. Besides the prompt
    the cut was drawn, among the k observations of the original, so the first inserted token's log-probability holds
    -log(k) too. The density of a probe is the mean of 1/k over all failed originals that begin with o', of which the
    one at hand is taken for all: exact where originals that begin alike have equally many observations, and, as in
    the paper, where the prefix decides the answer. An original without an observation is not probed.
    """

    name = "backtracking"

    def __init__(self, pool: ExplorationPool) -> None:
        self.pool = pool

    @classmethod
    def make(cls, agent: Agent, args: REXRAGConfig, score: Score | None) -> BacktrackingExplorer:
        return cls(ExplorationPool.of(agent, args))

    def propose(self, failed: Sequence[Failed]) -> list[Proposal | None]:
        return [self._propose(one) for one in failed]

    def _propose(self, failed: Failed) -> Proposal | None:
        segments = failed.original.segments
        places = [place + 1 for place, one in enumerate(segments) if one.kind is SegmentKind.INFORMATION]
        if not places:
            return None
        place = places[int(failed.draws.integers(len(places)))]
        encoded = self.pool.encode("")
        prompt = int(failed.draws.integers(len(self.pool)))
        first, *rest = encoded.logprobs[prompt]
        logprobs = [first - math.log(len(places)), *rest]
        return Proposal(failed.index, place, 0, "", encoded.ids[prompt], encoded.texts[prompt], logprobs)
