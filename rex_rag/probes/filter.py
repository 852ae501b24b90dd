"""The trajectory filter (paper section 3.4): how many probes are kept, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def keep_count(keep_ratio: float, num_originals: int) -> int:
    """floor(keep_ratio * N), robust to the last bit of the product (0.29 * 100 is 28.999…)."""
    return math.floor(keep_ratio * num_originals + 1e-9)


def keep_best(scores: Sequence[float], count: int) -> list[bool]:
    """Keep the `count` highest scores; equal scores are kept in their order. NaN scores rank last."""
    order = sorted(range(len(scores)), key=lambda row: (math.isnan(scores[row]), -scores[row], row))
    kept = set(order[: max(count, 0)])
    return [row in kept for row in range(len(scores))]


def keep_random(total: int, count: int, *, seed: int, step: tuple[int, ...]) -> list[bool]:
    """Keep `count` of `total` at random, from a generator seeded by (seed, step): the same subset on every process."""
    # The last number tells this use of the seed from others; numpy takes missing trailing numbers for zeros.
    chosen = np.random.default_rng([seed, *step, 2]).permutation(total)[: max(count, 0)]
    kept = set(chosen.tolist())
    return [row in kept for row in range(total)]


class KeepRatio:
    """The filter's keep ratio: constant, or an exponential moving average of past probe accuracy.

    The average starts at `initial` and moves by `weight` towards each step's probe accuracy (reference
    implementation: weight 0.1, start 0.08). Its state belongs into checkpoints.
    """

    EMA_WEIGHT = 0.1

    def __init__(self, initial: float, schedule: str = "constant") -> None:
        self.schedule = schedule
        self.value = initial

    def update(self, probe_accuracy: float) -> None:
        if self.schedule == "accuracy_ema":
            self.value += self.EMA_WEIGHT * (probe_accuracy - self.value)

    def state_dict(self) -> dict[str, float | str]:
        return {"schedule": self.schedule, "value": self.value}

    def load_state_dict(self, state: dict[str, float | str]) -> None:
        if state["schedule"] == self.schedule == "accuracy_ema":
            self.value = float(state["value"])
