"""Concurrent searches merged into micro-batches: what waits while one batch is searched becomes the next one.

Invariants: every request gets the answers to its own queries, in its order, or one error; a query that fails fails
nobody else's request; what waits is bounded. State belongs to the event loop alone; threads get lists and give lists.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.server.runner import Observer, Overloaded, QueryFailed, overloaded
from rex_rag.retrieval.server.stages import Ranking, Served, Timings, attempt, encode, rank, render, timed
from rex_rag.support.wording import shorten

logger = logging.getLogger(__name__)

# In all, a batch waits this many times `wait` for the clients just answered, however regularly they come.
MAX_WAITS = 10


class ResultCache:
    """The rankings of the latest (query, top_k), at most `size` of them; 0 keeps none.

    It holds scores and rows, no text: about half a kilobyte an entry at top_k 3.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[str, int], Ranking] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, query: str, top_k: int) -> Ranking | None:
        ranking = self._entries.get((query, top_k))
        if ranking is not None:
            self._entries.move_to_end((query, top_k))
        return ranking

    def put(self, query: str, top_k: int, ranking: Ranking) -> None:
        if not self._size:
            return
        self._entries[query, top_k] = ranking
        self._entries.move_to_end((query, top_k))
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Request:
    queries: Sequence[str]
    top_k: int
    with_scores: bool
    future: asyncio.Future[Served]
    arrived: float
    rankings: list[Ranking | None]
    missing: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True, eq=False)
class _Job:
    """One query that is to be searched once, and the places in requests that wait for it."""

    query: str
    top_k: int
    waiters: list[tuple[_Request, int]] = field(default_factory=list)

    def is_wanted(self) -> bool:
        return any(not request.future.done() for request, _ in self.waiters)


