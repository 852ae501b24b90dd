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


def exact_match(prediction: str | None, gold_answers: Iterable[str]) -> bool:
    """Whether the normalised prediction equals any normalised gold answer. No answer (`None`) is wrong."""
    if prediction is None:
        return False
    predicted = normalize_answer(prediction)
    return any(predicted == normalize_answer(gold) for gold in gold_answers)


def sub_match(prediction: str | None, gold_answers: Iterable[str]) -> bool:
    """Whether the words of any gold answer stand in the prediction, in order and side by side, after normalisation.

    Whole words, so that "no" is not found in "I do not know"; FlashRAG's and Search-R1's measure of that name compares
    characters and does find it. A gold answer that normalises to nothing is matched by nothing but its like.
    """
    if prediction is None:
        return False
    predicted = normalize_answer(prediction)
    return any(_holds(predicted, normalize_answer(gold)) for gold in gold_answers)


def _holds(text: str, words: str) -> bool:
    return f" {words} " in f" {text} " if words else not text


def token_f1(prediction: str | None, gold_answers: Iterable[str]) -> float:
    """The best bag-of-tokens F1 over the gold answers, after normalisation, in [0, 1]."""
    if prediction is None:
        return 0.0
    predicted = normalize_answer(prediction).split()
    return max((_f1(predicted, normalize_answer(gold).split()) for gold in gold_answers), default=0.0)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    shared = sum((Counter(predicted) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
