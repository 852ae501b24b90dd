"""Cuts through sampled text. Token ids stay the sampled ones, so a cut that falls inside a token has to be told of.

White space is no loss: a token may hold some of it beyond a cut, and goes as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rex_rag.protocols.inert import THINK_TAGS
from rex_rag.types import Segment, SegmentKind, Trajectory

if TYPE_CHECKING:
    from rex_rag.rollout.agent import AgentScript

Decode = Callable[[list[list[int]]], list[str]]  # a batch of token ids -> their texts


def tokens_before(segment: Segment, offset: int, decode: Decode) -> tuple[int, str]:
    """How many tokens of a segment lie wholly before a character, and the characters between them and it."""
    for kept in range(len(segment.ids), 0, -1):
        head = decode([segment.ids[:kept]])[0]
        # A cut inside a multi-byte character decodes to a replacement character and is no prefix of the text.
        if len(head) <= offset and segment.text.startswith(head):
            return kept, segment.text[len(head) : offset]
    return 0, segment.text[:offset]


def without_thought(probe: Trajectory, script: AgentScript) -> Trajectory | str:
    """A probe as if the policy had gone on by itself: without the inserted prompt and the thought that it opened.

    The thought reaches to the first `</think>` behind the prompt, or to the prompt's end where the prompt closes it
    itself. All ids left are sampled ones. The sampling log-probabilities behind the cut belong to another context and
    become `None`.

    Returns:
        The shorter trajectory, or why there is none: `"unclosed"` where the turn acts or ends before the thought is
        closed, or the policy writes nothing behind it; `"token"` where a cut would fall inside a token.
    """
    place = probe.probe_segment
    inserted, first, *later = probe.segments[place:]
    if inserted.text[: inserted.text.index(THINK_TAGS[0])].strip():  # what a token across the answer tag left over
        return "token"
    if inserted.text.rindex(THINK_TAGS[0]) > inserted.text.rfind(THINK_TAGS[1]):
        start = first.text.find(THINK_TAGS[1])
        action = script.parse(first.text)
        if start < 0 or (action is not None and action.start < start):
            return "unclosed"
        cut = _tokens_through(first, start + len(THINK_TAGS[1]), script.decode)
        if cut is None:
            return "token"
        head = script.decode([first.ids[:cut]])[0]
        first = Segment(SegmentKind.POLICY, first.ids[cut:], first.text[len(head) :])
    rest = [replace(segment, logprobs=None) for segment in (first, *later) if segment.ids]
    if not any(segment.kind is SegmentKind.POLICY for segment in rest):
        return "unclosed"
    return replace(probe, segments=[*probe.segments[:place], *rest], answer_span=None, pool_logprobs=None)


def _tokens_through(segment: Segment, offset: int, decode: Decode) -> int | None:
    """How many tokens hold the text up to a character; `None` where one holds more than white space beyond it."""
    kept, leftover = tokens_before(segment, offset, decode)
    if not leftover:
        return kept
    head = decode([segment.ids[: kept + 1]])[0]
    return kept + 1 if segment.text.startswith(head) and not head[offset:].strip() else None