class MicroBatcher:
    """Serves an indexed retriever in three threads (encode, rank, fetch), one batch after the other in each.

    Searching a batch costs less than searching its parts, so that batches should be large, without anyone waiting for
    long. While one is ranked, the next is encoded if it is larger, and grows until then. Once it is answered, its
    clients tend to ask again at once: a smaller batch waits for them, until none came for `wait`. Without this, the
    clients of a busy server would split into two halves that take turns. A client by itself never waits.

    To be made on the event loop that it serves.

    Args:
        max_batch: queries in a batch, >= 1.
        max_waiting: unanswered queries beyond which `submit` refuses, >= 1.
        wait: seconds without a new query after which a batch waits no longer for clients just answered, >= 0.
        cache_size: rankings kept, >= 0.
    """

    def __init__(
        self,
        retriever: IndexedRetriever,
        *,
        max_batch: int,
        max_waiting: int,
        wait: float = 0.0,
        cache_size: int = 0,
        observer: Observer | None = None,
    ) -> None:
        self._retriever = retriever
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._wait = wait
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self.cache = ResultCache(cache_size)
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._waiting: deque[_Job] = deque()
        self._unanswered = 0
        self._ranking = 0  # queries in the batch being ranked
        self._last_batch = 0  # queries in the batch ranked last
        self._ranked_at = self._answered_at = self._arrived_at = 0.0
        self._fetching = False
        self._ready: list[_Request] = []
        self._open: set[_Request] = set()
        self._ended_by: RetrievalError | None = None
        self._seconds_per_query = 0.0
        self._changed = asyncio.Event()
        self._fetchable = asyncio.Event()
        self._rank_free = asyncio.Semaphore(1)
        self._threads = {name: ThreadPoolExecutor(1, name) for name in ("encode", "rank", "fetch")}
        self._tasks: set[asyncio.Task] = set()
        self._spawn(self._form_batches())
        self._spawn(self._fetch_answers())

    def submit(self, queries: Sequence[str], top_k: int, with_scores: bool) -> asyncio.Future[Served]:
        if self._ended_by is not None:
            raise self._ended_by
        future: asyncio.Future[Served] = self._loop.create_future()
        rankings = [self.cache.get(query, top_k) for query in queries]
        request = _Request(queries, top_k, with_scores, future, perf_counter(), rankings, rankings.count(None))
        if self._unanswered + request.missing > self._max_waiting:
            raise self._overloaded(request.missing)
        self._open.add(request)
        future.add_done_callback(lambda _: self._open.discard(request))
        if self._observer:
            self._observer.cache(len(queries) - request.missing, request.missing)
        if not request.missing:
            self._fetch_soon(request)
            return future
        self._arrived_at = self._loop.time()
        self._unanswered += request.missing
        for position, ranking in enumerate(rankings):
            if ranking is None:
                self._enqueue(request, position)
        self._changed.set()
        return future

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end(RetrievalError("the server stopped before this request was answered"))
        for thread in self._threads.values():
            thread.shutdown(wait=False)

    def _end(self, error: RetrievalError) -> None:
        self._ended_by = error
        for request in list(self._open):
            _fail(request, error)

    def _enqueue(self, request: _Request, position: int) -> None:
        key = request.queries[position], request.top_k
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(*key)
            self._waiting.append(job)
        job.waiters.append((request, position))

    def _overloaded(self, more: int) -> Overloaded:
        return overloaded(self._unanswered, more, self._max_waiting, self._unanswered * self._seconds_per_query)

    # Batches: form, encode, rank, share out.

    async def _form_batches(self) -> None:
        while True:
            while not self._is_worth_starting():
                self._changed.clear()
                await self._changed.wait()
            while self._expects_more():
                await asyncio.sleep(self._wait / 4)
            batch = self._take()
            if not batch:
                continue
            queries = [job.query for job in batch]
            encoded, seconds = await self._in_thread("encode", timed, encode, self._retriever, queries)
            await self._rank_free.acquire()
            self._ranking = len(batch)
            self._spawn(self._rank(batch, queries, encoded, seconds))

    def _is_worth_starting(self) -> bool:
        waiting = len(self._waiting)
        return waiting >= self._max_batch or waiting > self._ranking

    def _expects_more(self) -> bool:
        """Whether the clients of the batch just answered are still coming back with their next queries."""
        if self._ranking or len(self._waiting) >= min(self._last_batch, self._max_batch):
            return False
        now = self._loop.time()
        latest = now if self._fetching else max(self._answered_at, self._arrived_at)
        return now - latest < self._wait and now - self._ranked_at < self._wait * MAX_WAITS

    def _take(self) -> list[_Job]:
        """The next batch, all of one `top_k`: re-rankers and approximate indexes find more where more is asked for."""
        batch: list[_Job] = []
        others: list[_Job] = []
        while self._waiting and len(batch) < self._max_batch:
            job = self._waiting.popleft()
            if not job.is_wanted():
                self._settle(job)
            elif batch and job.top_k != batch[0].top_k:
                others.append(job)
            else:
                batch.append(job)
        self._waiting.extendleft(reversed(others))
        return batch

    async def _rank(self, batch: list[_Job], queries: list[str], encoded: Any, encode_seconds: float) -> None:
        top_k = batch[0].top_k
        outcomes, seconds = await self._in_thread("rank", timed, rank, self._retriever, queries, top_k, encoded)
        self._ranking, self._last_batch, self._ranked_at = 0, len(batch), self._loop.time()
        self._rank_free.release()
        self._changed.set()
        pace = max(encode_seconds, seconds) / len(batch)
        self._seconds_per_query = pace if not self._seconds_per_query else 0.8 * self._seconds_per_query + 0.2 * pace
        if self._observer:
            self._observer.batch(len(batch))
        for request in {request for job in batch for request, _ in job.waiters}:
            request.timings.encode += encode_seconds
            request.timings.search += seconds
        for job, outcome in zip(batch, outcomes, strict=True):
            self._settle(job)
            for request, position in job.waiters:
                if isinstance(outcome, Exception):
                    _fail(request, _query_failed(request, position, outcome))
                else:
                    self._answer(request, position, outcome)

    def _settle(self, job: _Job) -> None:
        self._unanswered -= len(job.waiters)
        del self._jobs[job.query, job.top_k]

    def _answer(self, request: _Request, position: int, ranking: Ranking) -> None:
        self.cache.put(request.queries[position], request.top_k, ranking)
        request.rankings[position] = ranking
        request.missing -= 1
        if not request.missing and not request.future.done():
            self._fetch_soon(request)

    # Answers: all that are ready go through the fetching thread together.

    def _fetch_soon(self, request: _Request) -> None:
        self._ready.append(request)
        self._fetchable.set()

    async def _fetch_answers(self) -> None:
        while True:
            await self._fetchable.wait()
            self._fetchable.clear()
            requests, self._ready, self._fetching = self._ready, [], True
            bodies = await self._in_thread("fetch", self._fetch, requests)
            self._fetching, self._answered_at = False, self._loop.time()
            now = perf_counter()
            for request, (body, seconds) in zip(requests, bodies, strict=True):
                if isinstance(body, Exception):
                    error = RetrievalError(f"the passages could not be read: {type(body).__name__}: {body}")
                    error.__cause__ = body
                    _fail(request, error)
                elif not request.future.done():
                    request.timings.fetch = seconds
                    request.timings.finish(now - request.arrived)
                    request.future.set_result(Served(body, request.timings))

    def _fetch(self, requests: list[_Request]) -> list[tuple[bytes | Exception, float]]:
        def answer(request: _Request) -> bytes:
            with self._retriever.watched():
                found = [ranking for ranking in request.rankings if ranking is not None]  # all are there by now
                return render(self._retriever, found, request.with_scores)

        return [timed(attempt, answer, request) for request in requests]

    async def _in_thread(self, name: str, function: Callable, *arguments: Any) -> Any:
        return await self._loop.run_in_executor(self._threads[name], function, *arguments)

    def _spawn(self, coroutine: Coroutine) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Better a loud end than requests that wait for ever.
            logger.critical("the batcher itself failed; every waiting request fails", exc_info=task.exception())
            self._end(RetrievalError(f"the batcher itself failed: {task.exception()}"))


def _query_failed(request: _Request, position: int, cause: Exception) -> QueryFailed:
    error = QueryFailed(
        f"query {position} of {len(request.queries)}, {shorten(request.queries[position])}, could not be answered: "
        f"{type(cause).__name__}: {cause}"
    )
    error.__cause__ = cause
    return error


def _fail(request: _Request, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
