"""Loading vectors into a Qdrant collection in a way that a killed load can be continued.

Rows are sent in order, and never more than `ROWS_IN_FLIGHT` of them are unacknowledged. So all rows are there but
those of the last `ROWS_IN_FLIGHT` counted: from there a later load goes on, and sending a row twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.qdrant_calls import (
    COMPLETE_KEY,
    FINGERPRINT_KEY,
    NotApplied,
    QdrantCalls,
    full_fingerprint,
    is_complete,
    is_embedded,
)
from rex_rag.support.progress_bars import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from qdrant_client import QdrantClient

logger = logging.getLogger(__name__)

# Qdrant's guide to bulk upload recommends 64 to 256 points a request and two to four uploads at a time.
UPLOAD_BATCH = 256
UPLOAD_WORKERS = 4
# Part of the stored format: a load continues one of other batch sizes, so all of them stay within the same bound.
ROWS_IN_FLIGHT = 4096
SECONDS_BETWEEN_POLLS = 1.0
DAY = 86_400.0


@dataclass(frozen=True)
class QdrantOptions:
    """How a new collection keeps its vectors; the embedded mode ignores all of it.

    Raises:
        RetrievalError: for a value that makes no sense.
    """

    hnsw_m: int = 16  # edges a node, Qdrant's default; 0 builds no graph, and every search reads all vectors
    hnsw_ef_construct: int = 100  # neighbours considered while building, Qdrant's default
    on_disk: bool = True  # full vectors memory-mapped from disk: 21 million x 768 float32 are 60 GiB
    int8: bool = True  # a copy of a byte a dimension, held in memory: finds candidates that full vectors re-score
    shards: int | None = None  # spread over the nodes of a cluster; None leaves it to the server
    replicas: int | None = None

    def __post_init__(self) -> None:
        if self.hnsw_m < 0 or self.hnsw_m == 1:
            raise RetrievalError(f"hnsw_m={self.hnsw_m}; use 2 or more edges a node (16 is usual), or 0 for no graph")
        for name in ("hnsw_ef_construct", "shards", "replicas"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RetrievalError(f"{name}={value}; it must be at least 1")


def load_qdrant(
    blocks: Iterable[tuple[int, np.ndarray]],
    client: QdrantClient,
    collection: str,
    rows: int,
    dimension: int,
    fingerprint: Mapping[str, Any],
    options: QdrantOptions | None = None,
    batch_size: int = UPLOAD_BATCH,
    workers: int = UPLOAD_WORKERS,
    max_attempts: int = 5,
    backoff: float = 0.5,
    index_timeout: float = DAY,
) -> None:
    """Load vectors into a collection; one that a killed load left behind is continued, a complete one left alone.

    The graph is built once all vectors are there, which spares memory; this waits for it, `index_timeout` seconds at
    most.

    Args:
        blocks: (first row, vectors of shape (n, dimension), any float type), in row order without gaps.
        rows: how many vectors the blocks hold together.
        fingerprint: what tells these vectors from others, JSON-able: corpus hash, encoder, revision.

    Raises:
        RetrievalError: for a collection of another fingerprint, which is never touched; blocks that are not what rows
            and dimension promise; a cluster that fails `max_attempts` times, or has not all rows at the end.
    """
    if not 1 <= batch_size * workers <= ROWS_IN_FLIGHT:
        raise RetrievalError(
            f"batch_size={batch_size} times workers={workers} must lie in 1..{ROWS_IN_FLIGHT}: a killed load is "
            "continued from what can have been under way"
        )
    options = options or QdrantOptions()
    calls = QdrantCalls(client, collection, max_attempts, backoff)
    wanted = full_fingerprint(fingerprint, rows, dimension)
    if not calls(client.collection_exists, collection):
        _create(calls, wanted, dimension, options)
    if not is_complete(calls, wanted):
        start = max(0, calls(client.count, collection, exact=True).count - ROWS_IN_FLIGHT)
        if start:
            logger.info("Qdrant collection %r: continuing at row %d of %d", collection, start, rows)
        _upload(calls, _batches(blocks, start, rows, dimension, batch_size), workers, rows, start)
        count = calls(client.count, collection, exact=True).count
        if count != rows:
            raise RetrievalError(
                f"Qdrant collection {collection!r} holds {count:,} points after {rows:,} rows were loaded: something "
                "else writes into it or the cluster lost data; delete the collection and load it again"
            )
        calls(client.update_collection, collection, **_graph(options), metadata={COMPLETE_KEY: True})
    _wait_until_indexed(calls, rows, index_timeout)


def _create(calls: QdrantCalls, fingerprint: dict[str, Any], dimension: int, options: QdrantOptions) -> None:
    from qdrant_client import models

    quantization = None
    if options.int8:
        scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        quantization = models.ScalarQuantization(scalar=scalar)
    vectors = models.VectorParams(
        size=dimension, distance=models.Distance.DOT, on_disk=options.on_disk, quantization_config=quantization
    )
    try:
        calls(
            calls.client.create_collection,
            calls.collection,
            vectors_config=vectors,
            # No graph while rows arrive: building it once at the end takes far less memory.
            hnsw_config=models.HnswConfigDiff(m=0, ef_construct=options.hnsw_ef_construct),
            shard_number=options.shards,
            replication_factor=options.replicas,
            metadata={FINGERPRINT_KEY: json.dumps(fingerprint, sort_keys=True), COMPLETE_KEY: False},
        )
    except RetrievalError:
        # An attempt whose answer was lost may have made it; what it is made of is checked like any other's.
        if not calls(calls.client.collection_exists, calls.collection):
            raise


def _graph(options: QdrantOptions) -> dict[str, Any]:
    from qdrant_client import models

    return {"hnsw_config": models.HnswConfigDiff(m=options.hnsw_m, ef_construct=options.hnsw_ef_construct)}


def _batches(
    blocks: Iterable[tuple[int, np.ndarray]], start: int, rows: int, dimension: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut blocks into batches, rows before `start` left out, and hold them to what was promised."""
    import numpy as np

    expected = 0
    for first, block in blocks:
        if first != expected or block.ndim != 2 or block.shape[1] != dimension:
            raise RetrievalError(
                f"a block of shape {block.shape} came for row {first}; row {expected} was next, in blocks of shape "
                f"(n, {dimension})"
            )
        expected += len(block)
        for begin in range(max(0, start - first), len(block), batch_size):
            batch = np.asarray(block[begin : begin + batch_size], dtype=np.float32)
            if not np.isfinite(batch).all():
                raise RetrievalError(f"rows {first + begin}.. hold vectors that are not finite; encode them again")
            yield first + begin, batch
    if expected != rows:
        raise RetrievalError(f"the blocks held {expected:,} vectors, {rows:,} were announced; encode the corpus again")


