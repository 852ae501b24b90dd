"""Vectors of exact indexes as files: FAISS's own format, written row by row from shards and mapped without FAISS.

The format of a flat index is a short header, ending in the number of codes, and the codes: the vectors themselves, row
after row. So writing one takes no memory, however large it is, and any engine can read the codes in place.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encode_corpus import VectorShards
from rex_rag.support.durable import written_whole
from rex_rag.support.progress_bars import progress_bar

if TYPE_CHECKING:
    import numpy as np

# FAISS's four-letter codes of IndexFlatIP and IndexScalarQuantizer, and how their codes read as numbers.
_CODES = {b"IxFI": "<f4", b"IxSQ": "<f2"}
_HEAD = struct.Struct("<4siq")  # code, dimension, number of vectors
_COUNT = struct.Struct("<Q")
_LONGEST_HEADER = 256


def write_flat(vectors: VectorShards, path: str | Path, dtype: str) -> None:
    """Write a FAISS flat inner-product index (`dtype` float32) or its half-precision twin (float16).

    Memory: one shard. The file appears whole or not at all.
    """
    import numpy as np

    faiss = import_faiss()
    if dtype == "float32":
        like = faiss.IndexFlatIP(vectors.dimension)
    else:
        halves = faiss.ScalarQuantizer.QT_fp16
        like = faiss.IndexScalarQuantizer(vectors.dimension, halves, faiss.METRIC_INNER_PRODUCT)
    like.add(np.ones((1, vectors.dimension), dtype=np.float32))
    one = faiss.serialize_index(like).tobytes()
    width = np.dtype(dtype).itemsize * vectors.dimension
    header = one[:-width]
    # FAISS counts float32 codes in numbers and others in bytes; one row says which.
    per_row = _COUNT.unpack(header[-_COUNT.size :])[0]
    code, dimension, _ = _HEAD.unpack(header[: _HEAD.size])
    header = _HEAD.pack(code, dimension, len(vectors)) + header[_HEAD.size : -_COUNT.size]
    header += _COUNT.pack(per_row * len(vectors))
    with written_whole(Path(path)) as file, progress_bar(len(vectors), "Writing the index", unit="vectors") as bar:
        file.write(header)
        for shard in vectors:
            file.write(np.ascontiguousarray(shard, dtype=dtype).tobytes())
            bar.update(len(shard))


def map_flat(path: str | Path) -> np.ndarray:
    """The vectors of a flat or flat-fp16 index file, memory-mapped: (n, dimension), float32 or float16.

    Raises:
        RetrievalError: for a file that is neither.
    """
    import numpy as np

    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    with path.open("rb") if size else _absent(path) as file:
        head = file.read(_LONGEST_HEADER)
    code, dimension, count = _HEAD.unpack(head[: _HEAD.size]) if len(head) >= _HEAD.size else (b"", 0, 0)
    if code not in _CODES:
        raise RetrievalError(
            f"{path} is no flat or flat-fp16 index (it begins with {code!r}); only those can be searched by matrix "
            "products: build with index flat or flat-fp16"
        )
    dtype = np.dtype(_CODES[code])
    offset = size - count * dimension * dtype.itemsize
    # FAISS counts float32 codes in numbers and others in bytes; the count stands right before them.
    codes = count * dimension * (1 if dtype == np.float32 else dtype.itemsize)
    if count < 1 or dimension < 1 or head[max(0, offset - _COUNT.size) : max(0, offset)] != _COUNT.pack(codes):
        raise RetrievalError(
            f"{path} has {size:,} bytes, which do not fit {count:,} vectors of {dimension} x {dtype.name}: it was cut "
            "short, or its codes are of another kind; build the index again"
        )
    # Copy on write: torch warns of arrays that it could not write to, though nothing ever does.
    return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=(count, dimension))


def check_vectors(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Query vectors as contiguous float32 (n, dimension).

    Raises:
        RetrievalError: for any other shape.
    """
    import numpy as np

    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise RetrievalError(
            f"query vectors have the shape {vectors.shape}, the index has {dimension} dimensions: the encoder is not "
            "the one that built it"
        )
    return vectors


def import_faiss():
    """The faiss module, or an error that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise RetrievalError(
            'dense indexes need FAISS: pip install "rex-rag[cpu]", or "rex-rag[gpu]" on a machine with GPUs'
        ) from error
    return faiss


def _absent(path: Path):
    raise RetrievalError(f"{path} is missing or empty; build the index again")
