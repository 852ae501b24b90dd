"""Which logged figures tell that a policy breaks, and from where on. No trainer, no files, no torch.

The bounds were set on HopWorld, by healthy runs and by runs broken on purpose (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rex_rag.support.numbers import is_number

PATIENCE = 3  # logs in a row with a figure out of bounds
FIRST = 5  # logs whose median tells what a run began with
RECENT = 20  # logs whose median tells what it has been like lately


@dataclass(frozen=True)
class Bound:
    """Where a logged figure is out of bounds, seen from a reference: its median at the start, or lately."""

    is_out: Callable[[float, float], bool]
    lately: bool = False


BOUNDS = {
    "entropy": Bound(lambda value, start: value > max(3 * start, start + 1)),
    "grad_norm": Bound(lambda value, lately: value > max(50 * lately, 1), lately=True),
    "kl/policy": Bound(lambda value, start: value > 2),
    "likelihood/good": Bound(lambda value, start: value < start - 2),
    "repetitive/rate": Bound(lambda value, start: value > max(0.5, start + 0.3)),
    "garbled/rate": Bound(lambda value, start: value > start + 0.2),
    "invalid_actions/mean": Bound(lambda value, start: value > max(1.5, start + 1)),
    "unanswered/rate": Bound(lambda value, start: value > max(0.5, start + 0.3)),
    "completions/mean_length": Bound(lambda value, lately: value > 4 * lately, lately=True),
}


@dataclass
class Figures:
    """The figures of a run's logs, and since when one of them is out of bounds. Knows no trainer and no files.

    first, recent: name -> values of logs within bounds, the earliest and the latest. out_since: the step of the first
    log of those in a row that are out of bounds; out_count: how many they are.
    """

    first: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    out_since: int | None = None
    out_count: int = 0

    def add(self, step: int, logs: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """Take a log in; returns (value, reference) of every figure out of bounds."""
        values = {name: float(logs[name]) for name in BOUNDS if is_number(logs.get(name))}
        out = {}
        for name, value in values.items():
            known = (self.recent if BOUNDS[name].lately else self.first).get(name)
            if known and BOUNDS[name].is_out(value, median(known)):
                out[name] = (value, median(known))
        if out:
            self.out_since = step if self.out_since is None else self.out_since
            self.out_count += 1
            return out
        self.out_since, self.out_count = None, 0
        for name, value in values.items():
            self.first[name] = [*self.first.get(name, []), value][:FIRST]
            self.recent[name] = [*self.recent.get(name, []), value][-RECENT:]
        return out
