"""Means with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rex_rag.support.errors import UserError

RESAMPLES = 10_000
COVERAGE = 0.95
_COUNTS_AT_ONCE = 2_000_000  # 16 MB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def as_row(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of `resamples` samples drawn with replacement from `values` (n,), each of size n; shape (resamples,).

    How often each distinct value is drawn follows a multinomial distribution: drawing these counts gives the same
    means as drawing n questions each time, as scipy does, at a cost that grows with the distinct values (two, for
    exact match) and not with 51,713 questions.

    Raises:
        ValueError: for no value or values that are not finite.
    """
    values = _checked(values)
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _COUNTS_AT_ONCE // len(distinct))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.multinomial(len(values), counts / len(values), size=size)  # (size, distinct)
        means[start : start + size] = drawn @ distinct / len(values)
    return means


def bootstrap(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of `values` (n,) with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Raises:
        ValueError: for no value or values that are not finite.
    """
    return _estimate(_mean(values), bootstrap_means(values, resamples, seed))


def macro_mean(sets: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of the sets' means, each set counting the same; questions are resampled within each set.

    Equal sets give equal intervals, in whatever order they are named.

    Raises:
        ValueError: for no set, an empty one or values that are not finite.
    """
    if not len(sets):
        raise UserError("there is no set to take the mean over; score at least one benchmark")
    tables = sorted(map(_checked, sets), key=lambda values: (len(values), np.sort(values).tobytes()))
    means = [bootstrap_means(values, resamples, seed + position) for position, values in enumerate(tables)]
    return _estimate(math.fsum(map(_mean, sets)) / len(sets), np.mean(means, axis=0))


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise UserError(f"an interval needs finite values of shape (n,) with n > 0; these are of shape {values.shape}")
    return values


def _mean(values: np.ndarray) -> float:
    # Rounded once: the mean does not hang on the order of the questions.
    return math.fsum(_checked(values)) / len(values)


def _estimate(mean: float, means: np.ndarray) -> Estimate:
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(mean, float(low), float(high))
