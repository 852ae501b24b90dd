"""Scores of predictions: per question, and per benchmark with bootstrap intervals. Nothing here is ever stored.

Invariant: scores read `Sample.answer`, which methods take from model-written text alone, and the gold answers; what
was retrieved counts for document recall alone, which says nothing of the answer.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rex_rag.answers import answer_key, exact_match, sub_match, token_f1
from rex_rag.evaluation.bootstrap import RESAMPLES, Estimate, bootstrap, macro_mean
from rex_rag.evaluation.choices import choice_letter
from rex_rag.evaluation.records import PREDICTIONS_FILE, TIMINGS_FILE, Prediction, Sample
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects

__all__ = [
    "BenchmarkScores",
    "Estimate",
    "Judge",
    "ScoreError",
    "macro_scores",
    "main_metric",
    "majority_answer",
    "pass_at_k",
    "question_scores",
    "read_predictions",
    "read_seconds",
    "score_benchmark",
]

EXACT_MATCH = "exact_match"
F1 = "f1"
SUB_MATCH = "sub_match"
ACCURACY = "accuracy"
JUDGE = "judge"
DOCUMENT_RECALL = "document_recall"
# Floats of equal fractions differ in their last bits (F1 of 3 words in 4 and 5, of 5 in 6 and 9; the same samples in
# another order), which a sign test would count as wins.
_DECIMALS = 12
# How right an answer to an open question is, in [0, 1]: the opinion of a model, say. Exact match stays beside it.
Judge = Callable[[Prediction, str], float]
_OPEN_METRICS: dict[str, Callable[[str | None, Sequence[str]], float]] = {
    EXACT_MATCH: exact_match,
    F1: token_f1,
    SUB_MATCH: sub_match,
}


class ScoreError(UserError):
    """Predictions cannot be scored; the message names file, line, reason and way out."""


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of one benchmark; all scores in [0, 1].

    metrics: `exact_match`, `f1`, `sub_match` and, if asked, `judge`; or `accuracy` for multiple choice; and
    `document_recall` where the set names gold documents; the mean over questions of the mean over a question's
    samples. pass_at_k: k -> estimate, for 1, 2, 4, ... and the number of
    samples; majority: of the vote; both of the main metric, and empty or `None` for one sample a question. searches,
    tokens, invalid_actions: means over samples. truncations: cause -> how often, over all samples. unanswered: share
    of samples without an answer. unreadable: share of samples whose answer names no choice. seconds: of the whole
    benchmark, if known. values: metric -> score of each question, shape (n,), in the order of `ids`.
    """

    n: int
    samples: int
    kind: str
    metrics: dict[str, Estimate]
    pass_at_k: dict[int, Estimate]
    majority: Estimate | None
    searches: float
    tokens: float
    invalid_actions: float
    truncations: dict[str, int]
    unanswered: float
    unreadable: float
    seconds: float | None
    ids: tuple[str, ...]
    values: dict[str, np.ndarray]

    @property
    def main(self) -> Estimate:
        """Exact match, or accuracy for multiple choice."""
        return self.metrics[main_metric(self.kind)]

    def as_row(self) -> dict[str, Any]:
        """All but the questions' own scores; JSON-able."""
        return {
            "n": self.n,
            "samples": self.samples,
            "kind": self.kind,
            "metrics": {name: estimate.as_row() for name, estimate in self.metrics.items()},
            "pass_at_k": {str(k): estimate.as_row() for k, estimate in self.pass_at_k.items()},
            "majority": self.majority.as_row() if self.majority else None,
            "searches": self.searches,
            "tokens": self.tokens,
            "invalid_actions": self.invalid_actions,
            "truncations": self.truncations,
            "unanswered": self.unanswered,
            "unreadable": self.unreadable,
            "seconds": self.seconds,
        }


def main_metric(kind: str) -> str:
    """The metric that correctness means: `exact_match`, or `accuracy` for kind `multiple_choice`."""
    return ACCURACY if kind == "multiple_choice" else EXACT_MATCH


