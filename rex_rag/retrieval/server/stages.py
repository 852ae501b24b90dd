"""The work behind a search request, as it runs in threads: encode, rank, fetch, each timed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from rex_rag.retrieval.base import EngineAway, RetrievalError, Retriever, checked_search
from rex_rag.retrieval.indexed import NO_ROW, IndexedRetriever
from rex_rag.retrieval.passages import passage_json
from rex_rag.retrieval.remote.wire import encode_documents, encode_rankings
from rex_rag.support.wording import counted, shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

# The scores and rows of one query, best first, without the filler of rankings that could not be filled.
Ranking = tuple[list[float], list[int]]


@dataclass(slots=True)
class Timings:
    """Seconds of one request: `queue` is what is left of `total` after the work, so waiting of any kind."""

    queue: float = 0.0
    encode: float = 0.0
    search: float = 0.0
    fetch: float = 0.0
    total: float = 0.0

    def finish(self, total: float) -> None:
        # The stages of successive batches overlap, so that their sum may exceed the time that passed.
        self.total, self.queue = total, max(0.0, total - self.encode - self.search - self.fetch)


@dataclass(slots=True)
class Served:
    """The body of an answer and what it took."""

    body: bytes
    timings: Timings


def timed(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """The result and the seconds it took."""
    started = perf_counter()
    result = function(*arguments)
    return result, perf_counter() - started


def attempt(function: Callable, *arguments: Any) -> Any:
    """The result or the exception."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def search_plain(retriever: Retriever, queries: list[str], top_k: int, with_scores: bool, timings: Timings) -> bytes:
    """Search with any retriever; fills in `timings` and returns the body of an answer."""
    found, timings.search = timed(checked_search, retriever, queries, top_k)
    body, timings.fetch = timed(encode_rankings, [_scored(ranking) for ranking in found], with_scores)
    return body


def _scored(ranking: list[Passage]) -> list[tuple[bytes, float]]:
    # The wire knows no passage without a score: an engine that only orders gets the reciprocal rank.
    return [
        (passage_json(passage), 1 / rank if passage.score is None else passage.score)
        for rank, passage in enumerate(ranking, start=1)
    ]


def search_indexed(
    retriever: IndexedRetriever, queries: list[str], top_k: int, with_scores: bool, timings: Timings
) -> bytes:
    """Search with an indexed retriever stage by stage; fills in `timings` and returns the body of an answer."""
    with retriever.watched():
        encoded, timings.encode = timed(retriever.encode, queries)
        rankings, timings.search = timed(_rank_once, retriever, queries, encoded, top_k)
        for query, ranking in zip(queries, rankings, strict=True):
            if isinstance(ranking, Exception):
                raise RetrievalError(f"the query {shorten(query)} could not be answered: {ranking}")
        body, timings.fetch = timed(render, retriever, rankings, with_scores)
    return body


def read_documents(retriever: Retriever, keys: list[str], timings: Timings) -> bytes:
    """Look documents up; fills in `timings` and returns the body of an answer."""
    found, timings.fetch = timed(retriever.read, keys)
    if len(found) != len(keys):
        raise RetrievalError(
            f"{retriever.description} returned {len(found)} documents for {counted(len(keys), 'key')}"
        )
    return encode_documents([[passage_json(passage) for passage in document] for document in found])


def render(retriever: IndexedRetriever, rankings: Sequence[Ranking], with_scores: bool) -> bytes:
    """The body of an answer, its passages read as the bytes that they are stored in."""
    read = retriever.passages.json
    return encode_rankings(
        ([(read(row), score) for score, row in zip(*ranking, strict=True)] for ranking in rankings), with_scores
    )


@dataclass(slots=True)
class _NotEncoded:
    error: Exception


def encode(retriever: IndexedRetriever, queries: list[str]) -> Any:
    """What `rank` below takes; a failure is found again there, query by query."""
    try:
        return retriever.encode(queries)
    except Exception as error:
        return _NotEncoded(error)


def rank(retriever: IndexedRetriever, queries: list[str], top_k: int, encoded: Any) -> list[Ranking | Exception]:
    """Rank a batch; where that fails, its halves, down to the queries that cannot be answered.

    An engine that is away is not asked again: that would repeat all of its own attempts for every part.
    """
    try:
        if isinstance(encoded, _NotEncoded):
            raise encoded.error
        with retriever.watched():
            return _rank_once(retriever, queries, encoded, top_k)
    except Exception as error:
        if len(queries) == 1 or isinstance(error, EngineAway):
            return [error] * len(queries)
        logger.warning(
            "a batch of %d queries failed (%s: %s); searching its halves", len(queries), type(error).__name__, error
        )
    half = len(queries) // 2
    return [
        outcome
        for part in (slice(None, half), slice(half, None))
        for outcome in rank(retriever, queries[part], top_k, encode(retriever, queries[part]))
    ]


def _rank_once(retriever: IndexedRetriever, queries: list[str], encoded: Any, top_k: int) -> list[Ranking | Exception]:
    import numpy as np

    scores, rows = retriever.rank(encoded, top_k)
    if scores.shape != rows.shape or len(rows) != len(queries):
        raise RetrievalError(
            f"{retriever.description} returned scores of shape {scores.shape} and rows of shape {rows.shape} for "
            f"{counted(len(queries), 'query', 'queries')}"
        )
    if np.isfinite(scores).all() and rows.size and (rows != NO_ROW).all():
        return list(zip(scores.tolist(), rows.tolist(), strict=True))
    return [_filled(*ranking) for ranking in zip(scores.tolist(), rows.tolist(), strict=True)]


def _filled(scores: list[float], rows: list[int]) -> Ranking | Exception:
    kept = [(score, row) for score, row in zip(scores, rows, strict=True) if row != NO_ROW]
    if not kept:
        return RetrievalError("the index returned no passage, which is indistinguishable from a failed search")
    if not all(math.isfinite(score) for score, _ in kept):
        return RetrievalError(f"the index returned scores that are no numbers: {[score for score, _ in kept]}")
    return [score for score, _ in kept], [row for _, row in kept]
