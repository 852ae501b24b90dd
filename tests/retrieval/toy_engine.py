"""An index whose right answers are known by heart, and which can hang, fail and count."""

from __future__ import annotations

import threading
import time

import numpy as np

from rex_rag.retrieval.indexed import NO_ROW, IndexedRetriever
from rex_rag.retrieval.passages import PassageList
from rex_rag.types import Passage

SCORES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # exact in float32


class ToyRetriever(IndexedRetriever):
    """The query "7", or "7 and more words", finds passages 7, 8, 9, …, scored 1, 0.5, 0.25, …; at most five.

    Queries with the words `broken-encode` and `broken-rank` raise in that stage, `nothing` finds nothing, `nan` scores
    so, `short` finds one passage and filler. Searches wait until `gate` is open; `ranked` holds the batches searched.
    """

    def __init__(self, size: int = 1000, seconds: float = 0.0) -> None:
        passages = [Passage(f"p{row}", f"Title {row}", f"Text of {row}, naïve “quotes”") for row in range(size)]
        super().__init__(PassageList(passages), f"toy index of {size} passages")
        self.gate = threading.Event()
        self.gate.set()
        self.seconds = seconds
        self.encoded: list[list[str]] = []
        self.ranked: list[list[str]] = []
        self.top_ks: list[int] = []
        self.miscount = False

    def encode(self, queries):
        self.encoded.append(list(queries))
        for query in queries:
            if "broken-encode" in query:
                raise ValueError(f"cannot encode {query}")
        return list(queries)

    def rank(self, encoded, top_k):
        self.ranked.append(list(encoded))
        self.top_ks.append(top_k)
        if not self.gate.wait(timeout=30):
            raise TimeoutError("the test never opened the gate")
        time.sleep(self.seconds)
        for query in encoded:
            if "broken-rank" in query:
                raise IndexError(f"cannot rank {query}")
        count = min(top_k, len(self), len(SCORES))
        rows = np.array([[(number(query) + rank) % len(self) for rank in range(count)] for query in encoded])
        scores = np.tile(np.asarray(SCORES[:count], np.float32), (len(encoded), 1))
        for place, query in enumerate(encoded):
            if "nothing" in query:
                rows[place], scores[place] = NO_ROW, -np.inf
            if "short" in query:
                rows[place, 1:], scores[place, 1:] = NO_ROW, -np.inf
            if "nan" in query:
                scores[place, 0] = np.nan
        return (scores[:-1], rows[:-1]) if self.miscount else (scores, rows)

    def check(self):
        """No search, so that tests see their own alone."""


def number(query: str) -> int:
    first = (query.split() or [""])[0]
    return int(first) if first.isdigit() else 0


def expected(query: str, top_k: int, size: int = 1000) -> list[dict]:
    """What the server must answer to one query, scores included."""
    return [
        {
            "document": {
                "id": f"p{row}",
                "contents": f'"Title {row}"\nText of {row}, naïve “quotes”',
            },
            "score": SCORES[rank],
        }
        for rank, row in enumerate((number(query) + rank) % size for rank in range(min(top_k, len(SCORES))))
    ]
