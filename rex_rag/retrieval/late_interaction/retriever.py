"""Late interaction: an encoder of tokens, MaxSim over the token vectors of the passages, and the passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.late_interaction.maxsim import MaxSimIndex
from rex_rag.retrieval.late_interaction.token_encoder import TokenEncoder
from rex_rag.retrieval.passages import PassageSource

if TYPE_CHECKING:
    import numpy as np


class LateInteractionRetriever(IndexedRetriever):
    """Ranks passages by MaxSim of query and passage tokens. Safe to share between threads.

    Passage i of `index` is `passages[i]`.
    """

    def __init__(self, encoder: TokenEncoder, index: MaxSimIndex, passages: PassageSource, description: str) -> None:
        super().__init__(passages, description)
        self.encoder = encoder
        self.index = index

    def encode(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return n arrays (tokens, dimension) float32."""
        return self.encoder.encode_queries(queries)

    def rank(self, encoded: Sequence[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(encoded, top_k)
