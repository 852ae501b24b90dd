"""Uploads of a trained model that end, one way or the other: further attempts, and a line at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from accelerate.logging import get_logger

from rex_rag.support.errors import RunEnded

logger = get_logger(__name__)

PAUSES = (5.0, 30.0)  # seconds before a further attempt


class NotPushed(RunEnded):
    """The Hub did not take the model; it is whole on disk, and the message says how to push it later."""


def push(upload: Callable[[], object], folder: str, repository: str, pauses: tuple[float, ...] = PAUSES) -> None:
    """Upload, and again where that fails.

    Raises:
        NotPushed: when the last attempt failed too.
    """
    for attempt, pause in enumerate((*pauses, None), start=1):
        try:
            upload()
            return
        except Exception as error:  # the library's own, and those of whatever carries its requests
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if pause is None or "401" in cause or "403" in cause:  # a token that may not will not
                raise NotPushed(
                    f"{repository} was not pushed ({cause}). The model is whole in {folder}; push it with "
                    f"`hf upload {repository} {Path(folder)} . --exclude 'checkpoint-*'`"
                ) from error
            logger.warning(f"attempt {attempt} to push {repository} failed ({cause}); again in {pause:g} s")
            time.sleep(pause)
