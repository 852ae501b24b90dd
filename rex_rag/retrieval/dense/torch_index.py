"""Exact search by matrix products in torch: any GPU, or the CPU, without FAISS."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.flat_file import check_vectors, map_flat

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float32", "float16", "bfloat16")
# Scores of a chunk take queries x rows x 4 bytes: 64 MiB for 256 queries.
CHUNK_ROWS = 65_536


class TorchFlatIndex:
    """Exact inner products over all rows, equal scores ordered by row. Safe to share between threads.

    Each device holds a run of rows; the best of each are merged. Products are accumulated in float32.

    Args:
        vectors: (n, dimension), float32 or float16, also a memory map: on the CPU it is searched in place.
        devices: torch devices that share the rows; by default all GPUs, or the CPU.
        dtype: how devices hold the vectors; by default as they come.
        chunk_rows: rows scored at a time.

    Raises:
        RetrievalError: for an empty or oddly shaped matrix, an unknown number format, a device that is not there.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        devices: Sequence[str] | None = None,
        dtype: str | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        import torch

        if vectors.ndim != 2 or 0 in vectors.shape:
            raise RetrievalError(f"an index over vectors of shape {vectors.shape} could answer nothing")
        dtype = dtype or vectors.dtype.name
        if dtype not in DTYPES:
            raise RetrievalError(f"vectors cannot be held as {dtype!r}; choose one of {', '.join(DTYPES)}")
        if chunk_rows < 1:
            raise RetrievalError(f"chunk_rows={chunk_rows}; use 1 or more")
        names = list(devices) if devices else [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
        self._size, self._dimension = vectors.shape
        self._chunk_rows = chunk_rows
        # Two searches at once would double the memory for scores and be no faster.
        self._lock = threading.Lock()
        share = -(-self._size // len(names))
        self._parts = []
        for number, name in enumerate(names):
            first, last = number * share, min((number + 1) * share, self._size)
            if first < last:
                self._parts.append((first, to_device(vectors[first:last], name, getattr(torch, dtype), chunk_rows)))
        self._description = f"torch flat ({dtype} on {', '.join(names)})"

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> TorchFlatIndex:
        """Search the vectors of a flat or flat-fp16 index file; `options` are those of the constructor."""
        return cls(map_flat(path), **options)

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

        vectors: (n, dimension).

        Raises:
            RetrievalError: for vectors of another dimension.
        """
        import torch

        queries = torch.from_numpy(check_vectors(vectors, self._dimension))
        count = min(top_k, self._size)
        with self._lock, torch.inference_mode():
            # Every device gets its work before any result is waited for.
            found = [self._search_part(first, part, queries, count) for first, part in self._parts]
            scores = torch.cat([scores.cpu() for scores, _ in found], dim=1)
            rows = torch.cat([rows.cpu() for _, rows in found], dim=1)
            scores, rows = merge_best(scores, rows, count)
        return scores.numpy(), rows.numpy()

    def _search_part(self, first: int, part, queries, count: int):
        import torch

        on_gpu = part.device.type == "cuda"
        queries = queries.to(part.device, part.dtype if on_gpu else torch.float32)
        scores = torch.empty((len(queries), 0), dtype=torch.float32, device=part.device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=part.device)
        for start in range(0, len(part), self._chunk_rows):
            chunk = part[start : start + self._chunk_rows]
            if on_gpu and chunk.dtype != torch.float32:
                products = torch.mm(queries, chunk.T, out_dtype=torch.float32)
            else:
                # CPUs multiply halves slowly or not at all, so they are widened there, a chunk at a time.
                products = queries @ chunk.float().T
            here = torch.arange(first + start, first + start + len(chunk), device=part.device)
            best, places = top_columns(products, min(count, len(chunk)))
            scores = torch.cat([scores, best], dim=1)
            rows = torch.cat([rows, here[places]], dim=1)
            scores, rows = merge_best(scores, rows, min(count, scores.shape[1]))
        return scores, rows


def to_device(vectors: np.ndarray, device: str, dtype, chunk_rows: int):
    """Rows as a tensor on a device, copied chunk by chunk, so that the host never holds them all."""
    import numpy as np
    import torch

    if device == "cpu" and torch.from_numpy(vectors[:1]).dtype == dtype:
        return torch.from_numpy(vectors)
    try:
        held = torch.empty(vectors.shape, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RetrievalError(
            f"{len(vectors):,} vectors of {vectors.shape[1]} x {dtype} do not go onto {device}: "
            f"{str(error).splitlines()[0]}; use more GPUs, float16, or the CPU"
        ) from error
    for start in range(0, len(vectors), chunk_rows):
        block = torch.from_numpy(np.ascontiguousarray(vectors[start : start + chunk_rows]))
        held[start : start + len(block)] = block.to(device).to(dtype)
    return held


def top_columns(scores, count: int):
    """The `count` best columns of each row; of columns with the score of the last, the first ones.

    Columns come in any order. scores: (n, columns); returns scores and columns of shape (n, count).
    """
    import torch

    best, columns = scores.topk(count, dim=1, sorted=True)
    if count == scores.shape[1]:
        return best, columns
    last = best[:, -1:]
    # topk chooses among equal scores as it likes: where it had a choice, choose again by row.
    for query in torch.nonzero((scores == last).sum(1) > (best == last).sum(1)).flatten().tolist():
        above = columns[query][best[query] > last[query]]
        level = torch.nonzero(scores[query] == last[query]).flatten()[: count - len(above)]
        columns[query] = torch.cat([above, level])
        best[query] = scores[query][columns[query]]
    return best, columns


def merge_best(scores, rows, count: int):
    """Order candidates by falling score, equal scores by row, and keep `count`. scores, rows: (n, candidates)."""
    order = rows.argsort(dim=1)
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return scores.gather(1, order), rows.gather(1, order)