def question_scores(prediction: Prediction, judge: Judge | None = None) -> dict[str, list[float]]:
    """Metric -> score of each sample, in [0, 1]. Without an answer a sample scores 0, and no judge is asked.

    Raises:
        ScoreError: for a judge's score outside [0, 1].
    """
    answers = [sample.answer for sample in prediction.samples]
    found = (
        {DOCUMENT_RECALL: [_document_recall(sample, prediction.documents) for sample in prediction.samples]}
        if prediction.documents
        else {}
    )
    if prediction.choices is not None:
        letters = [choice_letter(answer, prediction.choices) for answer in answers]
        return {ACCURACY: [float(letter in prediction.golden_answers) for letter in letters], **found}
    scores = {
        name: [float(score(answer, prediction.golden_answers)) for answer in answers]
        for name, score in _OPEN_METRICS.items()
    }
    if judge is not None:
        scores[JUDGE] = [_judged(judge, prediction, sample) for sample in prediction.samples]
    return scores | found


def score_benchmark(
    predictions: Sequence[Prediction],
    *,
    seconds: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    judge: Judge | None = None,
) -> BenchmarkScores:
    """Score the predictions of one benchmark; intervals are over questions.

    Args:
        seconds: what the benchmark took, see `read_seconds`.
        judge: adds the metric `judge` to open questions; called once for every answer.

    Raises:
        ScoreError: for no prediction, ids that repeat, kinds or numbers of samples that differ between questions, a
            judge's score outside [0, 1].
    """
    _check(predictions)
    kind = "open" if predictions[0].choices is None else "multiple_choice"
    per_question = [question_scores(prediction, judge) for prediction in predictions]
    # (n, samples)
    scores = {name: np.array([row[name] for row in per_question]) for name in per_question[0]}
    values = {name: table.mean(axis=1).round(_DECIMALS) for name, table in scores.items()}
    correct = scores[main_metric(kind)]
    samples = correct.shape[1]

    def estimate(of_questions: np.ndarray) -> Estimate:
        return bootstrap(of_questions, resamples=resamples, seed=seed)

    passes, majority = {}, None
    if samples > 1:
        sizes = sorted({*(2**power for power in range(samples.bit_length())), samples})
        right = correct.sum(axis=1).astype(int)
        passes = {k: estimate(np.array([pass_at_k(samples, int(c), k) for c in right])) for k in sizes}
        majority = estimate(np.array([_majority_is_right(prediction) for prediction in predictions], dtype=float))
    written = [sample for prediction in predictions for sample in prediction.samples]
    return BenchmarkScores(
        n=len(predictions),
        samples=samples,
        kind=kind,
        metrics={name: estimate(table) for name, table in values.items()},
        pass_at_k=passes,
        majority=majority,
        searches=_mean(len(sample.searches) for sample in written),
        tokens=_mean(sample.tokens for sample in written),
        invalid_actions=_mean(sample.invalid_actions for sample in written),
        truncations=_truncations(written),
        unanswered=_mean(_is_unanswered(sample) for sample in written),
        unreadable=_mean(_is_unreadable(sample, one) for one in predictions for sample in one.samples),
        seconds=seconds,
        ids=tuple(prediction.id for prediction in predictions),
        values=values,
    )


