"""Plain data that flows through a run: passages, segments, trajectories. No torch, no tokenizer.

Invariant: a trajectory's completion ids are the concatenation of its segments' ids, and these are exactly the ids the
model sampled or was given; nothing is ever decoded and encoded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any


class SegmentKind(IntEnum):
    """Who wrote a run of tokens. Values are stable: they are stored in tensors and files."""

    POLICY = 0  # sampled by the model
    INFORMATION = 1  # retrieved text inserted by the environment
    FEEDBACK = 2  # correction inserted after an invalid action
    PROBE = 3  # inserted exploration prompt

    @property
    def is_trained(self) -> bool:
        """Whether loss, KL and importance weights run over these tokens."""
        return self in (SegmentKind.POLICY, SegmentKind.PROBE)


class Truncation(StrEnum):
    """Why text was cut. Each cause is counted, none is silent."""

    TURN = "turn"  # a generation hit the per-turn token limit
    OBSERVATION = "observation"  # retrieved text was longer than the observation budget
    SEQUENCE = "sequence"  # the whole trajectory ran out of tokens


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable passage of the corpus."""

    id: str
    title: str
    text: str
    score: float | None = None


@dataclass(slots=True)
class Segment:
    """A run of tokens of one kind.

    `logprobs` holds the sampling engine's log-probability of each token, `None` where the engine sampled nothing or
    does not report any. `text` is the decoded (or, for inserted text, rendered) form, for parsing and for people.
    `is_context` keeps a segment of a trained kind out of loss, KL and weights: a correction form may train what comes
    behind it alone.
    """

    kind: SegmentKind
    ids: list[int]
    text: str
    logprobs: list[float | None] | None = None
    is_context: bool = False

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.ids):
            raise ValueError(
                f"a segment of {len(self.ids)} tokens came with {len(self.logprobs)} log-probabilities; "
                "the generator must report one per sampled token"
            )


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One executed call: what was asked, the passages that came back, and the place that they take among segments."""

    tool: str
    arguments: Mapping[str, Any]
    passages: tuple[Passage, ...] = ()
    segment: int = 0

    @property
    def query(self) -> str:
        """What was asked, in one line."""
        values = [str(value) for value in self.arguments.values()]
        return (
            values[0] if len(values) == 1 else ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        )


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Where the answer that ended a rollout begins: the segment and the character offset of its `<answer>` tag."""

    segment: int
    offset: int


@dataclass(slots=True)
class Trajectory:
    """A prompt and the completion made of segments.

    A trajectory with a `PROBE` segment is a probe: the `POLICY` tokens before it are its prefix (copied from the
    failed original at index `parent`, its first `cut` tokens), those after it its continuation. `pool_logprobs` holds,
    for every `PROBE` token, its log-probability under the explorer that proposed it, given the tokens so far; `None`
    where that is not known. `trained` is what enters the loss in its place, where that is not the trajectory itself:
    rewards, answers and counts are always those of the rollout.
    """

    prompt_ids: list[int]
    segments: list[Segment] = field(default_factory=list)
    tool_uses: list[ToolUse] = field(default_factory=list)
    answer: str | None = None
    answer_span: AnswerSpan | None = None
    turns: int = 0
    invalid_actions: int = 0
    truncations: Counter = field(default_factory=Counter)
    done: bool = False
    parent: int | None = None
    cut: int | None = None
    pool_logprobs: list[float] | None = None
    trained: Trajectory | None = None

    @property
    def searches(self) -> list[ToolUse]:
        """The executed searches."""
        return [use for use in self.tool_uses if use.tool == "search"]

    @property
    def completion_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.ids]

    @property
    def completion_length(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def length(self) -> int:
        """Prompt and completion together, in tokens."""
        return len(self.prompt_ids) + self.completion_length

    @property
    def kinds(self) -> list[int]:
        """The segment kind of every completion token."""
        return [int(segment.kind) for segment in self.segments for _ in segment.ids]

    @property
    def trained_mask(self) -> list[int]:
        """1 for tokens in loss, KL and weights (`POLICY`, `PROBE`), 0 for inserted text and context."""
        return [
            int(segment.kind.is_trained and not segment.is_context) for segment in self.segments for _ in segment.ids
        ]

    @property
    def sampling_logprobs(self) -> list[float | None]:
        """The engine's log-probability of every completion token; `None` where it sampled nothing."""
        return [value for segment in self.segments for value in (segment.logprobs or [None] * len(segment.ids))]

    @property
    def is_probe(self) -> bool:
        return any(segment.kind is SegmentKind.PROBE for segment in self.segments)

    @property
    def origin(self) -> int:
        """The `parent` of a probe, which has one."""
        assert self.parent is not None
        return self.parent

    @property
    def probe_segment(self) -> int:
        """Where among the segments of a probe its exploration prompt stands."""
        return next(index for index, segment in enumerate(self.segments) if segment.kind is SegmentKind.PROBE)

    @property
    def model_length(self) -> int:
        """Tokens of `model_text`."""
        return sum(len(segment.ids) for segment in self.segments if segment.kind.is_trained)

    @property
    def generated_length(self) -> int:
        """Tokens that the engine sampled for it: of a probe its continuation alone."""
        own = self.segments[self.probe_segment + 1 :] if self.is_probe else self.segments
        return sum(len(segment.ids) for segment in own if segment.kind is SegmentKind.POLICY)

    @property
    def model_text(self) -> str:
        """Model-written text alone: what rewards may read."""
        return "".join(segment.text for segment in self.segments if segment.kind.is_trained)

    def render(self) -> str:
        """The whole completion with segment kinds made visible, for people and for completion tables."""
        return "\n".join(f"[{segment.kind.name}] {segment.text.strip()}" for segment in self.segments)

    def search_rows(self) -> list[dict[str, Any]]:
        """The executed calls as plain data: what was asked, ids of the passages, place among the segments, and the
        tool where it is another than search."""
        return [
            {"query": use.query, "passages": [passage.id for passage in use.passages], "segment": use.segment}
            | ({} if use.tool == "search" else {"tool": use.tool})
            for use in self.tool_uses
        ]

    def segment_texts(self) -> list[dict[str, str]]:
        """The completion as plain data that keeps its segments apart: `{"kind", "text"}` of each, in order."""
        return [{"kind": segment.kind.name, "text": segment.text} for segment in self.segments]
