"""BM25 with k1 and b of one's own, by bm25s, in memory: to compare with figures that others made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.segments import check_passages
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter, passage_text
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.passages import PassageList
from rex_rag.support.wording import counted
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np


class BM25sRetriever(IndexedRetriever):
    """Ranks by the scoring of Lucene, over every passage for every query: for corpora that fit.

    Terms, order of equal scores and what a query gets that matches nothing are as in `BM25Retriever`.

    Args:
        k1, b: term frequency saturation, within 0 and 1e6, and length normalisation, within 0 and 1.

    Raises:
        RetrievalError: for an empty corpus, one without any indexable word, k1 or b out of range, or without bm25s.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        k1: float,
        b: float,
        options: BM25Options | None = None,
        description: str | None = None,
    ) -> None:
        # Above a million, scores vanish in 32-bit numbers.
        if not 0 <= k1 <= 1e6 or not 0 <= b <= 1:
            raise RetrievalError(f"BM25 with k1={k1}, b={b}: k1 must be within 0 and 1e6, b within 0 and 1")
        check_passages(passages)
        description = description or f"BM25 over {counted(len(passages), 'passage')}"
        super().__init__(PassageList(passages), f"{description} (k1={k1}, b={b})")
        self._splitter = TermSplitter(options or BM25Options())
        terms = self._splitter.terms([passage_text(passage) for passage in passages])
        if not any(terms):
            raise RetrievalError(
                f"none of the {len(passages):,} passages holds an indexable word; check the corpus, or the stop words"
            )
        self._index = _import_bm25s().BM25(k1=k1, b=b, method="lucene")
        self._index.index(terms, create_empty_token=False, show_progress=False)

    @classmethod
    def from_corpus(cls, paths: Sequence[str | Path], k1: float, b: float) -> BM25sRetriever:
        """Index corpus files.

        Raises:
            CorpusError: for a file that is missing, empty or malformed.
        """
        names = ", ".join(f"{Path(path).resolve().parent.name}/{Path(path).name}" for path in paths)
        passages = read_corpus(paths)
        return cls(passages, k1, b, description=f"BM25 over {counted(len(passages), 'passage')} of {names}")

    def encode(self, queries: Sequence[str]) -> list[list[str]]:
        """Those terms of each query that the corpus has."""
        return [[term for term in terms if term in self._index.vocab_dict] for terms in self._splitter.terms(queries)]

    def rank(self, encoded: list[list[str]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `IndexedRetriever.rank`."""
        import numpy as np

        all_scores = [self._index.get_scores(terms) if terms else np.zeros(len(self), np.float32) for terms in encoded]
        rows = np.array([np.argsort(-scores, kind="stable")[:top_k] for scores in all_scores], np.int64)
        return np.array([scores[best] for scores, best in zip(all_scores, rows, strict=True)], np.float32), rows


def _import_bm25s():
    try:
        import bm25s
    except ImportError as error:
        raise RetrievalError("bm25s is not installed: `pip install 'rex-rag[retrieval]'` brings it") from error
    # It sets its logger to DEBUG on import, so its messages would reach the root handlers whatever their level.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
