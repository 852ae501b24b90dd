"""Statistics of two runs over the same questions: difference, its bootstrap interval, an exact sign test.

Questions answered by both runs are far from independent, so a paired test sees differences that two separate intervals
hide. Every draw is seeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rex_rag.evaluation.bootstrap import RESAMPLES, Estimate, bootstrap, macro_mean
from rex_rag.support.errors import UserError

MIN_RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class Paired:
    """Run B against run A on n questions. Scores are in [0, 1]; `difference` is B minus A.

    a_only, b_only: questions on which A, or B, scores more than the other: for right-or-wrong scores those that it
    alone gets right. both: equal and above 0. neither: equal at 0. p: two-sided exact sign test over a_only and
    b_only, McNemar's test for right-or-wrong scores.
    """

    n: int
    mean_a: float
    mean_b: float
    difference: Estimate
    a_only: int
    b_only: int
    both: int
    neither: int
    p: float


def sign_test(first: int, second: int) -> float:
    """Two-sided exact p of `first` against `second` wins, ties left out, where both were equally likely.

    McNemar's exact test when the wins are the questions that one of two runs alone got right. 1 where nobody won.

    Raises:
        ValueError: for negative counts.
    """
    if first < 0 or second < 0:
        raise UserError(f"wins of {first} and {second} cannot be counted; both must be at least 0")
    if first + second == 0:
        return 1.0
    from scipy.stats import binomtest  # takes half a second

    return float(binomtest(first, first + second).pvalue)


def compare_scores(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[dict[str, Paired], Paired]:
    """Compare two runs set by set and overall.

    Overall, `mean_a`, `mean_b` and `difference` are means over sets, each set counting alike (the mean of published
    tables), with questions drawn anew within every set; counts and p run over all questions together.

    Args:
        a, b: set -> score of each question in [0, 1], in the same order in both.

    Raises:
        ValueError: sets or numbers of questions that differ, an empty set, fewer than 100 resamples.
    """
    if a.keys() != b.keys() or not a:
        raise UserError(f"sets {sorted(a)} and {sorted(b)} cannot be paired; compare the same sets, one at least")
    if resamples < MIN_RESAMPLES:
        raise UserError(f"{resamples} resamples are too few for a 95 % interval; take at least {MIN_RESAMPLES}")
    sets, differences = {}, []
    for name in a:
        if len(a[name]) != len(b[name]) or not len(a[name]):
            raise UserError(
                f"{name}: {len(a[name])} scores cannot be paired with {len(b[name])}; both runs must have answered "
                "the same questions, one at least"
            )
        first, second = np.asarray(a[name], dtype=np.float64), np.asarray(b[name], dtype=np.float64)
        differences.append(second - first)
        sets[name] = _paired(first, second, bootstrap(differences[-1], resamples=resamples, seed=seed))
    return sets, _overall(list(sets.values()), macro_mean(differences, resamples=resamples, seed=seed))


def _paired(a: np.ndarray, b: np.ndarray, difference: Estimate) -> Paired:
    a_only, b_only = int((a > b).sum()), int((b > a).sum())
    neither = int(((a == 0) & (b == 0)).sum())
    return Paired(
        n=len(a),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=difference,
        a_only=a_only,
        b_only=b_only,
        both=len(a) - a_only - b_only - neither,
        neither=neither,
        p=sign_test(a_only, b_only),
    )


def _overall(sets: Sequence[Paired], difference: Estimate) -> Paired:
    counts = {name: sum(getattr(row, name) for row in sets) for name in ("n", "a_only", "b_only", "both", "neither")}
    return Paired(
        mean_a=sum(row.mean_a for row in sets) / len(sets),
        mean_b=sum(row.mean_b for row in sets) / len(sets),
        difference=difference,
        p=sign_test(counts["a_only"], counts["b_only"]),
        **counts,
    )
