"""FAISS indexes of vectors by inner product: exact, inverted lists, graphs; on the CPU, or exact on GPUs."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encode_corpus import VectorShards
from rex_rag.retrieval.dense.flat_file import check_vectors, import_faiss, map_flat, write_flat
from rex_rag.retrieval.indexed import NO_ROW
from rex_rag.support.durable import written_whole
from rex_rag.support.progress_bars import progress_bar
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

KINDS = ("flat", "flat-fp16", "ivf", "hnsw")
# FAISS's guidelines for the number of inverted lists below a million vectors: 4 to 16 times the root of their number
# (wiki, "Guidelines to choose an index"). Above, they advise more lists, found on a GPU; here it stays the lower end.
NLIST_PER_ROOT = 4
# The same guidelines ask for 30 to 256 training vectors a list; FAISS itself warns below 39.
TRAINING_PER_LIST = 64
MIN_TRAINING_PER_LIST = 39
# A sixteenth of the lists, but of short ones at least this many: what it loses is measured in docs/retrieval.md.
NPROBE_SHARE = 16
MIN_NPROBE = 64
# Malkov and Yashunin, arXiv 1603.09320, section 4: M from 5 to 48, larger for high dimension and recall.
HNSW_M = 32
HNSW_EF_CONSTRUCTION = 200
HNSW_EF_SEARCH = 128
# The largest top_k of FAISS on GPUs.
MAX_GPU_TOP_K = 2048
# Rows handed to FAISS at a time, so that a graph does not depend on the size of shards.
ADD_ROWS = 16_384


@dataclass(frozen=True)
class FaissOptions:
    """Kind and parameters of an index. Plain data: `dataclasses.asdict` and back.

    Args:
        kind: `flat` (exact, float32), `flat-fp16` (exact over halves), `ivf` (inverted lists), `hnsw` (graph).
        storage: how ivf and hnsw keep vectors, float16 or float32; halves lose nothing that can be measured.
        nlist, nprobe: lists of an ivf index, and how many a search reads; by default from the number of vectors.
        m, ef_construction, ef_search: links a node of an hnsw graph, and candidates while building and searching.
        seed: of the sample that finds ivf's lists.
        build_threads: by default one for hnsw and all cores otherwise. FAISS builds a graph that depends on timing
            when it has several threads: faster, as good, but no two builds are equal.

    Raises:
        RetrievalError: for values out of range.
    """

    kind: str = "flat"
    storage: str = "float16"
    nlist: int | None = None
    nprobe: int | None = None
    m: int = HNSW_M
    ef_construction: int = HNSW_EF_CONSTRUCTION
    ef_search: int = HNSW_EF_SEARCH
    seed: int = 0
    build_threads: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RetrievalError(f"there is no index kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.storage not in ("float16", "float32"):
            raise RetrievalError(f"storage={self.storage!r} is neither float16 nor float32")
        for name in ("nlist", "nprobe", "m", "ef_construction", "ef_search", "build_threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RetrievalError(f"{name}={value!r}; it must be an integer of at least 1")
        if self.m < 2:
            raise RetrievalError(f"m={self.m} links make no graph; use 2 or more, {HNSW_M} by default")
        if self.nlist is not None and self.nprobe is not None and self.nprobe > self.nlist:
            raise RetrievalError(f"nprobe={self.nprobe} is more than the nlist={self.nlist} lists; lower it")

    @property
    def dtype(self) -> str:
        """The number format that vectors have in the index, and so the best one for shards: float32 or float16."""
        return {"flat": "float32", "flat-fp16": "float16"}.get(self.kind, self.storage)

    def lists(self, total: int) -> int:
        """The number of inverted lists over `total` vectors; never so many that they could not be trained."""
        wanted = self.nlist or round(NLIST_PER_ROOT * math.sqrt(total))
        return max(1, min(wanted, total // MIN_TRAINING_PER_LIST))

    def probes(self, total: int) -> int:
        """The number of lists a search reads."""
        return _probes(self.nprobe, self.lists(total))


def check_lists(options: FaissOptions, total: int) -> None:
    """Raise `RetrievalError` for more lists than `total` vectors can train; fewer are never taken in their place."""
    lists = options.lists(total)
    if options.nlist is not None and lists < options.nlist:
        raise RetrievalError(
            f"nlist={options.nlist} lists need {options.nlist * MIN_TRAINING_PER_LIST:,} vectors "
            f"({MIN_TRAINING_PER_LIST} a list), and there are {total:,}; use at most nlist={lists}, or a flat index"
        )


def build_faiss_index(vectors: VectorShards, path: str | Path, options: FaissOptions) -> None:
    """Build an index over all vectors and write it to `path`, whole or not at all; equal inputs give equal bytes.

    Memory: for flat and flat-fp16 one shard, for ivf and hnsw the index and one shard. A killed build starts over.

    Raises:
        RetrievalError: without FAISS, and for more lists than the vectors can train.
    """
    faiss = import_faiss()
    path = Path(path)
    if options.kind in ("flat", "flat-fp16"):
        write_flat(vectors, path, options.dtype)
        return
    threads = options.build_threads or (1 if options.kind == "hnsw" else faiss.omp_get_max_threads())
    with _threads(threads):
        index = _filled_ivf(vectors, options) if options.kind == "ivf" else _filled_hnsw(vectors, options)
    with written_whole(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


class FaissIndex:
    """A FAISS index, ready to search. Safe to share between threads on the CPU, and behind a lock on GPUs.

    Args:
        path: a file that `build_faiss_index` wrote.
        options: those it was built with; `nprobe` and `ef_search` may differ.
        gpus: GPU numbers that share an exact index, its vectors in halves; `None` for the CPU, which maps the file.

    Raises:
        RetrievalError: for a missing, damaged or different index, and for GPUs that are not there.
    """

    def __init__(self, path: str | Path, options: FaissOptions, gpus: Sequence[int] | None = None) -> None:
        faiss = import_faiss()
        self.options = options
        if gpus is not None:
            codes = map_flat(path)
            self._index = _on_gpus(codes, list(gpus))
            self._size, self._dimension = codes.shape
            where = f" on {counted(len(gpus), 'GPU')}"
        else:
            self._index = _read(Path(path))
            self._size, self._dimension = self._index.ntotal, self._index.d
            where = ""
            _check_kind(self._index, options, path)
        self._parameters = None
        settings = ""
        if options.kind == "ivf":
            lists = self._index.nlist
            probes = _probes(options.nprobe, lists)
            self._parameters = faiss.SearchParametersIVF(nprobe=probes)
            settings = f" ({probes} of {counted(lists, 'list')}, {options.storage})"
        elif options.kind == "hnsw":
            settings = f" (M={options.m}, efSearch={options.ef_search}, {options.storage})"
        self._max_top_k = MAX_GPU_TOP_K if gpus is not None else None
        self._lock = threading.Lock() if gpus is not None else contextlib.nullcontext()
        self._description = f"FAISS {options.kind}{settings}{where}"

    @property
    def description(self) -> str:
        return self._description

    @property
    def dimension(self) -> int:
        return self._dimension

    def __len__(self) -> int:
        return self._size

    def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), float32 and int64 of shape (n, min(top_k, size)), best first.

        vectors: (n, dimension). `NO_ROW` and a score of -inf fill what an approximate index could not.

        Raises:
            RetrievalError: for vectors of another dimension, and a `top_k` that the index cannot give.
        """
        import numpy as np

        vectors = check_vectors(vectors, self._dimension)
        count = min(top_k, self._size)
        if self._max_top_k is not None and count > self._max_top_k:
            raise RetrievalError(f"top_k={top_k} is more than the {self._max_top_k} that FAISS gives on GPUs")
        with self._lock:
            scores, rows = self._index.search(vectors, count, params=self._search_parameters(count))
        scores[rows == NO_ROW] = -np.inf
        return scores, rows.astype(np.int64, copy=False)

    def _search_parameters(self, count: int):
        if self.options.kind != "hnsw":
            return self._parameters
        # A graph search returns at most as many rows as it keeps candidates.
        return import_faiss().SearchParametersHNSW(efSearch=max(self.options.ef_search, count))


