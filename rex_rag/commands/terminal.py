"""What commands share at the terminal: numbers read from it, errors and text of others written to it."""

from __future__ import annotations

import argparse
import sys

EXPECTED_ERROR = 2


def positive(text: str) -> int:
    """An integer of at least 1, for `argparse`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def printable(text: str) -> str:
    """Passages and models are untrusted: without this they could send control sequences to the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(error: Exception) -> str | None:
    """What to say of an error that the user can mend; None for anything else, a bug, which keeps its traceback."""
    import yaml

    from rex_rag.retrieval.base import RetrievalError
    from rex_rag.retrieval.index.estimate import NotEnoughRoom

    if not isinstance(error, ValueError | OSError | RetrievalError | NotEnoughRoom | yaml.YAMLError):
        return None
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def refuse(error: Exception) -> int:
    """Print what the user can mend and return a script's exit code; anything else is raised again."""
    message = one_line(error)
    if message is None:
        raise error
    print(f"error: {message}", file=sys.stderr)
    return EXPECTED_ERROR
