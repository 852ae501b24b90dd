"""A run that is told to stop saves first: SIGTERM, SIGINT and SIGUSR1 end it behind the step in flight."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from rex_rag.support.errors import RunEnded

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(RunEnded):
    """A signal ended the run behind a step that is saved."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name}: stopped and saved {checkpoint}; the same command goes on with --resume_from_checkpoint true"
        )
        self.exit_code = 128 + number


class StopOnSignal(TrainerCallback):
    """Saves and ends a run behind the step in which any process got a signal; a second signal ends it at once.

    Args:
        max_over_ranks: the maximum of an integer over all processes, which have to stop at the same step.
    """

    def __init__(self, max_over_ranks: Callable[[int], int]) -> None:
        self._max_over_ranks = max_over_ranks
        self._received = 0
        self.stopped: Stopped | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as long as the block runs; only a main thread can."""
        self._received, self.stopped = 0, None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self._received:
            raise KeyboardInterrupt(f"a second signal, {signal.Signals(number).name}: ended without saving")
        self._received = number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        number = self._max_over_ranks(self._received)
        if number:
            self.stopped = Stopped(number, Path(args.output_dir) / f"checkpoint-{state.global_step}")
            control.should_save = control.should_training_stop = True
