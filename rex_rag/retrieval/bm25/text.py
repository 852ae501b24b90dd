"""From text to the terms that BM25 counts, the same for passages and queries, and the settings of an index."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import threading
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from rex_rag.retrieval.base import RetrievalError
from rex_rag.types import Passage

# The defaults of bm25s 0.3 (Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", arXiv
# 2407.03618); the range recommended by Robertson and Zaragoza (2009) is k1 in 1.2..2, b in 0.5..0.8.
BM25_DEFAULT_K1 = 1.5
BM25_DEFAULT_B = 0.75
MAX_K1 = 1e6
# The scoring variant of Kamphuis et al. (ECIR 2020) that Lucene implements; its idf is never negative.
BM25_METHOD = "lucene"
# Snowball's English stemmer (Porter2), and bm25s' "english" list, which is Lucene's 33 English stop words.
BM25_DEFAULT_STEMMER = "english"
BM25_DEFAULT_STOPWORDS = "english"
# Words of one character too, as in Lucene's standard analyser and unlike scikit-learn: Vitamin K, Apollo 8.
TOKEN_PATTERN = r"(?u)\b\w+\b"
# Thai and Lao, Burmese, Khmer, Japanese and Chinese stand without spaces between words; Korean's particles stick to
# them.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
    "\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_FIRST_IDEOGRAPH = "\u3400"


@dataclass(frozen=True)
class BM25Options:
    """How passages are turned into terms and scored.

    Args:
        k1: term frequency saturation, in [0, 1e6].
        b: length normalisation, in [0, 1].
        stemmer: a Snowball algorithm by name (PyStemmer), or `None` to leave words as they are.
        stopwords: a bm25s list by name, the words themselves, or `None` to keep every word.

    Raises:
        RetrievalError: for k1 or b out of range.
    """

    k1: float = BM25_DEFAULT_K1
    b: float = BM25_DEFAULT_B
    stemmer: str | None = BM25_DEFAULT_STEMMER
    stopwords: str | Sequence[str] | None = BM25_DEFAULT_STOPWORDS

    def __post_init__(self) -> None:
        if not 0 <= self.k1 <= MAX_K1:
            raise RetrievalError(
                f"BM25 k1={self.k1} is outside [0, {MAX_K1:g}], above which scores vanish in 32-bit numbers; the "
                f"default is {BM25_DEFAULT_K1}"
            )
        if not 0 <= self.b <= 1:
            raise RetrievalError(f"BM25 b={self.b} is outside [0, 1]; the default is {BM25_DEFAULT_B}")


class TermSplitter:
    """Splits texts into terms: composed Unicode, lower case, `TOKEN_PATTERN`, stop words dropped, stemmed; where a
    script has no spaces pairs of neighbouring characters, as in Lucene's CJK analyser, and those that may be words by
    themselves. Safe between threads.

    Raises:
        RetrievalError: for a stemmer or a list of stop words that there is not.
    """

    def __init__(self, options: BM25Options) -> None:
        self.stemmer_name = options.stemmer
        self.stopwords = resolve_stopwords(options.stopwords)
        self._stemmer = _make_stemmer(options.stemmer)
        self._stemmer_lock = threading.Lock()

    def terms(self, texts: Sequence[str]) -> list[list[str]]:
        """The terms of each text, in the order of the text."""
        return self._tokenize(texts, return_ids=False)

    def ids(self, texts: Sequence[str]) -> tuple[list[list[int]], dict[str, int]]:
        """The terms of each text as numbers into a vocabulary of these texts alone, in no particular order."""
        return tuple(self._tokenize(texts, return_ids=True))

    def _tokenize(self, texts: Sequence[str], return_ids: bool):
        bm25s = quiet_bm25s()
        # A Snowball stemmer keeps state in a C object that must not be used by two threads at once.
        with self._stemmer_lock:
            return bm25s.tokenize(
                [text if text.isascii() else _spaced(text) for text in texts],
                token_pattern=TOKEN_PATTERN,
                stopwords=self.stopwords,
                stemmer=self._stemmer,
                return_ids=return_ids,
                show_progress=False,
            )


def _spaced(text: str) -> str:
    # Widths too: Japanese has Latin letters as wide as its own, and narrow kana.
    return _UNSPACED.sub(_pairs, unicodedata.normalize("NFKC", text))


def _pairs(run: re.Match) -> str:
    # The pattern of words knows no vowel signs.
    letters = [character for character in run[0] if character.isalnum()]
    words = [letter for letter in letters if letter >= _FIRST_IDEOGRAPH or len(letters) == 1]
    return f" {' '.join([*map(''.join, pairwise(letters)), *words])} "


def passage_text(passage: Passage) -> str:
    """What of a passage is searched."""
    return f"{passage.title}\n{passage.text}"


def resolve_stopwords(stopwords: str | Sequence[str] | None) -> list[str]:
    """The words themselves, sorted; an index stores them, so that it outlives a change to a named list.

    Raises:
        RetrievalError: for a name that bm25s does not know.
    """
    if stopwords is None:
        return []
    if isinstance(stopwords, str):
        quiet_bm25s()
        from bm25s.tokenization import _infer_stopwords

        try:
            stopwords = _infer_stopwords(stopwords)
        except ValueError as error:
            raise RetrievalError(f"there is no list of stop words {stopwords!r}: {error}") from None
    return sorted(set(stopwords))


def tokenizer_versions() -> dict[str, str]:
    """The libraries whose behaviour decides which terms a text has."""
    versions = {"bm25s": importlib.metadata.version("bm25s")}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["PyStemmer"] = importlib.metadata.version("PyStemmer")
    return versions


def quiet_bm25s():
    """Import bm25s without its log messages."""
    import bm25s

    # bm25s sets its logger to DEBUG on import, so its messages would reach the root handlers whatever their level.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


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
