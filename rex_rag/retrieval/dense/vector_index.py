"""What the dense retriever knows of an index over vectors: FAISS, torch and Qdrant stand behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class VectorIndex(Protocol):
    """Inner-product search over the rows 0..n-1 of a matrix. Safe to share between threads."""

    @property
    def description(self) -> str:
        """Kind and parameters in a few words, for logs and model cards."""
        ...

    @property
    def dimension(self) -> int: ...

    def __len__(self) -> int: ...

    def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), float32 and int64 of shape (n, min(top_k, size)), best first.

        vectors: (n, dimension) float32. Scores are inner products, higher is better; `NO_ROW` (-1) fills the end of a
        ranking that an approximate index could not fill.
        """
        ...
