"""MaxSim by an exact scan: every query token meets every passage token.

The score of a passage is the sum, over the query's tokens, of the largest inner product with any of its tokens
(Khattab and Zaharia, ColBERT, arXiv 2004.12832, equation 3).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.torch_index import merge_best, to_device, top_columns

if TYPE_CHECKING:
    import numpy as np

# Products of a block and a group of queries take their tokens' numbers x 4 bytes: 64 MiB. Blocks do not depend on what
# is asked, so that neither do scores.
BLOCK_TOKENS = 16_384
GROUP_TOKENS = 1_024


class MaxSimIndex:
    """Exact MaxSim over all passages, equal scores ordered by row. Safe to share between threads.

    Args:
        vectors: (tokens, dimension) float16, also a memory map: on the CPU it is searched in place.
        offsets: (passages + 1,) int64, rising: where each passage begins among them.
        device: torch device that searches, and holds the vectors.
        block_tokens, group_tokens: passage tokens and query tokens at a time; one passage or query at least.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        offsets: np.ndarray,
        device: str = "cpu",
        block_tokens: int = BLOCK_TOKENS,
        group_tokens: int = GROUP_TOKENS,
    ) -> None:
        import torch

        self.dimension = vectors.shape[1]
        self.device = device
        self._offsets = offsets
        self._lengths = torch.from_numpy(offsets[1:] - offsets[:-1]).to(device)
        self._blocks = list(_runs((offsets[1:] - offsets[:-1]).tolist(), block_tokens))
        self._group_tokens = group_tokens
        self._vectors = to_device(vectors, device, torch.float16, block_tokens)
        # Two searches at once would double the memory for products and be no faster.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def description(self) -> str:
        return f"MaxSim (float16 on {self.device})"

    def search(self, queries: Sequence[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), float32 and int64 of shape (n, min(top_k, passages)), best first.

        queries: n arrays (tokens, dimension), one token each at least.

        Raises:
            RetrievalError: for vectors of another dimension, or a query without any.
        """
        import numpy as np
        import torch

        if any(query.ndim != 2 or query.shape[1] != self.dimension or not len(query) for query in queries):
            shapes = [query.shape for query in queries if query.ndim != 2 or query.shape[1] != self.dimension]
            raise RetrievalError(
                f"a query's vectors have the shape {shapes[0] if shapes else (0, self.dimension)}, and the index has "
                f"{self.dimension} dimensions: the encoder is not the one that built it"
            )
        count = min(top_k, len(self))
        scores = torch.empty((len(queries), 0))
        rows = torch.empty((len(queries), 0), dtype=torch.int64)
        groups = [
            (
                torch.from_numpy(np.concatenate(queries[first:last]).astype(np.float32)).to(self.device),
                torch.tensor([len(query) for query in queries[first:last]], device=self.device),
            )
            for first, last in _runs([len(query) for query in queries], self._group_tokens)
        ]
        with self._lock, torch.inference_mode():
            for first, last in self._blocks:
                found = self._scores(groups, first, last)
                best, columns = top_columns(found, min(count, last - first))
                scores = torch.cat([scores, best.cpu()], dim=1)
                rows = torch.cat([rows, columns.cpu() + first], dim=1)
                scores, rows = merge_best(scores, rows, min(count, scores.shape[1]))
        return scores.numpy(), rows.numpy()

    def _scores(self, groups, first: int, last: int):
        """MaxSim of all queries with the passages of a block: (n, last - first)."""
        import torch

        block = self._vectors[int(self._offsets[first]) : int(self._offsets[last])].float()
        lengths = self._lengths[first:last]
        parts = []
        for tokens, of_queries in groups:
            largest = torch.segment_reduce(block @ tokens.T, "max", lengths=lengths, axis=0)  # (passages, tokens)
            parts.append(torch.segment_reduce(largest.T.contiguous(), "sum", lengths=of_queries, axis=0))
        return torch.cat(parts)


def _runs(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence into runs of `most` tokens at most, or of one entry that is longer: first and end of each."""
    first = held = 0
    for place, length in enumerate(lengths):
        if place > first and held + length > most:
            yield first, place
            first, held = place, 0
        held += length
    if lengths:
        yield first, len(lengths)
