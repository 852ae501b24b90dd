"""Lexical retrieval: BM25 by tantivy, over a corpus held in memory or over a saved index that is memory-mapped.

Ranking is a function of corpus and query alone, the same in memory and from a directory: equal scores are ordered by
position in the corpus. A query always gets `min(top_k, corpus size)` passages; those that share no term with it score
0 and so follow in corpus order.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.segments import (
    POSTINGS,
    ROW,
    TEXT,
    check_passages,
    check_terms,
    make_index,
    open_index,
    part_borders,
    write_parts,
)
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter, passage_text
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.passages import PassageList, PassageSource
from rex_rag.support.wording import counted
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np
    import tantivy

logger = logging.getLogger(__name__)

# Written last by the builder: an index without it is not finished.
SETTINGS_FILE = "bm25.json"
FORMAT = 3  # of the terms as well: an index of other terms finds other passages
# Passages whose terms are looked up in a saved index when it is opened.
ROWS_CHECKED_AT_LOAD = 8
# Below this size a query takes tens of microseconds, less than handing it to a thread.
ROWS_WORTH_THREADS = 100_000


class BM25Retriever(IndexedRetriever):
    """Ranks the passages of a corpus by BM25 over title and text (k1 1.2, b 0.75). Safe to share between threads.

    Args:
        passages: the corpus, at least one passage.
        stemmer, stopwords: as in `BM25Options`.
        description: one line for logs and model cards; made from the corpus size by default.

    Raises:
        RetrievalError: for an empty corpus, a corpus without any indexable word, unknown stemmers or stop words.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        stemmer: str | None = "english",
        stopwords: str | Sequence[str] | None = "english",
        description: str | None = None,
    ) -> None:
        check_passages(passages)
        splitter = TermSplitter(BM25Options(stemmer, stopwords))
        held = PassageList(passages)
        index = make_index(splitter.analyzer)
        size = sum(len(passage.title) + len(passage.text) for passage in held)
        for _ in write_parts(index, held, part_borders(len(held), size)):
            pass
        check_terms(index, len(held))
        self._set_up(held, description, splitter, index)
        logger.info("indexed %s", self.description)

    @classmethod
    def from_corpus(cls, paths: str | Path | Sequence[str | Path], **options: Any) -> BM25Retriever:
        """Index one or more corpus files; `options` are those of the constructor.

        Raises:
            CorpusError: for a file that is missing, empty or malformed.
        """
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        passages = read_corpus(files)
        names = ", ".join(f"{Path(path).resolve().parent.name}/{Path(path).name}" for path in files)
        options.setdefault("description", f"BM25 over {counted(len(passages), 'passage')} of {names}")
        return cls(passages, **options)

    @classmethod
    def load(cls, directory: str | Path, passages: PassageSource, description: str | None = None) -> BM25Retriever:
        """Open what `build.build_bm25` saved: its files are read once, for their checksums, and memory-mapped.

        Raises:
            RetrievalError: for an index that is unfinished or damaged, belongs to other passages, or was built with a
                tokenizer that splits texts differently from the one installed here.
        """
        directory = Path(directory)
        settings = read_settings(directory)
        if settings["passages"] != len(passages):
            raise RetrievalError(
                f"{directory} indexes {counted(settings['passages'], 'passage')}, but {len(passages):,} were given; "
                "the two do not belong together: build the index again"
            )
        splitter = TermSplitter(BM25Options(settings["stemmer"], settings["stopwords"]))
        retriever = cls.__new__(cls)
        retriever._set_up(passages, description, splitter, open_index(directory))
        retriever._check_agreement(directory, settings["tantivy"])
        return retriever

    def _set_up(
        self, passages: PassageSource, description: str | None, splitter: TermSplitter, index: tantivy.Index
    ) -> None:
        super().__init__(passages, description or f"BM25 over {counted(len(passages), 'passage')}")
        self._splitter = splitter
        self._schema = index.schema
        self._searcher = index.searcher()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._pool_lock = threading.Lock()

    def encode(self, queries: Sequence[str]) -> list[list[str]]:
        """The terms of each query, in the order of the query."""
        return self._splitter.terms(queries)

    def rank(self, encoded: list[list[str]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores are BM25 sums, >= 0; see `IndexedRetriever.rank`."""
        import numpy as np

        shape = (len(encoded), min(top_k, len(self)))
        scores, rows = np.zeros(shape, np.float32), np.empty(shape, np.int64)

        def search(query: int) -> None:
            hits = self._searcher.search(self._any_of(encoded[query]), shape[1], count=False).hits
            found: list[Any] = self._searcher.fast_field_values(ROW, [address for _, address in hits])
            scores[query, : len(hits)] = [score for score, _ in hits]
            rows[query, : len(hits)] = found
            if len(hits) < shape[1]:
                others = np.setdiff1d(np.arange(shape[1]), found, assume_unique=True)
                rows[query, len(hits) :] = others[: shape[1] - len(hits)]

        if len(encoded) > 1 and len(self) >= ROWS_WORTH_THREADS:
            list(self._threads().map(search, range(len(encoded))))
        else:
            for query in range(len(encoded)):
                search(query)
        return scores, rows

    def _any_of(self, terms: Sequence[str]) -> tantivy.Query:
        from tantivy import Occur, Query

        return Query.boolean_query([(Occur.Should, self._has(term)) for term in terms])

    def _has(self, term: str) -> tantivy.Query:
        from tantivy import Query

        return Query.term_query(self._schema, TEXT, term, POSTINGS)

    def _threads(self) -> ThreadPoolExecutor:
        # Threads do not come along into a forked process, so it starts its own.
        with self._pool_lock:
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = os.getpid(), ThreadPoolExecutor(len(os.sched_getaffinity(0)), "bm25")
            return self._pool[1]

    def _check_agreement(self, directory: Path, version: str) -> None:
        """Hold a saved index to a few passages: their terms, as split here, must lead to them."""
        from tantivy import FieldType, Occur, Query

        if self._searcher.num_docs != len(self):
            raise RetrievalError(
                f"{directory} holds {self._searcher.num_docs:,} documents for {len(self):,} passages; build the index "
                "again"
            )
        for row in range(0, len(self), max(1, len(self) // ROWS_CHECKED_AT_LOAD)):
            here = Query.range_query(self._schema, ROW, FieldType.Integer, row, row)
            [terms] = self._splitter.terms([passage_text(self.passages[row])])
            for term in sorted(set(terms)):
                both = Query.boolean_query([(Occur.Must, self._has(term)), (Occur.Must, here)])
                if not self._searcher.search(both, 1, count=False).hits:
                    raise RetrievalError(
                        f"{directory} does not lead from {term!r} to passage {row} (id {self.passages[row].id!r}), "
                        f"which holds it: the index is of other passages, or its tokenizer (tantivy {version}) splits "
                        f"texts unlike the one installed here ({tokenizer_version()}); build the index again"
                    )


def tokenizer_version() -> str:
    """Of the library whose behaviour decides which terms a text has."""
    return importlib.metadata.version("tantivy")


def read_settings(directory: Path) -> dict:
    """What an index was built with.

    Raises:
        RetrievalError: for an index that is unfinished or of another format.
    """
    path = directory / SETTINGS_FILE
    if not path.is_file():
        raise RetrievalError(
            f"{path} is missing: {directory} holds no BM25 index, or an unfinished one; build it with `rex-rag index`"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        known = settings["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RetrievalError(f"{path} cannot be read ({error!r}); build the index again") from error
    if known != FORMAT:
        raise RetrievalError(f"{path} has format {known!r}, this version reads {FORMAT}; build the index again")
    missing = sorted({"passages", "stemmer", "stopwords", "tantivy"} - set(settings))
    if missing:
        raise RetrievalError(f"{path} lacks {', '.join(missing)}; build the index again")
    return settings
