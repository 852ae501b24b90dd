"""What is being done while nothing else is to be seen: a line a stage, on standard error."""

from __future__ import annotations

import os
import sys
import time

from rex_rag.support.wording import visible

_BEGAN = time.monotonic()


def announce(text: str) -> None:
    """Say what begins now, behind the seconds since the program began; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"[{time.monotonic() - _BEGAN:3.0f} s] {visible(text)}\n")
        sys.stderr.flush()