def _probes(asked: int | None, lists: int) -> int:
    return min(asked or max(MIN_NPROBE, math.ceil(lists / NPROBE_SHARE)), lists)


def _filled_ivf(vectors: VectorShards, options: FaissOptions):
    """An inverted-list index whose lists are found from a seeded sample, with room for every vector and no more."""
    import numpy as np

    faiss = import_faiss()
    total, dimension, lists = len(vectors), vectors.dimension, options.lists(len(vectors))
    check_lists(options, total)
    quantizer = faiss.IndexFlatIP(dimension)
    if options.storage == "float16":
        # Codes are the halves themselves, not residuals: the scores are those of flat-fp16.
        halves = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(quantizer, dimension, lists, halves, faiss.METRIC_INNER_PRODUCT, False)
    else:
        index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = options.seed + 1  # k-means takes 0 for a seed of the clock's
    wanted = min(total, lists * TRAINING_PER_LIST)
    rows = np.sort(np.random.default_rng(options.seed).choice(total, size=wanted, replace=False))
    logger.info("looking for %d lists in a sample of %d vectors", lists, wanted)
    index.train(vectors.take(rows))
    assigned = np.empty(total, dtype=np.int32)
    with progress_bar(total, "Choosing lists", unit="vectors") as bar:
        for start, block in _blocks(vectors):
            assigned[start : start + len(block)] = quantizer.search(block, 1)[1][:, 0]
            bar.update(len(block))
    # A list that grows by doubling may take twice its room; sized once, the index takes what it needs.
    inverted = faiss.downcast_InvertedLists(index.invlists)
    for number, count in enumerate(np.bincount(assigned, minlength=lists)):
        inverted.resize(number, int(count))
        inverted.resize(number, 0)
    with progress_bar(total, "Filling lists", unit="vectors") as bar:
        for start, block in _blocks(vectors):
            chosen = assigned[start : start + len(block)].astype(np.int64)
            index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(chosen))
            bar.update(len(block))
    return index


