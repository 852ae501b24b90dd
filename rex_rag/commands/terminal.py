"""What commands share at the terminal: numbers read from it, text of others written to it."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An integer of at least 1, for `argparse`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def printable(text: str) -> str:
    """Passages and models are untrusted: without this they could send control sequences to the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
