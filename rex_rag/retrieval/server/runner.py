"""Who answers the requests of a server: the contract, and the plain way, each request by itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Protocol

from rex_rag.retrieval.base import RetrievalError, Retriever
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.server.stages import Served, Timings, search_indexed, search_plain
from rex_rag.support.wording import counted

# Requests that are searched one by one side by side: an engine on another machine needs company, one here gains none.
DIRECT_THREADS = 16
MAX_RETRY_AFTER_SECONDS = 30


class Overloaded(RetrievalError):
    """As much waits as may wait. `retry_after`: whole seconds until a new attempt makes sense."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def overloaded(waiting: int, more: int, limit: int, seconds: float) -> Overloaded:
    """The error of a server in which `waiting` queries will take about `seconds`."""
    return Overloaded(
        f"{counted(waiting, 'query waits', 'queries wait')} and {more:,} more would exceed the limit of {limit:,}; "
        "try again later, send less at a time, or start another server",
        min(max(1, math.ceil(seconds)), MAX_RETRY_AFTER_SECONDS),
    )


class QueryFailed(RetrievalError):
    """The engine could not answer this query; the rest of its batch was answered."""


class Observer(Protocol):
    """Who counts: called on the event loop, between requests, so it must be quick."""

    def batch(self, queries: int) -> None: ...

    def cache(self, hits: int, misses: int) -> None: ...


class Runner(Protocol):
    """Answers requests on an event loop."""

    def submit(self, queries: Sequence[str], top_k: int, with_scores: bool) -> asyncio.Future[Served]:
        """Accept a checked request; cancel the future when nobody waits for the answer any more.

        Raises:
            Overloaded: at once, when too much waits. The future raises `RetrievalError`.
        """
        ...

    async def close(self) -> None:
        """Stop; requests still unanswered fail."""
        ...


class DirectRunner:
    """Searches each request by itself, several side by side: for engines without an index of their own.

    Their queries may cost money or wait for another machine's retries, so that nothing is merged and nothing repeated.
    Indexed retrievers are served in their stages here too, to measure what merging brings.
    """

    def __init__(self, retriever: Retriever, *, max_waiting: int, observer: Observer | None = None) -> None:
        self._retriever = retriever
        self._max_waiting = max_waiting
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._threads = ThreadPoolExecutor(DIRECT_THREADS, "search")

    def submit(self, queries: Sequence[str], top_k: int, with_scores: bool) -> asyncio.Future[Served]:
        if self._unanswered + len(queries) > self._max_waiting:
            raise overloaded(self._unanswered, len(queries), self._max_waiting, seconds=1)
        self._unanswered += len(queries)
        future = self._loop.run_in_executor(
            self._threads, self._answer, list(queries), top_k, with_scores, perf_counter()
        )
        future.add_done_callback(lambda _: self._done(len(queries)))
        return future

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, count: int) -> None:
        self._unanswered -= count
        if self._observer:
            self._observer.batch(count)

    def _answer(self, queries: list[str], top_k: int, with_scores: bool, arrived: float) -> Served:
        timings = Timings()
        search = search_indexed if isinstance(self._retriever, IndexedRetriever) else search_plain
        try:
            body = search(self._retriever, queries, top_k, with_scores, timings)
        except RetrievalError:
            raise
        except Exception as error:
            raise RetrievalError(f"{self._retriever.description} failed: {type(error).__name__}: {error}") from error
        timings.finish(perf_counter() - arrived)
        return Served(body, timings)
