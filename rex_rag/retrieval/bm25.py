"""In-process lexical retrieval: BM25 over a corpus held in memory (bm25s).

Ranking is a function of corpus and query alone: equal scores are ordered by position in the corpus. A query always
gets `min(top_k, corpus size)` passages; those that share no term with it score 0 and so follow in corpus order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.passages import PassageList
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# The defaults of bm25s 0.3 (Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", arXiv
# 2407.03618); the range recommended by Robertson and Zaragoza (2009) is k1 in 1.2..2, b in 0.5..0.8.
BM25_DEFAULT_K1 = 1.5
BM25_DEFAULT_B = 0.75
# The scoring variant of Kamphuis et al. (ECIR 2020) that Lucene implements; its idf is never negative.
BM25_METHOD = "lucene"
# Snowball's English stemmer (Porter2), and bm25s' "english" list, which is Lucene's 33 English stop words.
BM25_DEFAULT_STEMMER = "english"
BM25_DEFAULT_STOPWORDS = "english"


class BM25Retriever(IndexedRetriever):
    """Ranks the passages of a corpus by BM25 over title and text. Safe to share between threads.

    Args:
        passages: the corpus, at least one passage.
        k1: term frequency saturation, >= 0.
        b: length normalisation, in [0, 1].
        stemmer: a Snowball algorithm by name (PyStemmer), or `None` to leave words as they are.
        stopwords: a bm25s list by name, the words themselves, or `None` to keep every word.
        description: one line for logs and model cards; made from the corpus size by default.

    Raises:
        RetrievalError: for an empty corpus, a corpus without any indexable word, k1 or b out of range.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        k1: float = BM25_DEFAULT_K1,
        b: float = BM25_DEFAULT_B,
        stemmer: str | None = BM25_DEFAULT_STEMMER,
        stopwords: str | Sequence[str] | None = BM25_DEFAULT_STOPWORDS,
        description: str | None = None,
    ) -> None:
        if not passages:
            raise RetrievalError("BM25 got 0 passages; a search could never be answered, so give it a corpus")
        if not k1 >= 0:
            raise RetrievalError(f"BM25 k1={k1} is negative; use 0 or more, {BM25_DEFAULT_K1} by default")
        if not 0 <= b <= 1:
            raise RetrievalError(f"BM25 b={b} is outside [0, 1]; the default is {BM25_DEFAULT_B}")
        super().__init__(
            PassageList(passages), description or f"BM25 (k1={k1}, b={b}) over {len(passages):,} passages"
        )
        self._stopwords = [] if stopwords is None else stopwords
        self._stemmer = _make_stemmer(stemmer)
        self._stemmer_lock = threading.Lock()
        self._index = self._build_index(k1, b)

    @classmethod
    def from_corpus(cls, paths: str | Path | Sequence[str | Path], **options: object) -> BM25Retriever:
        """Index one or more corpus files; `options` are those of the constructor.

        Raises:
            CorpusError: for a file that is missing, empty or malformed.
        """
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        passages = read_corpus(files)
        names = ", ".join(f"{Path(path).resolve().parent.name}/{Path(path).name}" for path in files)
        options.setdefault("description", f"BM25 over {len(passages):,} passages of {names}")
        return cls(passages, **options)

    def encode(self, queries: Sequence[str]) -> list[list[int]]:
        """The ids of each query's terms that the corpus has, in the order of the query."""
        return [self._index.get_tokens_ids(tokens) for tokens in self._tokenize(list(queries))]

    def rank(self, encoded: list[list[int]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores are BM25 sums, >= 0; see `IndexedRetriever.rank`."""
        import numpy as np

        shape = (len(encoded), min(top_k, len(self)))
        scores, rows = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for query, ids in enumerate(encoded):
            rows[query] = np.arange(shape[1])
            if ids:
                of_all = self._index.get_scores_from_ids(ids)
                rows[query] = best_rows(of_all, top_k)
                scores[query] = of_all[rows[query]]
        return scores, rows

    def _build_index(self, k1: float, b: float):
        import bm25s

        # bm25s sets its logger to DEBUG on import, so its messages would reach the root handlers whatever their level.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        tokens = self._tokenize([f"{passage.title}\n{passage.text}" for passage in self.passages])
        if not any(tokens):
            raise RetrievalError(
                f"none of the {len(self)} passages holds an indexable word (two or more letters or digits, "
                "no stop word); check the corpus, or pass stopwords=None"
            )
        index = bm25s.BM25(k1=k1, b=b, method=BM25_METHOD)
        index.index(tokens, create_empty_token=False, show_progress=False)
        logger.info("indexed %s", self._description)
        return index

    def _tokenize(self, texts: list[str]) -> list[list[str]]:
        import bm25s

        # A Snowball stemmer keeps state in a C object that must not be used by two threads at once.
        with self._stemmer_lock:
            return bm25s.tokenize(
                texts, stopwords=self._stopwords, stemmer=self._stemmer, return_ids=False, show_progress=False
            )


def best_rows(scores: np.ndarray, top_k: int) -> np.ndarray:
    """The rows of the `top_k` highest scores, best first, equal scores by row. No score may be negative.

    scores: (N,); returns (min(top_k, N),).
    """
    import numpy as np

    count = min(top_k, len(scores))
    # Most passages share no term with a query: leaving the zeros out first makes the selection several times faster.
    rows = np.flatnonzero(scores)
    if len(rows) < count:
        unmatched = np.flatnonzero(scores == 0)[: count - len(rows)]
        return np.concatenate([rows[np.argsort(-scores[rows], kind="stable")], unmatched])
    matched = scores[rows]
    threshold = np.partition(matched, len(matched) - count)[len(matched) - count]
    above = rows[matched > threshold]
    level = rows[matched == threshold][: count - len(above)]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], level])


def _make_stemmer(name: str | None):
    if name is None:
        return None
    try:
        import Stemmer
    except ImportError as error:
        raise RetrievalError(
            f"the stemmer {name!r} needs PyStemmer: install it with `pip install PyStemmer`, or pass stemmer=None"
        ) from error
    if name not in Stemmer.algorithms():
        raise RetrievalError(f"there is no stemmer {name!r}; choose one of {', '.join(Stemmer.algorithms())}, or None")
    return Stemmer.Stemmer(name)
