"""What the rest of the package knows of a retriever, and how a failed search is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rex_rag.support.errors import UserError
from rex_rag.types import Passage

# A batch of several hundred queries against an exact index over 21 million passages takes seconds, not a minute.
DEFAULT_TIMEOUT_SECONDS = 60.0
# With the client's pauses between them 4.5 minutes on average: a killed server may restart and load its index again.
DEFAULT_MAX_ATTEMPTS = 18


class RetrievalError(UserError):
    """A search could not be answered. Raised instead of ever returning nothing in its place."""


class EngineAway(RetrievalError):
    """The engine behind a search cannot be reached: no query is to blame, and no other one would fare better."""


@runtime_checkable
class Retriever(Protocol):
    """Answers batches of queries with ranked passages."""

    @property
    def description(self) -> str:
        """One line for model cards and logs: kind, corpus, size or address."""
        ...

    def check(self) -> None:
        """Raise `RetrievalError` unless a search would be answered now; called before a model is loaded."""
        ...

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return for each query, in the order asked, at least one and at most `top_k` passages, best first.

        A blank query gets passages as any that nothing matches: Search-R1's client asks such, beside others.

        Raises:
            RetrievalError: when a query could not be answered; the message names query or address, and cause.
        """
        ...


def checked_search(retriever: Retriever, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
    """Search and hold the retriever to its contract: one non-empty ranking per query."""
    rankings = retriever.search(queries, top_k)
    if len(rankings) != len(queries):
        raise RetrievalError(
            f"{retriever.description} returned {len(rankings)} rankings for {len(queries)} queries; "
            "a retriever must answer every query, in the order asked"
        )
    for query, ranking in zip(queries, rankings, strict=True):
        if not ranking:
            raise RetrievalError(
                f"{retriever.description} returned no passage for the query {query!r}; an empty result is "
                "indistinguishable from a failed search, so it is refused: check the index"
            )
    return rankings


def check_request(queries: Sequence[str], top_k: int) -> None:
    """Raise `RetrievalError` for a `top_k` that is not a positive integer and for queries that are no strings."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RetrievalError(f"top_k={top_k!r} asks for no passage; it must be an integer of at least 1")
    if isinstance(queries, str):
        raise RetrievalError(f"queries is the single string {queries!r}; pass a list of strings")
    for position, query in enumerate(queries):
        if not isinstance(query, str):
            raise RetrievalError(f"query {position} is {query!r}, a {type(query).__name__}; it must be a string")
