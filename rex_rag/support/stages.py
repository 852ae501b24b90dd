"""What a thread is doing now, by name, for whoever asks why it takes so long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """The stages that threads are inside of. A thread writes its own; others may read them at any time."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._of: dict[int, tuple[tuple[str, ...], float]] = {}

    def of(self, thread: int) -> tuple[tuple[str, ...], float]:
        """A thread's stages, outermost first, and since when (`time.monotonic`) they have been these."""
        return self._of.get(thread, ((), self._began))

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Be in a stage as long as the block runs, and back in the one around it afterwards."""
        thread = threading.get_ident()
        outer, _ = self.of(thread)
        self._of[thread] = (*outer, name), time.monotonic()
        try:
            yield
        finally:
            self._of[thread] = outer, time.monotonic()


STAGES = Stages()
