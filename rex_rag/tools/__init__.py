"""The tools by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rex_rag.protocols.base import ToolSpec
from rex_rag.support.errors import UserError
from rex_rag.support.named import choose
from rex_rag.tools.base import Tool, ToolError, ToolResult
from rex_rag.tools.function import FunctionTool
from rex_rag.tools.retrieval import ReadTool, SearchTool

if TYPE_CHECKING:
    from rex_rag.retrieval.base import Retriever

# Made of a retriever and the number of passages a search; `spec` is the class's.
TOOLS: dict[str, type[SearchTool] | type[ReadTool]] = {"search": SearchTool, "read": ReadTool}

__all__ = [
    "TOOLS",
    "FunctionTool",
    "ReadTool",
    "SearchTool",
    "Tool",
    "ToolError",
    "ToolResult",
    "make_tools",
    "tool_specs",
]


def tool_specs(names: Sequence[str]) -> list[ToolSpec]:
    """What a model is told of the tools of these names; no retriever is needed for that."""
    return [TOOLS[name].spec if name in TOOLS else _own_tool(name).spec for name in names]


def make_tools(names: Sequence[str], retriever: Retriever | None, top_k: int = 3) -> list[Tool]:
    """The tools of these names: built-in ones, and a user's own as `module:name`.

    A user's own is a function (`FunctionTool`), or a class that derives from `Tool` and is made without arguments.

    Raises:
        ValueError: for an unknown name, and a tool that needs a retriever where there is none.
    """
    return [_built_in(name, retriever, top_k) if name in TOOLS else _own_tool(name) for name in names]


def _built_in(name: str, retriever: Retriever | None, top_k: int) -> Tool:
    if retriever is None:
        raise UserError(f"the tool {name!r} needs a retriever; name one, or leave the tool out")
    return TOOLS[name](retriever, top_k)


def _own_tool(name: str) -> Tool:
    own = choose(name, TOOLS, None, "agent_tools")
    if not isinstance(own, type):
        return FunctionTool(own)
    if not issubclass(own, Tool):
        raise UserError(
            f"agent_tools={name!r} is a class that does not derive from rex_rag.tools.Tool; name a function"
        )
    return own()
