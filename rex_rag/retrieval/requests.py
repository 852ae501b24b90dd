"""Defaults of remote requests, and what every retriever refuses to search for, so that all refuse it alike."""

from __future__ import annotations

from collections.abc import Sequence

from rex_rag.retrieval.base import RetrievalError

# A batch of several hundred queries against an exact index over 21 million passages takes seconds, not a minute.
DEFAULT_TIMEOUT_SECONDS = 60.0
DEFAULT_MAX_ATTEMPTS = 5


def check_request(queries: Sequence[str], top_k: int) -> None:
    """Raise `RetrievalError` for a `top_k` that is not a positive integer and for queries that ask nothing."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RetrievalError(f"top_k={top_k!r} asks for no passage; it must be an integer of at least 1")
    if isinstance(queries, str):
        raise RetrievalError(f"queries is the single string {queries!r}; pass a list of strings")
    for position, query in enumerate(queries):
        if not isinstance(query, str):
            raise RetrievalError(f"query {position} is {query!r}, a {type(query).__name__}; it must be a string")
        if not query.strip():
            raise RetrievalError(
                f"query {position} of {len(queries)} is blank ({query!r}); a blank search is an invalid action, "
                "so leave it out of the batch"
            )
