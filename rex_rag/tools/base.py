"""What a tool is: it takes the calls of a batch of trajectories together, and gives a result for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rex_rag.protocols.base import ToolSpec
from rex_rag.types import Passage


class ToolError(Exception):
    """What went wrong is the call's own fault: the model is told, and may call again. Any other error ends the run."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call brought. `text` is raw: whoever inserts it makes it inert. `passages` are its sources."""

    text: str
    passages: tuple[Passage, ...] = ()


class Tool(ABC):
    """A tool that a model can call.

    Attributes:
        spec: what the model is told of it.
        is_concurrent: whether several batches may run at once, from several threads.
    """

    spec: ToolSpec
    is_concurrent: bool = False

    @abstractmethod
    def run(self, calls: Sequence[Mapping[str, Any]]) -> list[ToolResult]:
        """Run a batch of calls, each given by its arguments, which fit the schema; one result each, in order.

        Raises:
            RetrievalError: when a result could not be had. A failure is never an empty result.
        """
