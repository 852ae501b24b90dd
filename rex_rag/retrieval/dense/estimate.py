"""What a dense index will take, from a timed sample of its passages on the machine that is to build it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encode_corpus import DEFAULT_SHARD_ROWS
from rex_rag.retrieval.dense.encode_corpus import DTYPES as DTYPE_BYTES
from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.faiss_index import ADD_ROWS, TRAINING_PER_LIST, FaissOptions
from rex_rag.retrieval.dense.flat_file import import_faiss
from rex_rag.retrieval.estimate import Estimate
from rex_rag.support.wording import counted
from rex_rag.types import Passage

# Writing and syncing a large file: an old disk; every newer one is faster, and encoding takes far longer anyway.
_DISK_BYTES_PER_SECOND = 200e6
_KMEANS_ITERATIONS = 10
_TRIAL_ROWS = 4_000
_GRAPH_POWER, _GRAPH_TURN = 0.45, 100_000
_ID_BYTES = 8


def estimate_dense(
    sample: Sequence[Passage],
    total: int,
    encoder: Encoder,
    options: FaissOptions | None,
    shard_rows: int = DEFAULT_SHARD_ROWS,
) -> Estimate:
    """Estimate encoding `total` passages and building the index, in about ten seconds.

    sample: 64 passages or more, spread over the corpus. options: `None` for encoding alone (half-precision shards).

    Raises:
        RetrievalError: for an empty sample.
    """
    if not sample or total < 1:
        raise RetrievalError(f"an estimate over {total} passages from {len(sample)} needs at least one of each")
    texts = [encoder.spec.passage_text(passage) for passage in sample]
    rate = encoder.measure_rate(texts)
    text_bytes = sum(len(text.encode()) for text in texts) / len(texts)
    dtype = options.dtype if options else "float16"
    shard = int(min(shard_rows, total) * (2 * text_bytes + encoder.dimension * (4 + DTYPE_BYTES[dtype])))
    shards = total * encoder.dimension * DTYPE_BYTES[dtype]
    encoding = Estimate(
        peak_ram=encoder.weight_bytes + shard,
        serving_ram=encoder.weight_bytes,
        work_disk=shards,
        final_disk=0,
        seconds=total / rate,
        notes=(f"encoding at {rate:,.0f} passages a second, measured on {min(len(texts), total)} of them",),
    )
    return encoding.then(estimate_index(total, encoder.dimension, options)) if options else encoding


def estimate_index(total: int, dimension: int, options: FaissOptions) -> Estimate:
    """Estimate building one kind of index over vectors that are there. Index bytes are exact, seconds are rough."""
    size = index_bytes(total, dimension, options)
    seconds = size / _DISK_BYTES_PER_SECOND
    # Vectors on their way from shards into the index, as stored and as float32.
    peak = ADD_ROWS * dimension * 8
    notes: tuple[str, ...] = ()
    if options.kind == "ivf":
        lists = options.lists(total)
        training = min(total, lists * TRAINING_PER_LIST)
        peak += size + 4 * total + 2 * training * dimension * 4
        products = _KMEANS_ITERATIONS * training * lists + total * lists
        seconds += 2 * products * dimension / _product_rate(dimension)
        notes = (f"{lists:,} lists found from {training:,} vectors",)
    elif options.kind == "hnsw":
        peak += size
        threads = options.build_threads or 1
        seconds += _graph_seconds(total, dimension, options) / min(threads, os.cpu_count() or 1)
        notes = (
            f"the graph is built by {counted(threads, 'thread')}"
            + (", so that it can be built again byte for byte" if threads == 1 else ", and no two builds are equal"),
        )
    # Every search reads all of a flat index, and jumps about in the others: none of them serves well from a disk.
    return Estimate(int(peak), size, 0, size, seconds, notes)


def index_bytes(total: int, dimension: int, options: FaissOptions) -> int:
    """What an index takes on disk and in memory, its header of some hundred bytes left out."""
    vectors = total * dimension * DTYPE_BYTES[options.dtype]
    if options.kind == "ivf":
        return vectors + total * _ID_BYTES + options.lists(total) * (dimension * 4 + 8)
    if options.kind == "hnsw":
        # 2 M links on the ground level; each level above has one in M of the nodes, with M links; level and offset.
        links = 2 * options.m + options.m / (options.m - 1)
        return vectors + int(total * (4 * links + 4 + 8))
    return vectors


def _product_rate(dimension: int) -> float:
    """Floating point operations a second of a matrix product on this machine."""
    import numpy as np

    left = np.ones((1024, dimension), dtype=np.float32)
    right = np.ones((dimension, 4096), dtype=np.float32)
    left @ right
    start = time.perf_counter()
    left @ right
    return 2 * 1024 * 4096 * dimension / (time.perf_counter() - start)


def _graph_seconds(total: int, dimension: int, options: FaissOptions) -> float:
    """One thread's time for a graph, from timing a small one of random vectors, which takes longer than real ones."""
    import numpy as np

    faiss = import_faiss()
    trial = np.random.default_rng(0).standard_normal((_TRIAL_ROWS, dimension), dtype=np.float32)
    halves = faiss.ScalarQuantizer.QT_fp16
    graph = faiss.IndexHNSWSQ(dimension, halves, options.m, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = options.ef_construction
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        graph.add(trial[: _TRIAL_ROWS // 2])
        start = time.perf_counter()
        graph.add(trial[_TRIAL_ROWS // 2 :])
        each = (time.perf_counter() - start) / (_TRIAL_ROWS // 2)
    finally:
        faiss.omp_set_num_threads(before)
    # The time to add one vector to n others, as measured up to 100,000, grows with n^0.45; beyond with the logarithm.
    small = min(total, _GRAPH_TURN)
    each *= (small / (0.75 * _TRIAL_ROWS)) ** _GRAPH_POWER
    beyond = each * (total - small) * math.log(total) / math.log(_GRAPH_TURN)
    return each * small / (1 + _GRAPH_POWER) + beyond
