"""What a script is: a Python generator that says what it wants next, and is given it.

A script works on one trajectory. It yields `Generate` and is sent `Written`, or yields `Call` and is sent the results;
when it returns, the trajectory is done. The driver puts the wants of many scripts together, and keeps the books: every
text that the model wrote becomes a POLICY segment with the very ids that were sampled, every call a `ToolUse`, every
cut a counted truncation. What a script inserts, it adds itself.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rex_rag.protocols.base import ToolCall
from rex_rag.types import Trajectory, Truncation

if TYPE_CHECKING:
    from rex_rag.tools.base import ToolResult


# Text of others beyond so many characters for each token that it may take is cut before it is encoded, since a
# megabyte takes seconds. Four or five are usual; runs of blanks that make longer tokens are no loss.
CHARACTERS_A_TOKEN = 32


@dataclass(frozen=True, slots=True)
class RolloutBudget:
    """Limits of a rollout, in tokens unless said otherwise. Defaults: METHOD/paper (2048 prompt, 500, 500, 4096)."""

    max_turns: int = 5  # turns that may search; one last generation follows in which a call is not executed
    max_turn_tokens: int = 500
    max_observation_tokens: int = 500
    max_sequence_length: int = 4096  # prompt and completion together
    top_k: int = 3  # passages per search


@dataclass(frozen=True, slots=True)
class Generate:
    """Have the model continue these ids until a stop string, its end-of-sequence token or a limit.

    The limit is that of a turn, lowered by `limit` (tokens) and by what `max_sequence_length` leaves.
    """

    prompt_ids: list[int]
    stop: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Run calls of one turn together; the script is sent one result each."""

    calls: tuple[ToolCall, ...]


def search(query: str) -> Call:
    """One search. The query must not be blank."""
    return Call((ToolCall("search", {"query": query}),))


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote: the sampled ids, up to where it ended its message (as is its text).

    ended: it ended its message. truncation: why it was cut, `None` where it stopped by itself.
    """

    ids: list[int]
    text: str
    ended: bool
    truncation: Truncation | None


# What is sent depends on what was yielded, `Written` or a list of `ToolResult`; a generator's type cannot say so.
Script = Generator[Generate | Call, Any, None]


class Running:
    """A started script, its trajectory, and what it waits for: `wants` is `None` once it is done."""

    def __init__(self, script: Script, trajectory: Trajectory, row: int = 0) -> None:
        self._script = script
        self.trajectory = trajectory
        self.row = row
        self.generations = 0
        self.wants: Generate | Call | None = None
        self.resume(None)

    @property
    def generate(self) -> Generate:
        """What it wants of the model, which it must be waiting for."""
        assert isinstance(self.wants, Generate)
        return self.wants

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """What it wants of tools, which it must be waiting for."""
        assert isinstance(self.wants, Call)
        return self.wants.calls

    def resume(self, result: Written | list[ToolResult] | None) -> None:
        try:
            self.wants = self._script.send(result)
        except StopIteration:
            self.end()

    def end(self) -> None:
        self._script.close()
        self.trajectory.done = True
        self.wants = None
