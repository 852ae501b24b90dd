"""Search over a passage store in three stages, so that a server can time them, overlap them and batch them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import Retriever, check_request, check_texts, checked_search
from rex_rag.retrieval.passages import PassageSource
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

    from rex_rag.retrieval.held import HeldFiles

# What fills a ranking that an approximate index could not fill.
NO_ROW = -1


class IndexedRetriever(Retriever):
    """A retriever over `passages` whose search is fetch(rank(encode(queries))). Safe to share between threads.

    The stages answer queries independently: a batch gives what its queries give one by one (up to rounding in an
    encoder), so a server may merge and split batches as it likes.
    """

    # The files of an index directory, watched; None of a corpus in memory.
    held: HeldFiles | None = None

    def __init__(self, passages: PassageSource, description: str) -> None:
        self.passages = passages
        self._description = description

    @property
    def description(self) -> str:
        return self._description

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def passage_count(self) -> int:  # type: ignore[override]
        return len(self)

    @property
    def stages(self) -> IndexedRetriever:  # type: ignore[override]
        return self

    @abstractmethod
    def encode(self, queries: Sequence[str]) -> Any:
        """Turn n checked queries into what `rank` takes: token ids, or an array (n, dimension)."""

    @abstractmethod
    def rank(self, encoded: Any, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), float32 and int64 of shape (n, min(top_k, corpus size)), best first.

        Higher scores are better whatever the index. `NO_ROW` fills the end of a ranking that could not be filled.
        """

    def fetch(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Passage]]:
        """Read the ranked passages, their scores attached."""
        return [
            [self._scored(int(row), float(score)) for score, row in zip(*ranking, strict=True) if row != NO_ROW]
            for ranking in zip(scores, rows, strict=True)
        ]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return at most `min(top_k, corpus size)` passages a query, best first.

        Raises:
            RetrievalError: for a `top_k` below 1; for files that were damaged, or written into since they were opened.
        """
        check_request(queries, top_k)
        if not queries:
            return []
        with self.watched():
            return self.fetch(*self.rank(self.encode(queries), top_k))

    def check(self) -> None:
        """Search for the first passage's own words, and find something."""
        first = self.passages[0]
        checked_search(self, [first.title.strip() or first.text.strip()[:200]], top_k=1)

    def warm_up(self) -> None:
        """The first search of an index reads its pages and compiles what compiles."""
        self.check()

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        """See `Retriever.read`; of a long document its first `MAX_DOCUMENT_PASSAGES` passages."""
        check_texts(keys, "keys", "key")
        with self.watched():
            return [[self.passages[row] for row in self.passages.find(key)] for key in keys]

    def watched(self) -> AbstractContextManager[None]:
        """Around what reads the index: what was changed underneath, before or meanwhile, is an error and no answer."""
        return nullcontext() if self.held is None else self.held.watched()

    def _scored(self, row: int, score: float) -> Passage:
        passage = self.passages[row]
        return Passage(id=passage.id, title=passage.title, text=passage.text, score=score)
