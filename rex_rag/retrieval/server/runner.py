"""Who answers the requests of a server: the contract, and the plain way, each request by itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Protocol

from rex_rag.retrieval.base import RetrievalError, Retriever
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


class Threads:
    """Work of requests in threads, side by side; what waits is bounded, and what fails is one kind of error.

    To be made on the event loop that it serves.
    """

    def __init__(self, name: str, max_waiting: int, observe: Callable[[int], object] = lambda count: None) -> None:
        self._name = name
        self._max_waiting = max_waiting
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._threads = ThreadPoolExecutor(DIRECT_THREADS, name)

    def submit(self, count: int, work: Callable[[Timings], bytes]) -> asyncio.Future[Served]:
        """Have `work` make the body of an answer to `count` queries or keys; it fills in what its stages took.

        Raises:
            Overloaded: at once, when too much waits. The future raises `RetrievalError`.
        """
        if self._unanswered + count > self._max_waiting:
            raise overloaded(self._unanswered, count, self._max_waiting, seconds=1)
        self._unanswered += count
        future = self._loop.run_in_executor(self._threads, self._work, work, perf_counter())
        future.add_done_callback(lambda _: self._done(count))
        return future

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, count: int) -> None:
        self._unanswered -= count
        self._observe(count)

    def _work(self, work: Callable[[Timings], bytes], arrived: float) -> Served:
        timings = Timings()
        try:
            body = work(timings)
        except RetrievalError:
            raise
        except Exception as error:
            raise RetrievalError(f"{self._name} failed: {type(error).__name__}: {error}") from error
        timings.finish(perf_counter() - arrived)
        return Served(body, timings)


class DirectRunner:
    """Searches each request by itself, several side by side: for engines without an index of their own.

    Their queries may cost money or wait for another machine's retries, so that nothing is merged and nothing repeated.
    Indexed retrievers are served in their stages here too, to measure what merging brings.
    """

    def __init__(self, retriever: Retriever, *, max_waiting: int, observer: Observer | None = None) -> None:
        self._retriever = retriever
        observe = observer.batch if observer else lambda count: None
        self._threads = Threads(retriever.description, max_waiting, observe)

    def submit(self, queries: Sequence[str], top_k: int, with_scores: bool) -> asyncio.Future[Served]:
        stages = self._retriever.stages
        search = partial(search_plain, self._retriever) if stages is None else partial(search_indexed, stages)
        asked = list(queries)
        return self._threads.submit(len(asked), lambda timings: search(asked, top_k, with_scores, timings))

    async def close(self) -> None:
        await self._threads.close()
