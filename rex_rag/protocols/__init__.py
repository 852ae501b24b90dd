"""The protocols by name: how a model is asked, acts and is answered."""

from __future__ import annotations

from collections.abc import Sequence

from rex_rag.protocols.auto_refine import AutoRefine
from rex_rag.protocols.base import SEARCH, Action, Framing, Protocol, ToolCall, ToolSpec
from rex_rag.protocols.search_r1 import SearchR1
from rex_rag.protocols.tool_calls import ToolCalls
from rex_rag.support.named import choose

PROTOCOLS: dict[str, type[Protocol]] = {protocol.name: protocol for protocol in (SearchR1, AutoRefine, ToolCalls)}

__all__ = [
    "PROTOCOLS",
    "SEARCH",
    "Action",
    "AutoRefine",
    "Framing",
    "Protocol",
    "SearchR1",
    "ToolCall",
    "ToolCalls",
    "ToolSpec",
    "make_protocol",
]


def make_protocol(
    name: str,
    tools: Sequence[ToolSpec] = (SEARCH,),
    template: str | None = None,
    feedback: str | None = None,
) -> Protocol:
    """The protocol of a name, or a user's own, named `module:Class`.

    Raises:
        ValueError: for an unknown name, and for what the protocol refuses.
    """
    return choose(name, PROTOCOLS, Protocol, "protocol")(tools, template, feedback)
