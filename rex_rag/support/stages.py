"""What this process is doing now, by name, for whoever asks why it takes so long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """The stages that a process is inside of, outermost first. One writes, others may read at any time."""

    def __init__(self) -> None:
        self.now: tuple[str, ...] = ()
        self.since = time.monotonic()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Be in a stage as long as the block runs, and back in the one around it afterwards."""
        outer = self.now
        self._enter((*outer, name))
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, stages: tuple[str, ...]) -> None:
        self.now, self.since = stages, time.monotonic()


STAGES = Stages()  # a process trains one model at a time
