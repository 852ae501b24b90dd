"""Which logged figures tell that a policy breaks, and from where on. No trainer, no files, no torch.

The bounds were set on HopWorld, by healthy runs and by runs broken on purpose (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rex_rag.support.numbers import is_number

PATIENCE = 3  # logs of a figure in a row, out of bounds
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


@dataclass(frozen=True)
class Out:
    """A figure out of bounds: its last value, what it was seen from, since which step, in how many of its logs."""

    value: float
    reference: float
    since: int
    logs: int


@dataclass
class Figures:
    """The figures of a run's logs, and which of them are out of bounds.

    A figure of rollouts is in the first log of a generation alone, and stays what it was through the others.
    first, recent: name -> values within bounds, the earliest and the latest.
    """

    first: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    out: dict[str, Out] = field(default_factory=dict)
    _told: bool = False

    def add(self, step: int, logs: Mapping[str, Any]) -> bool:
        """Take a log in; returns whether a figure has been out of bounds in `PATIENCE` of its logs in a row.

        That is told once, until all are within bounds again.
        """
        for name, bound in BOUNDS.items():
            if not is_number(logs.get(name)):
                continue
            value = float(logs[name])
            known = (self.recent if bound.lately else self.first).get(name)
            if known and bound.is_out(value, median(known)):
                before = self.out.get(name)
                since, count = (before.since, before.logs) if before else (step, 0)
                self.out[name] = Out(value, median(known), since, count + 1)
                continue
            self.out.pop(name, None)
            self.first[name] = [*self.first.get(name, []), value][:FIRST]
            self.recent[name] = [*self.recent.get(name, []), value][-RECENT:]
        breaks = any(out.logs >= PATIENCE for out in self.out.values())
        told, self._told = self._told, breaks or (self._told and bool(self.out))
        return breaks and not told

    @property
    def out_since(self) -> int | None:
        """The step since which some figure has been out of bounds."""
        return min((out.since for out in self.out.values()), default=None)

    def __str__(self) -> str:
        """What is out of bounds, and what it was."""
        return ", ".join(f"{name} {out.value:.3g} (was {out.reference:.3g})" for name, out in self.out.items())
