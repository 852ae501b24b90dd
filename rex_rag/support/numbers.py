"""Numbers among values of any kind, and durations in words."""

from __future__ import annotations

import math


def is_number(value: object) -> bool:
    """Whether a value is a finite number; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def clock(seconds: float) -> str:
    """A duration as hours:minutes:seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
