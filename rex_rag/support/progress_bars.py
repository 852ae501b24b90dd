"""Progress of long work on screen: rows done, rate and time left."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm

# A log file should show that work goes on, not every refresh of a bar.
SECONDS_BETWEEN_LOG_LINES = 10.0


def progress_bar(total: int, description: str, unit: str = "rows", done: int = 0) -> tqdm:
    """A bar on standard error over `total` units of which `done` were there before; close it, or use it in a `with`.

    The rate counts what this run did, so the time left stays right after a resume.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=f" {unit}",
        unit_scale=total >= 10_000,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LOG_LINES,
    )
