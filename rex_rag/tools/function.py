"""A Python function with type hints and a docstring as a tool, as in TRL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rex_rag.protocols.base import ToolSpec
from rex_rag.support.errors import UserError
from rex_rag.support.wording import shorten
from rex_rag.tools.base import Tool, ToolError, ToolResult


class FunctionTool(Tool):
    """Calls a function once for each call, in order. What it returns is shown as text.

    Args:
        function: its name, docstring (Google style, with `Args:`) and type hints are what the model is told.

    Raises:
        ValueError: for a function without docstring or hints, naming what is missing.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        from transformers.utils import get_json_schema
        from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

        try:
            schema = get_json_schema(function)["function"]
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise UserError(
                f"the tool {getattr(function, '__name__', function)!r} cannot be described to a model ({error}); give "
                "it type hints, a docstring, and an `Args:` line for each argument"
            ) from error
        self.function = function
        self.spec = ToolSpec(schema["name"], schema["description"], schema["parameters"])

    def run(self, calls: Sequence[Mapping[str, Any]]) -> list[ToolResult]:
        results = []
        for call in calls:
            try:
                results.append(ToolResult(str(self.function(**call))))
            except ToolError as error:
                results.append(ToolResult(f"Error: {shorten(str(error), 500)}"))
        return results
