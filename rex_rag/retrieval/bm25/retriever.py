"""In-process lexical retrieval: BM25 over a corpus held in memory, or over a saved index that is memory-mapped.

Ranking is a function of corpus and query alone: equal scores are ordered by position in the corpus. A query always
gets `min(top_k, corpus size)` passages; those that share no term with it score 0 and so follow in corpus order.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.postings import TERM_MAXIMA_FILE, MappedVocabulary, Postings, PostingsSearcher
from rex_rag.retrieval.bm25.text import (
    BM25_DEFAULT_B,
    BM25_DEFAULT_K1,
    BM25_DEFAULT_STEMMER,
    BM25_DEFAULT_STOPWORDS,
    BM25_METHOD,
    BM25Options,
    TermSplitter,
    passage_text,
    quiet_bm25s,
    tokenizer_versions,
)
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.passages import PassageList, PassageSource
from rex_rag.support.wording import counted
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# Written last by the builder: an index without it is not finished.
SETTINGS_FILE = "bm25.json"
FORMAT = 2  # of the terms as well: an index of other terms finds other passages
# Passages whose terms are looked up in a saved index when it is opened.
ROWS_CHECKED_AT_LOAD = 8
# Below this size a query takes tens of microseconds, less than handing it to a thread.
ROWS_WORTH_THREADS = 100_000


class BM25Retriever(IndexedRetriever):
    """Ranks the passages of a corpus by BM25 over title and text. Safe to share between threads.

    Args:
        passages: the corpus, at least one passage.
        k1: term frequency saturation, in [0, 1e6].
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
        options = BM25Options(k1, b, stemmer, stopwords)
        splitter = TermSplitter(options)
        index = _index_in_memory(passages, options, splitter)
        description = description or f"BM25 (k1={k1}, b={b}) over {counted(len(passages), 'passage')}"
        self._set_up(PassageList(passages), description, splitter, index.vocab_dict, Postings.of(index.scores))
        logger.info("indexed %s", description)

    @classmethod
    def from_corpus(cls, paths: str | Path | Sequence[str | Path], **options: object) -> BM25Retriever:
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
        """Open an index that `build.build_bm25` saved. Its arrays and words are memory-mapped, none is read.

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
        options = BM25Options(settings["k1"], settings["b"], settings["stemmer"], settings["stopwords"])
        retriever = cls.__new__(cls)
        retriever._set_up(
            passages,
            description or f"BM25 (k1={options.k1}, b={options.b}) over {counted(len(passages), 'passage')}",
            TermSplitter(options),
            MappedVocabulary(directory),
            _map_postings(directory, settings),
        )
        retriever._check_agreement(directory, settings["versions"])
        return retriever

    def _set_up(self, passages, description, splitter, vocabulary, postings: Postings) -> None:
        super().__init__(passages, description)
        self._splitter = splitter
        self._vocabulary: dict[str, int] | MappedVocabulary = vocabulary
        self._postings = postings
        self._searcher = PostingsSearcher(postings)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._pool_lock = threading.Lock()

    def encode(self, queries: Sequence[str]) -> list[list[int]]:
        """The numbers of each query's terms that the corpus has, in the order of the query."""
        found = ([self._vocabulary.get(term) for term in terms] for terms in self._splitter.terms(queries))
        return [[number for number in numbers if number is not None] for numbers in found]

    def rank(self, encoded: list[list[int]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores are BM25 sums, >= 0; see `IndexedRetriever.rank`."""
        import numpy as np

        shape = (len(encoded), min(top_k, len(self)))
        scores, rows = np.empty(shape, np.float32), np.empty(shape, np.int64)

        def search(query: int) -> None:
            scores[query], rows[query] = self._searcher.search(encoded[query], top_k)

        if len(encoded) > 1 and len(self) >= ROWS_WORTH_THREADS:
            list(self._threads().map(search, range(len(encoded))))
        else:
            for query in range(len(encoded)):
                search(query)
        return scores, rows

    def _threads(self) -> ThreadPoolExecutor:
        # Threads do not come along into a forked process, so it starts its own.
        with self._pool_lock:
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = os.getpid(), ThreadPoolExecutor(len(os.sched_getaffinity(0)), "bm25")
            return self._pool[1]

    def _check_agreement(self, directory: Path, versions: dict[str, str]) -> None:
        """Hold a saved index to a few passages: their terms, as split here, must lead to them."""
        import numpy as np

        step = max(1, len(self) // ROWS_CHECKED_AT_LOAD)
        for row in range(0, len(self), step):
            terms = self._splitter.terms([passage_text(self.passages[row])])[0]
            for term in sorted(set(terms)):
                number = self._vocabulary.get(term)
                rows = self._postings.of_term(number)[0] if number is not None else ()
                place = np.searchsorted(rows, np.asarray(row, self._postings.indices.dtype)) if len(rows) else 0
                if place < len(rows) and rows[place] == row:
                    continue
                raise RetrievalError(
                    f"{directory} does not lead from {term!r} to passage {row} (id {self.passages[row].id!r}), which "
                    f"holds it: the index is of other passages, or its tokenizer ({_versions(versions)}) splits texts "
                    f"unlike the one installed here ({_versions(tokenizer_versions())}); build the index again"
                )


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
    except (ValueError, TypeError, KeyError) as error:
        raise RetrievalError(f"{path} cannot be read ({error!r}); build the index again") from error
    if known != FORMAT:
        raise RetrievalError(f"{path} has format {known!r}, this version reads {FORMAT}; build the index again")
    missing = sorted({"passages", "terms", "postings", "k1", "b", "stemmer", "stopwords", "versions"} - set(settings))
    if missing:
        raise RetrievalError(f"{path} lacks {', '.join(missing)}; build the index again")
    return settings


def _index_in_memory(passages: Sequence[Passage], options: BM25Options, splitter: TermSplitter):
    terms = splitter.terms([passage_text(passage) for passage in passages])
    if not any(terms):
        raise RetrievalError(
            f"none of the {len(passages)} passages holds an indexable word (letters or digits, no stop "
            "word); check the corpus, or pass stopwords=None"
        )
    index = quiet_bm25s().BM25(k1=options.k1, b=options.b, method=BM25_METHOD)
    index.index(terms, create_empty_token=False, show_progress=False)
    return index


def _map_postings(directory: Path, settings: dict) -> Postings:
    import numpy as np

    try:
        # Its vocabulary would be a dictionary in memory; ours is mapped.
        index = quiet_bm25s().BM25.load(directory, mmap=True, load_vocab=False)
        maxima = np.load(directory / TERM_MAXIMA_FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RetrievalError(f"{directory} cannot be opened ({error}); build the index again") from error
    # A plain view: slicing a memmap makes an object of a slow subclass each time.
    data, indices, indptr = (np.asarray(index.scores[name]) for name in ("data", "indices", "indptr"))
    sizes = {"postings": len(data), "terms": len(maxima)}
    wanted = {name: settings[name] for name in sizes}
    whole = len(indices) == len(data) == indptr[-1] and len(indptr) == len(maxima) + 1
    if sizes != wanted or not whole or (data.dtype, indices.dtype) != (np.float32, np.int32):
        raise RetrievalError(
            f"{directory} holds arrays of {sizes}, but {SETTINGS_FILE} tells {wanted}; build the index again"
        )
    return Postings(data, indices, indptr, np.asarray(maxima), settings["passages"])


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
