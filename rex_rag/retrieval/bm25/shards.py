"""First pass of a BM25 build: which terms passages hold, counted shard by shard in several processes, on disk.

A shard is a fixed number of passages, so what it holds does not depend on how many processes work. Its files are a
small index of its own: its terms in code point order, and for each term the rows and how often it occurs there. The
file that is written last marks a shard as done.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.data.corpus import passage_from_row
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter, passage_text
from rex_rag.retrieval.passages import PassageSource
from rex_rag.support.durable import written_whole
from rex_rag.support.progress_bars import progress_bar

if TYPE_CHECKING:
    import numpy as np

SHARD_PASSAGES = 50_000
# Postings that the last step holds in memory at once, 8 bytes each besides what scoring takes; a single longer list is
# held whole.
BLOCK_POSTINGS = 1 << 25
# Shards read ahead for all processes together: reading one takes a small part of the time that counting it does.
SHARDS_AHEAD = 2
# Terms are read back in pieces of this size, all shards at once: a file held open for each would exceed the limits.
_BYTES_PER_READ = 1 << 16


@dataclass(frozen=True)
class Shard:
    """The files of one shard: `rows` passages from `first`."""

    work: Path
    number: int
    first: int
    rows: int

    def path(self, part: str) -> Path:
        return self.work / f"shard-{self.number:06d}.{part}"

    def is_done(self) -> bool:
        return self.path("indptr.npy").exists()

    def load(self, part: str) -> np.ndarray:
        """Map one of `indptr` (V + 1,), `rows` (P,) within the shard, `counts` (P,), `lengths` (rows,).

        Of a shard without any term only `indptr` and `lengths` can be mapped: nothing else is in it.
        """
        import numpy as np

        return np.asarray(np.load(self.path(f"{part}.npy"), mmap_mode="r", allow_pickle=False))

    def terms(self) -> Iterator[bytes]:
        """The terms in order, read piece by piece."""
        position, rest = 0, b""
        while True:
            with self.path("terms.txt").open("rb") as file:
                file.seek(position)
                piece = file.read(_BYTES_PER_READ)
            if not piece:
                return
            position += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines


def make_shards(work: Path, passages: int, shard_passages: int) -> list[Shard]:
    """Fixed borders: every shard but the last has `shard_passages` passages."""
    starts = range(0, passages, shard_passages)
    return [Shard(work, number, first, min(shard_passages, passages - first)) for number, first in enumerate(starts)]


def count_shards(passages: PassageSource, shards: list[Shard], options: BM25Options, processes: int) -> None:
    """Write the files of every shard that has none yet.

    Raises:
        RetrievalError: when a process dies.
    """
    waiting = [shard for shard in shards if not shard.is_done()]
    done = sum(shard.rows for shard in shards) - sum(shard.rows for shard in waiting)
    with progress_bar(len(passages), "tokenising", done=done) as bar:
        if min(processes, len(waiting)) <= 1:
            splitter = TermSplitter(options)
            for shard in waiting:
                write_shard(shard, _lines(passages, shard), splitter)
                bar.update(shard.rows)
            return
        # Spawned, not forked: the parent may have threads, whose locks a fork would copy in whatever state they are.
        context = multiprocessing.get_context("spawn")
        workers = min(processes, len(waiting))
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(options,)) as pool:
            try:
                running = {}
                for shard in waiting:
                    while len(running) >= workers + SHARDS_AHEAD:
                        _collect(running, bar)
                    running[pool.submit(_work, shard, _lines(passages, shard))] = shard
                while running:
                    _collect(running, bar)
            except BrokenProcessPool as error:
                raise RetrievalError(
                    f"one of {workers} tokenising processes died, most likely for want of memory; what is done is "
                    "kept: give the same command again, with fewer workers"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def write_shard(shard: Shard, lines: bytes, splitter: TermSplitter) -> None:
    """Count the terms of a shard's passages, given as one JSON object a line, and write its files."""
    import numpy as np

    rows = (passage_from_row(json.loads(line), default_id="0") for line in lines.split(b"\n"))
    ids, vocabulary = splitter.ids([passage_text(passage) for passage in rows])
    terms = sorted(vocabulary)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
    rank = np.empty(len(terms), np.int64)
    rank[[vocabulary[term] for term in terms]] = np.arange(len(terms))
    # One number a (term, row) pair, so that one sort both counts the pairs and brings them into column order.
    pairs = rank[flat] * len(ids) + np.repeat(np.arange(len(ids)), lengths)
    pairs, counts = np.unique(pairs, return_counts=True)
    indptr = np.zeros(len(terms) + 1, np.int64)
    np.cumsum(np.bincount(pairs // len(ids), minlength=len(terms)), out=indptr[1:])
    _save(shard.path("terms.txt"), "".join(f"{term}\n" for term in terms).encode())
    _save(shard.path("rows.npy"), (pairs % len(ids)).astype(np.int32))
    _save(shard.path("counts.npy"), counts.astype(np.min_scalar_type(int(counts.max(initial=0)))))
    _save(shard.path("lengths.npy"), lengths.astype(np.int32))
    _save(shard.path("indptr.npy"), indptr)


def _lines(passages: PassageSource, shard: Shard) -> bytes:
    return b"\n".join(passages.json(row) for row in range(shard.first, shard.first + shard.rows))


def _save(path: Path, value: bytes | np.ndarray) -> None:
    import numpy as np

    # Not alone: a process left over from a killed build may still be at the same file for a moment.
    with written_whole(path, alone=False) as file:
        if isinstance(value, bytes):
            file.write(value)
        else:
            np.save(file, value, allow_pickle=False)


def _collect(running: dict, bar) -> None:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        future.result()
        bar.update(running.pop(future).rows)


_splitter: TermSplitter | None = None


def _start_worker(options: BM25Options) -> None:
    # Ctrl-C reaches every process of a terminal: the parent reports it, a worker just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # A worker waits for work for ever, also when the process that would give it was killed.
    threading.Thread(target=follow_parent, daemon=True).start()
    global _splitter
    _splitter = TermSplitter(options)


def _work(shard: Shard, lines: bytes) -> None:
    write_shard(shard, lines, _splitter)
