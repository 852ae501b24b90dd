"""Says which process waits in which stage, where a step stands still, instead of silence until a timeout of NCCL's."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rex_rag.support.stages import STAGES

_PACKAGE = str(Path(__file__).resolve().parents[1])
_COLLECTIVES = ("torch/distributed", "accelerate/utils/operations.py", "deepspeed/comm")


@contextmanager
def watched(patience: float, rank: int, processes: int, step: Callable[[], int]) -> Iterator[None]:
    """As long as the block runs, say on stderr when this process has been in one stage for `patience` seconds.

    The line comes again after twice the time, four times, and so on. Every process watches itself, so that the one
    that the others wait for speaks too.

    Args:
        patience: seconds; 0 watches nothing.
        step: the update that is being worked on.
    """
    if patience <= 0:
        yield
        return
    main, done, began = threading.get_ident(), threading.Event(), time.monotonic()

    def watch() -> None:
        told_of, times = began, 0
        while not done.wait(patience / 10):
            stages, since = STAGES.of(main)
            since = max(since, began)
            if since != told_of:
                told_of, times = since, 0
            waited = time.monotonic() - since
            if waited >= patience * 2**times:
                times += 1
                place, is_collective = _place(main)
                stage = " > ".join(stages) or "between stages"
                what = "waits for the other processes in" if is_collective and processes > 1 else "is in"
                sys.stderr.write(
                    f"watchdog: step {step()}, process {rank} of {processes} {what} stage '{stage}' for {waited:.0f} "
                    f"s ({place})\n"
                )
                sys.stderr.flush()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _place(thread: int) -> tuple[str, bool]:
    """Where a thread is: the innermost line of this package and the innermost of all; whether it waits for others."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "ended", False
    frames = traceback.extract_stack(frame)
    own = next((one for one in reversed(frames) if one.filename.startswith(_PACKAGE)), None)
    named = [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in (own, frames[-1]) if one is not None]
    collective = any(part in one.filename for one in frames for part in _COLLECTIVES)
    return ", ".join(dict.fromkeys(named)), collective
