"""What every command begins with: logging that shows untrusted text as text, and a last word at a crash."""

from __future__ import annotations

import faulthandler
import logging
import sys

from rex_rag.support.wording import visible


class _Visible(logging.Formatter):
    """Passages and servers are quoted in messages: no control sequence of theirs reaches the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def start_logging() -> None:
    """Warnings to standard error, and where the process was if a mapped file that was cut short ends it."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
