"""Trajectories as plain text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rex_rag.visualization.escape import without_invisible
from rex_rag.visualization.files import write_text
from rex_rag.visualization.records import checked_segments, facts, headline


def trajectory_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Trajectory records as plain text, each segment behind its kind.

    A terminal that shows it is sent no control sequence of a passage's.

    Raises:
        ValueError: for a record without segments list or with an unknown segment kind, by its index.
    """
    blocks = []
    for index, record in enumerate(records):
        known = "\n".join(f"{name}: {without_invisible(' '.join(value.split()))}" for name, value in facts(record))
        segments = "\n".join(
            # Indented, so that no text can pass for the label of a segment.
            f"[{kind.name}]\n" + "\n".join(f"    {without_invisible(line)}" for line in text.strip().splitlines())
            for kind, text in checked_segments(index, record)
        )
        blocks.append(f"=== #{index} {headline(record)}\n{known}\n{segments}\n")
    return "\n".join(blocks) or "No trajectories were recorded.\n"


def write_trajectory_text(records: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Write `trajectory_text` of records as a file, and return its path."""
    return write_text(path, trajectory_text(records))
