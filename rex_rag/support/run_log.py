"""`log.jsonl` of a training run: a row a log, written as it comes, for whoever looks at a run under way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rex_rag.support.errors import UserError

LOG_FILE = "log.jsonl"


def append_row(folder: str | Path, row: Mapping[str, Any]) -> None:
    with (Path(folder) / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(folder: str | Path) -> list[dict[str, Any]] | None:
    """The rows of a run's log; `None` where it has none. A last line that is still being written is left out.

    Raises:
        UserError: for another line that is no JSON object.
    """
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: no JSON object; the file was changed since training wrote it")
        rows.append(row)
    return rows
