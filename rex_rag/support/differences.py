"""In what two records of settings differ, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_HASH = re.compile(r"[0-9a-f]{64}")
_HASH_DIGITS = 12
# Characters of a value that a line shows.
_SHOWN = 80


def paired(first: Any, second: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, value) of every leaf of two nested mappings; what one lacks is `None` there."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        yield name, first, second
        return
    for key in [*first, *(key for key in second if key not in first)]:
        yield from paired(first.get(key), second.get(key), f"{name}.{key}" if name else str(key))


def difference(name: str, first: Any, second: Any) -> str:
    """One line: a name and two values, long ones from where they part."""
    texts = [_written(value) for value in (first, second)]
    # Long texts, prompts say, may differ late.
    same = next((place for place, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - _SHOWN // 2) if max(map(len, texts)) > _SHOWN else 0
    return f"{name}: {_short(texts[0], start)} against {_short(texts[1], start)}"


def _written(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):  # there in one of the cards alone
        return _written(value.get("description") or value.get("sha256") or repr(value))
    if isinstance(value, str):
        return value[:_HASH_DIGITS] if _HASH.fullmatch(value) else value
    return repr(value)


def _short(text: str, start: int) -> str:
    end = start + _SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
