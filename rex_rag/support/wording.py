"""How messages put numbers, values and unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun as a message has them: `1 passage`, `2,000 passages`, `1 query`."""
    figure = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{figure} {noun if number == 1 else plural or f'{noun}s'}"


def visible(text: str) -> str:
    """Text for a terminal or a log: control characters, which could steer it or hide what stands there, spelled."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def shorten(value: object, limit: int = 80) -> str:
    """A value as it may appear in an error message: its repr, cut to `limit` characters."""
    try:
        text = repr(value)
    except RecursionError:  # a value from JSON may be nested as deeply as the parser goes
        return f"a {type(value).__name__} that is nested too deeply to be shown"
    return text if len(text) <= limit else text[:limit] + "…"


def describe_unknown(names: Sequence[str], known: Sequence[str]) -> str:
    """An error text for keys that do not exist, each with the nearest one that does."""
    described = []
    for name in names:
        near = next(iter(difflib.get_close_matches(name, known, n=1)), None)
        described.append(f"{name!r} (did you mean {near}?)" if near else repr(name))
    return f"unknown keys: {', '.join(described)}; correct or remove them"
