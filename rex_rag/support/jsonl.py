"""JSON lines, plain or gzipped, read strictly: what is wrong is reported with file, line, reason and way out."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rex_rag.support.wording import shorten


def iter_json_objects(
    path: str | Path, error_type: type[ValueError], object_pairs_hook: Callable[[list], Any] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of every non-blank line of a UTF-8 file; byte order marks are allowed.

    Args:
        object_pairs_hook: as for `json.loads`.

    Raises:
        error_type: for a missing or empty file, text that is not UTF-8, broken JSON, a line that is not an object.
    """
    path = Path(path)
    if not path.exists():
        raise error_type(f"{path}: no such file; check the path (working directory: {Path.cwd()})")
    if path.is_dir():
        raise error_type(f"{path}: this is a folder; name the JSON lines file inside it")
    found = False
    number = 0
    with open_lines(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                row = _parse_line(line, f"{path}, line {number}", error_type, object_pairs_hook)
                if row is not None:
                    found = True
                    yield number, row
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise error_type(
                f"{path}, after line {number}: broken gzip data ({error}); fetch or compress the file again"
            ) from error
    if not found:
        raise error_type(f"{path}: the file is empty; it needs one JSON object a line")


def open_lines(path: Path) -> io.BufferedIOBase:
    """Open a file, decompressed if its name ends in `.gz`, for reading by lines of bytes.

    Binary mode splits at "\n" alone; text mode would also hide which line a decoding error comes from.
    """
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse_line(
    line: bytes, where: str, error_type: type[ValueError], object_pairs_hook: Callable[[list], Any] | None
) -> dict[str, Any] | None:
    try:
        # Files that were put together have byte order marks in their midst.
        text = line.decode("utf-8").lstrip("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise error_type(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); re-encode the file") from error
    if not text:
        return None
    try:
        row = json.loads(text, object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{where}: broken JSON ({error}) in {shorten(text)}; {_way_out(text)}") from error
    if not isinstance(row, dict):
        raise error_type(
            f"{where}: a JSON object is needed, found {type(row).__name__} {shorten(text)}; {_way_out(text)}"
        )
    return row


def _way_out(text: str) -> str:
    if text.startswith("["):
        return "this is a JSON array: write one object a line, as `jq -c '.[]' FILE` does"
    return "each line must be one whole JSON object"
