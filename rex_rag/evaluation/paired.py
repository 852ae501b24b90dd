"""Statistics of two runs over the same questions: difference, its bootstrap interval, an exact sign test.

Questions answered by both runs are far from independent, so a paired test sees differences that two separate intervals
hide. Every draw is seeded; a set's interval depends on its scores, the seed and its name alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT_RESAMPLES = 10_000
DEFAULT_SEED = 0
_CHUNK = 1_000  # resamples at a time: bounds memory where scores take many values


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval; `level` of its probability mass lies inside."""

    low: float
    high: float
    level: float = 0.95


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
    difference: float
    interval: Interval
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
        raise ValueError(f"wins of {first} and {second} cannot be counted; both must be at least 0")
    n, least = first + second, min(first, second)
    # Exact integers: the terms of 10,000 disagreements are far outside what floats hold.
    term, tail = 1, 1
    for wins in range(1, least + 1):
        term = term * (n - wins + 1) // wins
        tail += term
    return min(1.0, 2 * tail / 2**n)


def bootstrap_means(values: Sequence[float], *, seed: int, name: str, resamples: int) -> np.ndarray:
    """Means of `resamples` samples drawn with replacement, each as large as `values`; shape (resamples,).

    Drawing how often each distinct value comes up is the same distribution as drawing one by one, and quick for scores
    that take few values.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng([seed, *name.encode()])
    n = int(counts.sum())
    chunks = []
    for start in range(0, resamples, _CHUNK):
        drawn = generator.multinomial(n, counts / n, size=min(_CHUNK, resamples - start))
        chunks.append(drawn @ distinct / n)
    return np.concatenate(chunks)


def interval_of(means: np.ndarray, level: float = 0.95) -> Interval:
    """The percentile interval of bootstrap means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def compare_scores(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    seed: int = DEFAULT_SEED,
    resamples: int = DEFAULT_RESAMPLES,
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
        raise ValueError(f"sets {sorted(a)} and {sorted(b)} cannot be paired; compare the same sets, one at least")
    if resamples < 100:
        raise ValueError(f"{resamples} resamples are too few for a 95 % interval; take at least 100")
    sets, means = {}, []
    for name in a:
        if len(a[name]) != len(b[name]) or not a[name]:
            raise ValueError(
                f"{name}: {len(a[name])} scores cannot be paired with {len(b[name])}; both runs must have answered "
                "the same questions, one at least"
            )
        differences = [second - first for first, second in zip(a[name], b[name], strict=True)]
        means.append(bootstrap_means(differences, seed=seed, name=name, resamples=resamples))
        sets[name] = _paired(a[name], b[name], interval_of(means[-1]))
    return sets, _overall(sets, interval_of(np.mean(means, axis=0)))


def _paired(a: Sequence[float], b: Sequence[float], interval: Interval) -> Paired:
    pairs = list(zip(a, b, strict=True))
    a_only = sum(first > second for first, second in pairs)
    b_only = sum(second > first for first, second in pairs)
    neither = sum(first == second == 0 for first, second in pairs)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return Paired(
        n=len(pairs),
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean_b - mean_a,
        interval=interval,
        a_only=a_only,
        b_only=b_only,
        both=len(pairs) - a_only - b_only - neither,
        neither=neither,
        p=sign_test(a_only, b_only),
    )


def _overall(sets: Mapping[str, Paired], interval: Interval) -> Paired:
    rows = sets.values()
    mean_a, mean_b = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("mean_a", "mean_b"))
    counts = {name: sum(getattr(row, name) for row in rows) for name in ("n", "a_only", "b_only", "both", "neither")}
    return Paired(
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean_b - mean_a,
        interval=interval,
        p=sign_test(counts["a_only"], counts["b_only"]),
        **counts,
    )