def _upload(
    calls: QdrantCalls, batches: Iterator[tuple[int, np.ndarray]], workers: int, rows: int, start: int
) -> None:
    waiting: deque[tuple[Future, int]] = deque()
    with progress_bar(rows, "loading Qdrant", "passages", done=start) as bar, ThreadPoolExecutor(workers) as pool:
        try:
            for first, batch in batches:
                if len(waiting) == workers:
                    _finish(waiting, bar)
                waiting.append((pool.submit(_upsert, calls, first, batch), len(batch)))
            while waiting:
                _finish(waiting, bar)
        finally:
            for future, _ in waiting:
                future.cancel()


def _finish(waiting: deque[tuple[Future, int]], bar: Any) -> None:
    # Oldest first: what is under way stays within ROWS_IN_FLIGHT rows, whichever batch is slow.
    future, count = waiting.popleft()
    future.result()
    bar.update(count)


def _upsert(calls: QdrantCalls, first: int, batch: np.ndarray) -> None:
    from qdrant_client import models

    points = models.Batch(ids=list(range(first, first + len(batch))), vectors=batch.tolist())

    def upsert() -> None:
        status = calls.client.upsert(calls.collection, points, wait=True).status
        if status != models.UpdateStatus.COMPLETED:
            raise NotApplied(f"the cluster answered {status.value!r} to the rows from {first} on")

    calls(upsert)


def _wait_until_indexed(calls: QdrantCalls, rows: int, timeout: float) -> None:
    from qdrant_client import models

    if is_embedded(calls.client):
        return
    deadline = time.monotonic() + timeout
    greens = 0
    with progress_bar(rows, "building the graph", "passages") as bar:
        # Twice in a row: the first green may come before the server noticed that there is work to do.
        while greens < 2:
            info = calls(calls.client.get_collection, calls.collection)
            greens = greens + 1 if info.status == models.CollectionStatus.GREEN else 0
            bar.update(min(rows, info.indexed_vectors_count or 0) - bar.n)
            if info.status == models.CollectionStatus.RED:
                raise RetrievalError(
                    f"Qdrant could not index the collection {calls.collection!r} ({info.optimizer_status}); all rows "
                    "are stored: see the server's log, then run this again"
                )
            if time.monotonic() > deadline:
                raise RetrievalError(
                    f"Qdrant had not indexed the collection {calls.collection!r} after {timeout:g} s; it goes on by "
                    "itself: run this again to wait on"
                )
            if greens < 2:
                time.sleep(SECONDS_BETWEEN_POLLS)
