"""Answer scoring: SQuAD normalisation, exact match, sub-match, token F1. The only copy in the package."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (SQuAD v1.1 evaluation)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def answer_key(text: str) -> str:
    """What two answers share if they are the same: the normalised text or, where nothing is left of it, as in "The
    The", "A" or "!!!", the text with its articles or else its punctuation. Blank for blank text alone, which is no
    answer. No key of the second kind is one of the first, since that holds neither bare articles nor punctuation."""
    lowered = " ".join(text.lower().split())
    return normalize_answer(text) or " ".join(lowered.translate(_PUNCTUATION).split()) or lowered


def exact_match(prediction: str | None, gold_answers: Iterable[str]) -> bool:
    """Whether the prediction is any of the gold answers, by `answer_key`. No answer (`None`, blank) is wrong."""
    predicted = answer_key(prediction or "")
    return bool(predicted) and any(predicted == answer_key(gold) for gold in gold_answers)


def sub_match(prediction: str | None, gold_answers: Iterable[str]) -> bool:
    """Whether the words of any gold answer stand in the prediction, in order and side by side, after normalisation.

    Whole words, so that "no" is not found in "I do not know"; FlashRAG's and Search-R1's measure of that name compares
    characters and does find it. A gold answer that normalises to nothing is matched by nothing but its like.
    """
    text = f" {normalize_answer(prediction or '')} "
    words = [(gold, normalize_answer(gold)) for gold in gold_answers]
    return any(f" {part} " in text if part else exact_match(prediction, [gold]) for gold, part in words)


def token_f1(prediction: str | None, gold_answers: Iterable[str]) -> float:
    """The best bag-of-tokens F1 over the gold answers, after normalisation, in [0, 1]; where either normalises to
    nothing, exact match."""
    return max((_f1(prediction or "", gold) for gold in gold_answers), default=0.0)


def _f1(prediction: str, gold_answer: str) -> float:
    predicted, gold = normalize_answer(prediction).split(), normalize_answer(gold_answer).split()
    if not predicted or not gold:
        return float(exact_match(prediction, [gold_answer]))
    shared = sum((Counter(predicted) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
