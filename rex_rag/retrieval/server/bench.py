"""How fast a retrieval server is: throughput, latencies, errors and where the time goes, over real HTTP.

The load generator runs closed loops: each of `concurrency` connections sends its next request when the last one is
answered. It reports its own CPU share, because figures of a generator that is busy all the time are its own.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import perf_counter, thread_time

from rex_rag.retrieval.base import Retriever
from rex_rag.retrieval.remote.endpoint import without_password
from rex_rag.retrieval.server.bench_load import STAGES, Load, Samples, drive
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.progress_bars import progress_bar
from rex_rag.support.wording import counted
from rex_rag.types import Passage

# Above this share of one core a generator process no longer only measures.
BUSY_SHARE = 0.85
WARM_UP_QUERIES = 4096  # at most, and at most two requests a connection
QUERY_FIELDS = ("query", "question")
# Any of these words occurs in an English corpus; what they find gives the words for the real queries.
_SEED_WORDS = ("history", "city", "film", "music", "war", "river", "school", "family", "company", "water")
_VOCABULARY_ROUNDS = 3
_VOCABULARY_QUERIES = 64
_VOCABULARY_TOP_K = 10
_MAX_MISSES = 1000


class BenchError(UserError):
    """A benchmark cannot be run as asked; the message names value, reason and way out."""


@dataclass(frozen=True)
class BenchOptions:
    """What to send. `processes` share the connections; by default one for every 64 of them, up to half of the cores.

    Raises:
        BenchError: for values out of range.
    """

    url: str
    concurrency: int = 64
    queries: int = 20_000
    batch_size: int = 1
    top_k: int = 3
    timeout: float = 60.0
    processes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BenchError(f"url={without_password(self.url)!r} is no http(s) address; use http://host:port")
        for name in ("concurrency", "queries", "batch_size", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BenchError(f"{name}={value!r}; it must be an integer of at least 1")
        if not 0 < self.timeout < float("inf"):
            raise BenchError(f"timeout={self.timeout!r} seconds; it must be finite and above 0")
        if self.processes is not None and not 1 <= self.processes <= self.concurrency:
            raise BenchError(
                f"processes={self.processes} cannot share concurrency={self.concurrency}; use 1 to {self.concurrency}"
            )


@dataclass(frozen=True)
class Spread:
    """A distribution in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float
    mean: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of at least one measurement, in seconds."""
        import numpy as np

        values = np.asarray(seconds) * 1e3
        p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
        return cls(p50, p95, p99, float(values.max()), float(values.mean()))


@dataclass(frozen=True)
class BenchResult:
    """Figures of one run; rates count answered requests alone."""

    target: str
    concurrency: int
    batch_size: int
    top_k: int
    requests: int  # sent
    queries: int  # answered
    distinct_queries: int  # sent; a cache answers the others
    seconds: float
    latency: Spread | None  # None when nothing was answered
    stages: dict[str, Spread]
    errors: dict[str, int]
    generator_processes: int  # 0: in process
    generator_cpu_share: float  # of one core, the busiest process
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def queries_per_second(self) -> float:
        return self.queries / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict:
        """Plain data for a JSON file."""
        return {**asdict(self), "queries_per_second": self.queries_per_second}

    def table(self) -> str:
        """The figures for people to read."""
        failed = sum(self.errors.values())
        lines = [
            f"{self.target}: {counted(self.requests, 'request')} of "
            f"{counted(self.batch_size, 'query', 'queries')} (top {self.top_k}), "
            f"{self.concurrency} at once, {self.seconds:.1f} s",
            f"{self.queries_per_second:,.0f} queries/s answered, {counted(failed, 'request')} failed",
            f"{'milliseconds':<14}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}{'mean':>9}",
        ]
        rows = {"request": self.latency} if self.latency else {}
        for name, spread in {**rows, **self.stages}.items():
            figures = "".join(
                f"{value:>9.2f}" for value in (spread.p50, spread.p95, spread.p99, spread.max, spread.mean)
            )
            lines.append(f"{name:<14}{figures}")
        lines += [f"failed {counted(count, 'time')}: {cause}" for cause, count in self.errors.items()]
        if self.generator_processes:
            lines.append(
                f"load generator: {counted(self.generator_processes, 'process', 'processes')}, "
                f"{self.generator_cpu_share:.0%} of a core busy"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def run_bench(options: BenchOptions, queries: Sequence[str] | None = None) -> BenchResult:
    """Send `options.queries` queries to a server and measure.

    Args:
        queries: what to ask, repeated from the start when there are fewer than asked for; by default made of words
            from the server's own passages (`invent_queries`).

    Raises:
        BenchError: for an empty or blank `queries`.
        RetrievalError: when the server answers no search at all.
    """
    from rex_rag.retrieval.remote.client import RemoteRetriever

    processes = options.processes or max(1, min(options.concurrency // 64, (os.cpu_count() or 1) // 2))
    warm_requests = min(2 * options.concurrency, max(1, WARM_UP_QUERIES // options.batch_size))
    warm_count = warm_requests * options.batch_size
    remote = RemoteRetriever(options.url, timeout=options.timeout, max_attempts=1, limit_names=None)
    try:
        if queries is None:
            queries = invent_queries(remote.search, options.queries + warm_count, options.seed)
        else:
            remote.search([_first(queries)], options.top_k)
    finally:
        remote.close()
    # Warm-up asks what comes after the measured queries, so that it fills no cache for them if there are enough.
    warm = [queries[(options.queries + index) % len(queries)] for index in range(warm_count)]
    asked = [queries[index % len(queries)] for index in range(options.queries)]
    batches, warm_batches = _batches(asked, options.batch_size), _batches(warm, options.batch_size)
    loads = [
        Load(
            options.url,
            batches[index::processes],
            warm_batches[index::processes],
            _share(options.concurrency, processes, index),
            options.top_k,
            options.timeout,
        )
        for index in range(processes)
    ]
    with progress_bar(options.queries, "benchmark", "queries") as bar:
        samples = (
            [drive(loads[0], lambda: None, bar.update)] if processes == 1 else _drive_processes(loads, bar.update)
        )
    return _result(options, samples, len(batches), len(set(asked)))


def bench_in_process(
    retriever: Retriever, queries: Sequence[str], batch_size: int, top_k: int = 3, name: str = "in process"
) -> BenchResult:
    """Search the same way without a server, one batch after the other: what a server's overhead is measured against.

    Fetching makes `Passage` objects, as a caller in the same process wants them.

    Raises:
        BenchError: for an empty or blank `queries`, or a `batch_size` below 1.
    """
    if batch_size < 1:
        raise BenchError(f"batch_size={batch_size}; it must be at least 1")
    retriever.search([_first(queries)], top_k)
    latencies: list[float] = []
    stages: dict[str, list[float]] = {}
    cpu, started = thread_time(), perf_counter()
    for batch in _batches(queries, batch_size):
        before = perf_counter()
        if (steps := retriever.stages) is not None:
            encoded = steps.encode(batch)
            encoded_at = perf_counter()
            ranked = steps.rank(encoded, top_k)
            ranked_at = perf_counter()
            steps.fetch(*ranked)
            done = perf_counter()
            for stage, seconds in zip(
                STAGES[1:], (encoded_at - before, ranked_at - encoded_at, done - ranked_at), strict=True
            ):
                stages.setdefault(stage, []).append(seconds)
        else:
            retriever.search(batch, top_k)
            done = perf_counter()
        latencies.append(done - before)
    seconds = perf_counter() - started
    return BenchResult(
        name,
        1,
        batch_size,
        top_k,
        len(latencies),
        len(queries),
        len(set(queries)),
        seconds,
        Spread.of(latencies),
        {stage: Spread.of(values) for stage, values in stages.items()},
        {},
        0,
        (thread_time() - cpu) / seconds,
    )


def load_queries(path: str | Path) -> list[str]:
    """Read queries: JSON lines with a field `query` or `question`, or any other file with one query a line.

    Raises:
        BenchError: for a file that is missing, empty or malformed; the message names the line.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        found = []
        for number, row in iter_json_objects(path, BenchError):
            name = next((name for name in QUERY_FIELDS if name in row), None)
            if name is None or not isinstance(row[name], str) or not row[name].strip():
                raise BenchError(
                    f"{path}, line {number}: no text under {' or '.join(QUERY_FIELDS)}, found {sorted(row)}; "
                    "each row needs one query"
                )
            found.append(row[name])
        return found
    if not path.is_file():
        raise BenchError(f"{path}: no such file; check the path (working directory: {Path.cwd()})")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); re-encode the file") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise BenchError(f"{path}: the file is empty; it needs one query a line")
    return found


