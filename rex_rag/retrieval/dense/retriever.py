"""Dense retrieval: an encoder, an index over the vectors of the passages, and the passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.checkpoints import short_name
from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.vector_index import VectorIndex
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.passages import PassageSource
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    import numpy as np


class DenseRetriever(IndexedRetriever):
    """Ranks passages by the inner product of query and passage vectors. Safe to share between threads.

    Row i of `index` is the vector of `passages[i]`.

    Raises:
        RetrievalError: for an index of another length than the passages, or of another dimension than the encoder.
    """

    def __init__(
        self, encoder: Encoder, index: VectorIndex, passages: PassageSource, description: str | None = None
    ) -> None:
        if len(index) != len(passages):
            raise RetrievalError(
                f"the index holds {counted(len(index), 'vector')} for {counted(len(passages), 'passage')}: the two "
                "were not built together; build the index again"
            )
        if index.dimension != encoder.dimension:
            raise RetrievalError(
                f"the index holds vectors of {index.dimension} dimensions, the encoder {encoder.spec.name} makes "
                f"{encoder.dimension}; load the encoder that built the index"
            )
        name = short_name(encoder.spec.name, encoder.spec.revision or "")
        super().__init__(
            passages, description or f"{name}, {index.description} over {counted(len(passages), 'passage')}"
        )
        self.encoder = encoder
        self.index = index

    def encode(self, queries: Sequence[str]) -> np.ndarray:
        """Return (n, dimension) float32."""
        return self.encoder.encode_queries(queries)

    def rank(self, encoded: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(encoded, top_k)
