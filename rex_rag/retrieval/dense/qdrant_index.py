"""Vectors in Qdrant: a cluster by URL for corpora beyond one machine, or its embedded mode in this process.

Invariants: a point's id is its passage's row; a collection carries the fingerprint of what it was loaded from, and
neither loading into it nor searching it works under another one, which is asked for again after every trouble and from
time to time; a collection counts as complete only after every row was counted in it. Passages are not in Qdrant: they
stay in the `PassageStore` of the index directory.

The embedded mode lives in memory only and is filled again from vectors at each start: its own on-disk format is
pickled, and unpickling a file runs whatever code is in it. It searches exactly, in Python: for tests and small
corpora.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.qdrant_calls import (
    QdrantCalls,
    connect_qdrant,
    full_fingerprint,
    is_complete,
    is_embedded,
)
from rex_rag.retrieval.dense.qdrant_load import load_qdrant
from rex_rag.retrieval.indexed import NO_ROW

if TYPE_CHECKING:
    import numpy as np
    from qdrant_client import QdrantClient

QUERIES_PER_REQUEST = 64
# How often a collection that answers is asked what it is made of; after each trouble it is too.
SECONDS_BETWEEN_CHECKS = 10.0


class QdrantIndex:
    """A `VectorIndex` over a complete collection. Safe to share between threads.

    Args:
        client: of the cluster that holds `collection`.
        fingerprint: as given to `load_qdrant`.
        exact: compare with every vector instead of walking the graph.
        ef: candidates that a walk keeps, at least top_k: more finds more and takes longer. 128 is Qdrant's own
            choice for top_k up to 128.
        oversampling: with int8 vectors, how many times top_k are re-scored with full vectors, >= 1.

    Raises:
        RetrievalError: for a collection that is absent, incomplete or made from something else.
    """

    def __init__(
        self,
        client: QdrantClient,
        collection: str,
        rows: int,
        dimension: int,
        fingerprint: Mapping[str, Any],
        exact: bool = False,
        ef: int = 128,
        oversampling: float = 2.0,
        max_attempts: int = 5,
        backoff: float = 0.5,
        address: str = "embedded",
    ) -> None:
        if ef < 1 or oversampling < 1:
            raise RetrievalError(f"ef={ef}, oversampling={oversampling}; both must be at least 1")
        self._calls = QdrantCalls(client, collection, max_attempts, backoff)
        if not self._calls(client.collection_exists, collection):
            raise RetrievalError(
                f"there is no Qdrant collection {collection!r} at {address}; load it with `rex-rag index`, or check "
                "name and address"
            )
        self._wanted = full_fingerprint(fingerprint, rows, dimension)
        self._check_collection()
        count = self._calls(client.count, collection, exact=True).count
        if count != rows:
            raise RetrievalError(
                f"the Qdrant collection {collection!r} holds {count:,} points for {rows:,} passages: points were "
                "added or lost since it was loaded; delete it and load it again"
            )
        self._rows, self._dimension = rows, dimension
        self._exact, self._ef, self._oversampling = exact, ef, oversampling
        self._embedded = is_embedded(client)
        # The embedded mode promises nothing about threads; its search is Python, which gains none from them.
        self._lock = threading.Lock()
        how = "exact" if exact or self._embedded else f"HNSW, ef={ef}"
        self._description = f"Qdrant {collection!r} at {address} ({how})"

    @classmethod
    def embedded(
        cls, blocks: Iterable[tuple[int, np.ndarray]], rows: int, dimension: int, fingerprint: Mapping[str, Any]
    ) -> QdrantIndex:
        """An index in this process, filled from `blocks` as `load_qdrant` takes them."""
        client = connect_qdrant()
        load_qdrant(blocks, client, "passages", rows, dimension, fingerprint, workers=1)
        return cls(client, "passages", rows, dimension, fingerprint, exact=True)

    @classmethod
    def connect(
        cls,
        url: str,
        collection: str,
        rows: int,
        dimension: int,
        fingerprint: Mapping[str, Any],
        timeout: float = 60.0,
        **options: Any,
    ) -> QdrantIndex:
        """An index over a collection of the cluster at `url`; `options` are those of the constructor."""
        return cls(connect_qdrant(url, timeout), collection, rows, dimension, fingerprint, address=url, **options)

    @property
    def description(self) -> str:
        return self._description

    @property
    def dimension(self) -> int:
        return self._dimension

    def __len__(self) -> int:
        return self._rows

    def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex.search`; equal scores are ordered by row, but which of them still get in is left to Qdrant.

        Raises:
            RetrievalError: once retries are spent, naming collection, attempts and last cause.
        """
        import numpy as np

        if vectors.ndim != 2 or vectors.shape[1] != self._dimension:
            raise RetrievalError(f"query vectors of shape {vectors.shape}; this index takes (n, {self._dimension})")
        width = min(top_k, self._rows)
        scores = np.full((len(vectors), width), -np.inf, dtype=np.float32)
        rows = np.full((len(vectors), width), NO_ROW, dtype=np.int64)
        for first in range(0, len(vectors), QUERIES_PER_REQUEST):
            answers = self._ask(vectors[first : first + QUERIES_PER_REQUEST], width)
            for position, answer in enumerate(answers, start=first):
                hits = sorted((-point.score, point.id) for point in answer.points)
                if any(not isinstance(row, int) or not 0 <= row < self._rows for _, row in hits):
                    raise RetrievalError(
                        f"{self._description} found a point that is no row of the {self._rows:,} passages; something "
                        "else wrote into the collection: delete it and load it again"
                    )
                if hits:
                    negated, found = zip(*hits, strict=True)
                    scores[position, : len(hits)] = -np.asarray(negated, dtype=np.float32)
                    rows[position, : len(hits)] = found
        return scores, rows

    def _check_collection(self) -> None:
        """Raise `RetrievalError` unless the collection is complete and made of what is searched for."""
        self._checked, self._seen_troubles = time.monotonic(), self._calls.troubles
        if not is_complete(self._calls, self._wanted):
            raise RetrievalError(
                f"the Qdrant collection {self._calls.collection!r} is incomplete: its load was interrupted; run the "
                "same `rex-rag index` again, it continues"
            )

    def _ask(self, vectors: np.ndarray, top_k: int) -> list[Any]:
        from qdrant_client import models

        if self._embedded:
            params = None
        elif self._exact:
            params = models.SearchParams(exact=True, quantization=models.QuantizationSearchParams(ignore=True))
        else:
            rescoring = models.QuantizationSearchParams(rescore=True, oversampling=self._oversampling)
            params = models.SearchParams(hnsw_ef=max(self._ef, top_k), quantization=rescoring)
        requests = [
            models.QueryRequest(query=vector, params=params, limit=top_k, with_payload=False, with_vector=False)
            for vector in vectors.tolist()
        ]
        if not self._embedded:
            answers = self._calls(self._calls.client.query_batch_points, self._calls.collection, requests)
        else:
            with self._lock:
                answers = self._calls(self._calls.client.query_batch_points, self._calls.collection, requests)
        # Behind the answers, so that what was exchanged before them is noticed.
        long_ago = time.monotonic() - self._checked > SECONDS_BETWEEN_CHECKS
        if not self._embedded and (long_ago or self._calls.troubles != self._seen_troubles):
            self._check_collection()
        if len(answers) != len(vectors):
            raise RetrievalError(f"{self._description} gave {len(answers)} answers to {len(vectors)} queries")
        return answers
