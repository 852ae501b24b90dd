"""From text to the terms that BM25 counts, the same for passages and queries, and what an index is made with."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.types import Passage

if TYPE_CHECKING:
    import tantivy

# Fixed in tantivy; within what Robertson and Zaragoza (2009) recommend: k1 in 1.2..2, b in 0.5..0.8.
TANTIVY_K1 = 1.2
TANTIVY_B = 0.75
# Thai and Lao, Burmese, Khmer, Japanese and Chinese stand without spaces between words; Korean's particles stick to
# them.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
    "\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_FIRST_IDEOGRAPH = "\u3400"


@dataclass(frozen=True)
class BM25Options:
    """How texts are turned into terms.

    Args:
        stemmer: the language of a Snowball stemmer that tantivy has, or `None` to leave words as they are.
        stopwords: the language of a list that tantivy has (English: Lucene's 33 words), the words themselves, or
            `None` to keep every word.
    """

    stemmer: str | None = "english"
    stopwords: str | Sequence[str] | None = "english"

    @property
    def index_parameters(self) -> dict[str, Any]:
        """What a manifest tells of an index made with these options."""
        return {"type": "bm25", "engine": "tantivy", "k1": TANTIVY_K1, "b": TANTIVY_B, **asdict(self)}


class TermSplitter:
    """Splits texts into terms: composed Unicode, lower case, letters and digits, stop words dropped, stemmed; where a
    script has no spaces pairs of neighbouring characters, as in Lucene's CJK analyser, and those that may be words by
    themselves. Safe between threads.

    Raises:
        RetrievalError: for a stemmer or a list of stop words that there is not.
    """

    def __init__(self, options: BM25Options) -> None:
        self.analyzer = _make_analyzer(options)

    def terms(self, texts: Sequence[str]) -> list[list[str]]:
        """The terms of each text, in the order of the text."""
        return [self.analyzer.analyze(spaced(text)) for text in texts]


def spaced(text: str) -> str:
    """The text as the analyzer takes it: composed, and with blanks around the terms of scripts without spaces."""
    # Widths too: Japanese has Latin letters as wide as its own, and narrow kana.
    return text if text.isascii() else _UNSPACED.sub(_pairs, unicodedata.normalize("NFKC", text))


def _pairs(run: re.Match) -> str:
    # Vowel signs are no letters: the analyzer would split a pair there.
    letters = [character for character in run[0] if character.isalnum()]
    words = [letter for letter in letters if letter >= _FIRST_IDEOGRAPH or len(letters) == 1]
    return f" {' '.join([*map(''.join, pairwise(letters)), *words])} "


def passage_text(passage: Passage) -> str:
    """What of a passage is searched."""
    return f"{passage.title}\n{passage.text}"


def _make_analyzer(options: BM25Options) -> tantivy.TextAnalyzer:
    from tantivy import Filter, TextAnalyzerBuilder, Tokenizer

    builder = TextAnalyzerBuilder(Tokenizer.simple()).filter(Filter.lowercase())
    try:
        if isinstance(options.stopwords, str):
            builder = builder.filter(Filter.stopword(options.stopwords))
        elif options.stopwords is not None:
            builder = builder.filter(Filter.custom_stopword(list(options.stopwords)))
        if options.stemmer is not None:
            builder = builder.filter(Filter.stemmer(options.stemmer))
    except ValueError as error:
        raise RetrievalError(
            f"tantivy has no such stemmer or list of stop words (stemmer={options.stemmer!r}, "
            f"stopwords={options.stopwords!r}): {error}; name a language such as english, or none"
        ) from None
    return builder.build()
