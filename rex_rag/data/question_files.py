"""Files and data sets of questions, opened as rows that each know their place; values stay as they stand there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.data.question_rows import QuestionError
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.wording import shorten

if TYPE_CHECKING:
    from datasets import Dataset

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")

LocatedRow = tuple[str, Mapping[str, Any]]


def has_file_suffix(path: Path) -> bool:
    """Whether a path ends like a file of questions."""
    return path.name.endswith(FILE_SUFFIXES)


def open_rows(
    path: str,
    *,
    question_column: str,
    name: str | None = None,
    data_files: Any = None,
    split: str | None = None,
    revision: str | None = None,
    wanted: Callable[[str], bool] = lambda column: True,
) -> tuple[str, list[str], list[LocatedRow]]:
    """Read a local file, a folder, or a dataset of the Hub; all but `question_column` as for `datasets.load_dataset`.

    Args:
        question_column: what tells a row from a file that is one JSON object around its rows.
        wanted: columns of a folder or dataset that are worth decoding.

    Returns:
        What to call the source, the names of all its columns, and its rows, each with the place to name in an error.

    Raises:
        QuestionError: for a source that is missing, empty or malformed.
    """
    file = Path(path).expanduser()
    if file.is_dir() or not has_file_suffix(file):
        dataset = _load_dataset(path, name, data_files, split, revision)
        where = f"{path}{f' ({name})' if name else ''}, split {split}{f'@{revision}' if revision else ''}"
        # Decoding metadata, whole documents in some sets, would take longer than all the rest.
        narrow = dataset.select_columns([column for column in dataset.column_names if wanted(column)])
        return where, dataset.column_names, list(_numbered(where, narrow))
    given = {"name": name, "data_files": data_files, "split": split, "revision": revision}
    if any(value is not None for value in given.values()):
        said = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
        raise QuestionError(f"{path}: {said}: a file has none of these; leave them out")
    if not file.is_file():
        raise QuestionError(f"{path}: no such file; check the path (working directory: {Path.cwd()})")
    read = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}.get(file.suffix, _json_lines)
    rows = list(read(file, path))
    if not rows:
        raise QuestionError(f"{path}: there is no question in it; fetch or write it again")
    if len(rows) == 1 and not isinstance(rows[0][1].get(question_column), str):
        _refuse_rows_in_one_object(path, rows[0][1])
    return path, list(dict.fromkeys(column for _, row in rows for column in row)), rows


def column_names(path: str, wanted: Sequence[str]) -> list[str]:
    """The columns of a file of questions: of its first row, and of all where one that is wanted is not among these.

    Raises:
        QuestionError: for a file that is missing, empty or malformed.
    """
    file = Path(path).expanduser()
    lazy = {".csv": _csv_rows, ".jsonl": _json_lines, ".gz": _json_lines}.get(file.suffix)
    if file.is_file() and lazy is not None:
        _, row = next(iter(lazy(file, path)), ("", {}))
        if all(name in row for name in wanted):
            return list(row)
    return open_rows(path, question_column=wanted[0])[1]


def _json_lines(file: Path, path: str) -> Iterator[LocatedRow]:
    rows = iter_json_objects(file, QuestionError, object_pairs_hook=_unique_keys)
    return ((f"{path}, line {number}", row) for number, row in rows)


def _json_rows(file: Path, path: str) -> Iterator[LocatedRow]:
    """An array of objects, or one object a line."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        if not file.read_bytes()[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _json_lines(file, path)
            return
        raise QuestionError(f"{path}: broken JSON ({error}); the file must hold one array of objects") from error
    for place, row in _numbered(path, rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict):
            raise QuestionError(f"{place}: an object is needed, found {shorten(row)}")
        yield place, row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return held


def _refuse_rows_in_one_object(path: str, held: Mapping[str, Any]) -> None:
    """Say what a file is whose one JSON object is no row."""
    keys = ", ".join(map(str, held))
    lists = [key for key, value in held.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        raise QuestionError(
            f"{path}: one JSON object with the keys {keys}; the rows are under {' or '.join(map(repr, lists))}: save "
            "that list"
        )
    if held and (all(isinstance(v, dict) for v in held.values()) or all(isinstance(v, list) for v in held.values())):
        raise QuestionError(
            f"{path}: one JSON object of columns, or of rows by name, as pandas' to_json writes a table ({keys}); "
            'save a list of rows: to_json(orient="records")'
        )


def _csv_rows(file: Path, path: str) -> Iterator[LocatedRow]:
    """Rows under a line of column names. Every cell is text, as it stands there; an empty one is a null."""
    # Readers that guess types turn "007" into 7 and the choice "None" into no choice.
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise QuestionError(f"{path}, line 1: a column's name stands there twice; rename one")
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise QuestionError(
                        f"{place}: the row has not {len(names)} cells as the first line has; quote cells that hold a "
                        "comma, and leave out none"
                    )
                yield place, {name: cell or None for name, cell in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise QuestionError(
                f"{path}, after line {reader.line_num}: not readable CSV in UTF-8 ({error}); write it again"
            ) from error


def _parquet_rows(file: Path, path: str) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise QuestionError(f"{path}: not a readable parquet file ({error}); write or fetch it again") from error
    return _numbered(path, table.to_pylist())


def _load_dataset(path: str, name: str | None, data_files: Any, split: str | None, revision: str | None) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    local = Path(path).expanduser()
    if not local.is_dir() and (local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise QuestionError(
            f"{path}: neither a {', '.join(FILE_SUFFIXES)} file nor a folder nor a dataset's name; check the path "
            f"(working directory: {Path.cwd()})"
        )
    if split is None:
        raise QuestionError(f"{path}: a dataset of the Hub needs `split:`, for example test")
    try:
        if not local.is_dir() or not any((local / kind).exists() for kind in ("state.json", "dataset_dict.json")):
            where = str(local) if local.is_dir() else path
            return load_dataset(where, name, data_files=data_files, split=split, revision=revision)
        stored = load_from_disk(str(local))
        return stored[split] if isinstance(stored, DatasetDict) else stored
    # The library raises anything from KeyError to its own and the network's errors here; all mean the same to a user.
    except Exception as error:
        raise QuestionError(
            f"{path} (name={name!r}, data_files={data_files!r}, split={split!r}) cannot be loaded: "
            f"{type(error).__name__}: {shorten(str(error), 300)}. Check name and split, or fetch it and name the file"
        ) from error


def _numbered(where: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[LocatedRow]:
    for number, row in enumerate(rows, start=1):
        yield f"{where}, row {number}", row