def invent_queries(
    search: Callable[[Sequence[str], int], list[list[Passage]]], count: int, seed: int = 0
) -> list[str]:
    """Make queries that match what is searched: three to eight words of one passage each, in the passage's order.

    The passages come from a few rounds of searches, so a server's own words come back to it. The same server and seed
    give the same queries; they are distinct unless the passages hold too few words.
    """
    draw = random.Random(seed)
    passages: dict[str, Passage] = {}
    words: Sequence[str] = _SEED_WORDS
    for _ in range(_VOCABULARY_ROUNDS):
        for ranking in search(list(words), _VOCABULARY_TOP_K):
            passages.update((passage.id, passage) for passage in ranking)
        known = sorted({word for passage in passages.values() for word in _words(passage)}) or list(words)
        words = draw.sample(known, min(len(known), _VOCABULARY_QUERIES))
    sources = [found for passage in passages.values() if (found := _words(passage))] or [list(words)]
    made: dict[str, None] = {}
    repeats: list[str] = []
    misses = 0  # draws since the last new query
    while len(made) + len(repeats) < count:
        source = draw.choice(sources)
        places = sorted(draw.sample(range(len(source)), min(len(source), draw.randint(3, 8))))
        query = " ".join(source[place] for place in places)
        if query not in made:
            made[query], misses = None, 0
        elif (misses := misses + 1) > _MAX_MISSES:
            repeats.append(query)
    return [*made, *repeats]


