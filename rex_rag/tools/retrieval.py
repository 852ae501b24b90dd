"""The tools over a retriever: `search` finds passages, `read` fetches the document that one belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rex_rag.protocols.base import SEARCH, ToolSpec
from rex_rag.retrieval.base import Retriever, as_retriever, checked_search
from rex_rag.tools.base import Tool, ToolResult
from rex_rag.types import Passage

READ = ToolSpec(
    "read",
    "Read a whole document, named by its title or by the id of one of its passages.",
    {
        "type": "object",
        "properties": {"document": {"type": "string", "description": "Title or passage id."}},
        "required": ["document"],
    },
)


def render_passages(passages: Sequence[Passage]) -> str:
    """One line a passage, `Doc 1(Title: T) text`. Raw: make it inert before it is shown to a model."""
    return "\n".join(f"Doc {rank}(Title: {one.title}) {one.text}" for rank, one in enumerate(passages, start=1))


class SearchTool(Tool):
    """Finds passages. Equal queries of a batch are asked once.

    Args:
        retriever: answers.
        top_k: passages a query.
    """

    spec = SEARCH

    def __init__(self, retriever: Retriever, top_k: int = 3) -> None:
        self.retriever = as_retriever(retriever)
        self.top_k = top_k

    @property
    def is_concurrent(self) -> bool:  # type: ignore[override]
        return self.retriever.is_concurrent

    def run(self, calls: Sequence[Mapping[str, Any]]) -> list[ToolResult]:
        queries = list(dict.fromkeys(call["query"] for call in calls))  # a group often asks the same thing
        rankings = dict(zip(queries, checked_search(self.retriever, queries, self.top_k), strict=True))
        results = {query: ToolResult(render_passages(found), tuple(found)) for query, found in rankings.items()}
        return [results[call["query"]] for call in calls]


class ReadTool(Tool):
    """Fetches a document: the passages of one title, in the order of the corpus."""

    spec = READ

    def __init__(self, retriever: Retriever, top_k: int = 3) -> None:
        self.retriever = as_retriever(retriever)

    @property
    def is_concurrent(self) -> bool:  # type: ignore[override]
        return self.retriever.is_concurrent

    def run(self, calls: Sequence[Mapping[str, Any]]) -> list[ToolResult]:
        names = list(dict.fromkeys(call["document"] for call in calls))
        found = dict(zip(names, self.retriever.read(names), strict=True))
        return [self._result(call["document"], found[call["document"]]) for call in calls]

    def _result(self, name: str, passages: Sequence[Passage]) -> ToolResult:
        if not passages:
            return ToolResult(f"There is no document with the title or id {name!r}.")
        text = "\n".join(passage.text for passage in passages)
        return ToolResult(f"Document(Title: {passages[0].title}) {text}", tuple(passages))
