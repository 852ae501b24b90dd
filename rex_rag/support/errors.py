"""What a user can mend, told apart from a bug, which keeps its traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rex_rag.support.wording import visible

EXPECTED_ERROR = 2


class UserError(ValueError):
    """Something that the user can mend: the message says the value, the reason and the way out."""


class RunEnded(RuntimeError):
    """A run ended before it was done, and what it could save is saved; the message says why and how to go on."""

    exit_code = 1


def one_line(error: Exception) -> str | None:
    """What to say of an error that the user can mend; None for anything else, a bug, which keeps its traceback."""
    import httpx
    import yaml

    # What Python 3.11 makes of ELOOP where it resolves a path.
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return visible(f"{error}; name a path that leads somewhere")
    if isinstance(error, httpx.TransportError):
        return visible(f"no connection ({type(error).__name__}: {error}); check the network, or work without it")
    if not isinstance(error, UserError | OSError | yaml.YAMLError):
        return None
    if isinstance(error, OSError) and error.strerror and error.filename:
        return visible(f"{error.filename}: {error.strerror}")
    return visible(str(error))


def refuse(error: Exception) -> int:
    """Print what the user can mend and return a script's exit code; anything else is raised again."""
    message = str(error) if isinstance(error, RunEnded) else one_line(error)
    if message is None:
        raise error
    sys.stderr.write(f"error: {message}\n")
    return error.exit_code if isinstance(error, RunEnded) else EXPECTED_ERROR


@contextmanager
def from_the_user() -> Iterator[None]:
    """Around what reads the user's words by others' code: its ValueErrors are about these words."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