def _words(passage: Passage) -> list[str]:
    return re.findall(r"[^\W_]{3,}", f"{passage.title} {passage.text}")


def _first(queries: Sequence[str]) -> str:
    blank = [index for index, query in enumerate(queries) if not query.strip()]
    if not queries or blank:
        raise BenchError(
            f"query {blank[0]} is blank; leave it out"
            if blank
            else "no query was given; a benchmark needs at least one"
        )
    return queries[0]


def _batches(queries: Sequence[str], size: int) -> list[Sequence[str]]:
    return [queries[start : start + size] for start in range(0, len(queries), size)]


def _share(total: int, parts: int, index: int) -> int:
    return total // parts + (index < total % parts)


def _drive_processes(loads: list[Load], tick: Callable[[int], object]) -> list[Samples]:
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    barrier = context.Barrier(len(loads))
    pipes, children = [], []
    for load in loads:
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(load, there, done, barrier), daemon=True)
        child.start()
        there.close()
        pipes.append(here)
        children.append(child)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done, tick, stop), daemon=True)
    watcher.start()
    try:
        samples: dict[Connection, Samples] = {}
        while len(samples) < len(pipes):
            # Whichever speaks first: where one has died, the others wait for it at the barrier for ever.
            waiting = [pipe for pipe in pipes if pipe not in samples]
            ready = wait(waiting)
            samples |= {pipe: pipe.recv() for pipe in waiting if pipe in ready}
        return [samples[pipe] for pipe in pipes]
    except EOFError:
        for child in children:
            child.kill()
        raise BenchError("a load generator process died; see its message above, or use one process") from None
    finally:
        stop.set()
        watcher.join()
        for child in children:
            child.join(timeout=5)
            if child.is_alive():
                child.kill()


def _child(load: Load, pipe, done, barrier) -> None:
    def tick(count: int) -> None:
        with done.get_lock():
            done.value += count

    pipe.send(drive(load, barrier.wait, tick))


def _watch(done, tick: Callable[[int], object], stop: threading.Event) -> None:
    shown = 0
    while True:
        ended = stop.wait(0.2)
        tick(done.value - shown)
        shown = done.value
        if ended:
            return


def _result(options: BenchOptions, samples: list[Samples], requests: int, distinct: int) -> BenchResult:
    latencies = [seconds for part in samples for seconds in part.latencies]
    stages: dict[str, list[float]] = {}
    for part in samples:
        for stage, values in part.stages.items():
            stages.setdefault(stage, []).extend(values)
    errors = sum((part.errors for part in samples), Counter())
    share = max(part.cpu_seconds / max(part.ended - part.started, 1e-9) for part in samples)
    notes = []
    if share > BUSY_SHARE:
        notes.append(
            f"the load generator was busy {share:.0%} of the time, so the server may be faster than this; use more "
            f"--processes (now {len(samples)}) or another machine"
        )
    if distinct < options.queries:
        notes.append(
            f"{distinct:,} of the {options.queries:,} queries are distinct; a cache may have answered the others"
        )
    return BenchResult(
        without_password(options.url),
        options.concurrency,
        options.batch_size,
        options.top_k,
        requests,
        sum(part.answered_queries for part in samples),
        distinct,
        max(part.ended for part in samples) - min(part.started for part in samples),
        Spread.of(latencies) if latencies else None,
        {name: Spread.of(stages[name]) for name in (*STAGES, "wire") if name in stages},
        dict(errors.most_common()),
        len(samples),
        share,
        tuple(notes),
    )
