"""Command lines on which every option can be written with - or with _ between its words, as the trainer's own can."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any

LISTS = ("corpus", "retriever")  # of a recipe: `rex-rag ask` and `search` take them piece by piece


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes `--top-k` and `--top_k` alike, and so do its subcommands."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As in the parent; the spelling that is left out is added behind the one that is given."""
        return super().add_argument(*dict.fromkeys([*names, *map(_respelled, names)]), **settings)


def _respelled(name: str) -> str:
    if not name.startswith("--"):
        return name
    words = name[2:]
    return "--" + (words.replace("-", "_") if "-" in words else words.replace("_", "-"))


def with_lists_joined(words: Sequence[str], names: Collection[str]) -> list[str]:
    """The words of a command line on which a list given piece by piece, `--corpus a --corpus b`, is given as a whole.

    argparse would keep the last piece, without a word. `none` leaves out what stands before it.

    Args:
        names: of the lists, with _ between words.
    """
    others: list[str] = []
    pieces: dict[str, list[list[str]]] = {}
    values = others
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name not in names:
            values = others
            values.append(word)
            continue
        values = [value] if equals else []
        pieces.setdefault(name, []).append(values)
    for name, given in pieces.items():
        last_none = max((place for place, each in enumerate(given) if each == ["none"]), default=-1)
        kept = given[last_none + 1 :] or given[-1:]
        others += [f"--{name}", *(value for each in kept for value in each)]
    return others