def _filled_hnsw(vectors: VectorShards, options: FaissOptions):
    faiss = import_faiss()
    if options.storage == "float16":
        halves = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexHNSWSQ(vectors.dimension, halves, options.m, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexHNSWFlat(vectors.dimension, options.m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction
    # As for lists: memory set aside once instead of doubled whenever it is full. Each level above the ground has one
    # in M of the nodes.
    storage = faiss.downcast_index(index.storage)
    links = 2 * options.m + options.m / (options.m - 1)
    for array, size in ((storage.codes, storage.code_size), (index.hnsw.neighbors, 1.01 * links)):
        array.resize(int(size * len(vectors)))
        array.resize(0)
    with progress_bar(len(vectors), "Building the graph", unit="vectors") as bar:
        for _, block in _blocks(vectors):
            index.add(block)
            bar.update(len(block))
    return index


def _blocks(vectors: VectorShards) -> Iterator[tuple[int, np.ndarray]]:
    """First row and float32 vectors of runs of `ADD_ROWS` rows."""
    import numpy as np

    for start in range(0, len(vectors), ADD_ROWS):
        yield start, vectors.take(np.arange(start, min(start + ADD_ROWS, len(vectors))))


def _read(path: Path):
    faiss = import_faiss()
    if not path.is_file():
        raise RetrievalError(f"{path} is missing; build the index again")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RetrievalError(f"{path} is no index that FAISS reads ({reason}); build it again") from error


def _check_kind(index, options: FaissOptions, path: str | Path) -> None:
    names = {
        ("flat", "float32"): "IndexFlatIP",
        ("flat-fp16", "float16"): "IndexScalarQuantizer",
        ("ivf", "float16"): "IndexIVFScalarQuantizer",
        ("ivf", "float32"): "IndexIVFFlat",
        ("hnsw", "float16"): "IndexHNSWSQ",
        ("hnsw", "float32"): "IndexHNSWFlat",
    }
    expected = names[options.kind, options.dtype]
    found = type(index).__name__
    if found != expected or index.metric_type != import_faiss().METRIC_INNER_PRODUCT:
        raise RetrievalError(
            f"{path} holds a FAISS {found} of metric {index.metric_type}, not the {expected} by inner product that "
            f"the options {options.kind}, {options.dtype} stand for; build the index again"
        )


def _on_gpus(codes: np.ndarray, gpus: list[int]):
    """An exact index in halves over several GPUs: each holds a run of rows, copied block by block from the file."""
    import numpy as np

    faiss = import_faiss()
    there = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if not gpus or not set(gpus) <= set(range(there)) or len(set(gpus)) < len(gpus):
        raise RetrievalError(
            f"FAISS was to use the GPUs {gpus}, and sees {there}: install faiss-gpu in place of faiss-cpu and check "
            "CUDA_VISIBLE_DEVICES, name each GPU once, take the torch engine, or serve from the CPU without --gpus"
        )
    borders = np.linspace(0, len(codes), len(gpus) + 1).astype(np.int64)
    shards = faiss.IndexShards(codes.shape[1], True, True)
    for gpu, first, last in zip(gpus, borders[:-1], borders[1:], strict=True):
        resources = faiss.StandardGpuResources()
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        part = faiss.GpuIndexFlatIP(resources, codes.shape[1], config)
        for start in range(int(first), int(last), ADD_ROWS):
            part.add(np.ascontiguousarray(codes[start : min(start + ADD_ROWS, int(last))], dtype=np.float32))
        part.referenced_objects = [resources]
        shards.add_shard(part)
    return shards


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