def macro_scores(scores: Sequence[BenchmarkScores], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The unweighted mean over benchmarks of their main metric, as the paper's table 1 gives it.

    Raises:
        ValueError: for no benchmark.
    """
    tables = [one.values[main_metric(one.kind)] for one in scores]
    return macro_mean(tables, resamples=resamples, seed=seed)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k samples drawn without replacement from n, c of them correct, hold a correct one.

    Unbiased for the chance that k new samples do: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374,
    equation 1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f"pass@k of n={n} samples with c={c} correct and k={k}; it needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_answer(answers: Sequence[str | None], choices: Mapping[str, str] | None = None) -> str | None:
    """The answer that most samples give (self-consistency, arXiv 2203.11171); of a tie, the one that came first.

    Open answers are the same if their `answer_key` is, and the first of them is returned as it was written;
    with `choices`, answers are read as letters. Samples without an answer do not vote; `None` if none has one.
    """
    votes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for answer in answers:
        if answer is None or not answer.strip():
            continue
        vote = answer_key(answer) if choices is None else choice_letter(answer, choices)
        if vote is None:
            continue
        votes[vote] += 1
        first.setdefault(vote, answer if choices is None else vote)
    # A Counter keeps the order of first votes, and `max` returns the first of equals.
    return first[max(votes, key=votes.__getitem__)] if votes else None


def read_predictions(folder: str | Path) -> list[Prediction]:
    """The predictions in a benchmark's folder of a run, in order.

    Raises:
        ScoreError: for a file that is missing, empty, broken or of another form, naming the line.
    """
    path = Path(folder) / PREDICTIONS_FILE
    predictions = []
    for number, row in iter_json_objects(path, ScoreError):
        try:
            predictions.append(Prediction.from_row(row))
        except (KeyError, TypeError) as error:
            raise ScoreError(
                f"{path}, line {number}: not a prediction ({type(error).__name__}: {error}); run the evaluation again "
                "with this version"
            ) from error
    return predictions


def read_seconds(folder: str | Path) -> float | None:
    """The sum of `seconds` over the rows of a benchmark's timings, or `None` where there are none.

    Raises:
        ScoreError: for a row without a number of seconds.
    """
    path = Path(folder) / TIMINGS_FILE
    if not path.is_file() or not path.stat().st_size:
        return None
    total = 0.0
    for number, row in iter_json_objects(path, ScoreError):
        seconds = row.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise ScoreError(f"{path}, line {number}: seconds={json.dumps(seconds)}; it must be a number from 0 on")
        total += seconds
    return total


def _check(predictions: Sequence[Prediction]) -> None:
    if not predictions:
        raise ScoreError("there is no prediction to score; finish the run first")
    [(repeated, times)] = Counter(prediction.id for prediction in predictions).most_common(1)
    if times > 1:
        raise ScoreError(f"question {repeated!r} was answered {times} times; merge the parts of a run once")
    kinds = {prediction.choices is None for prediction in predictions}
    sizes = {len(prediction.samples) for prediction in predictions}
    if len(kinds) > 1 or len(sizes) > 1 or 0 in sizes:
        raise ScoreError(
            f"the predictions hold {sorted(sizes)} samples a question and {len(kinds)} kinds of question; those of "
            "one benchmark hold the same number, at least 1, of one kind: score benchmarks one by one"
        )


def _document_recall(sample: Sample, documents: Sequence[str]) -> float:
    """The share of the gold documents among all that the sample's searches gave, as BrowseComp-Plus counts it."""
    found = {passage for search in sample.searches for passage in search["passages"]}
    return len(found.intersection(documents)) / len(set(documents))


def _judged(judge: Judge, prediction: Prediction, sample: Sample) -> float:
    if sample.answer is None or _is_unanswered(sample):
        return 0.0
    score = float(judge(prediction, sample.answer))
    if not 0 <= score <= 1:
        raise ScoreError(f"question {prediction.id!r}: the judge scored {score}; a score must be in [0, 1]")
    return score


def _majority_is_right(prediction: Prediction) -> bool:
    answer = majority_answer([sample.answer for sample in prediction.samples], prediction.choices)
    if prediction.choices is None:
        return exact_match(answer, prediction.golden_answers)
    return answer in prediction.golden_answers


def _is_unanswered(sample: Sample) -> bool:
    return sample.answer is None or not sample.answer.strip()


def _is_unreadable(sample: Sample, prediction: Prediction) -> bool:
    if prediction.choices is None or _is_unanswered(sample):
        return False
    return choice_letter(sample.answer, prediction.choices) is None


def _truncations(samples: Sequence[Sample]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for sample in samples:
        total.update(sample.truncations)
    return dict(sorted(total.items()))


def _mean(values: Any) -> float:
    return float(np.mean([float(value) for value in values]))
