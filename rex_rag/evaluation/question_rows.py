"""Rows of a question file, read strictly: every row becomes a `Question`, or the load fails and names its line."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rex_rag.data.jsonl import iter_json_objects, shorten
from rex_rag.evaluation.records import Question

logger = logging.getLogger(__name__)

# Sets carry whole documents in their metadata; a prediction keeps what fits beside it.
_METADATA_CHARACTERS = 200
# How a list looks in a cell of CSV, and in columns that hold JSON.
_WRITTEN_LIST = re.compile(r"\[\s*(['\"]).*['\"]\s*\]", re.DOTALL)
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")

LocatedRow = tuple[str, Mapping[str, Any]]


class BenchmarkError(ValueError):
    """A benchmark cannot be loaded; the message names the source, the reason and the way out."""


@dataclass(frozen=True)
class Columns:
    """Where a row holds what, see `BenchmarkSource`."""

    question: str = "question"
    answers: str = "golden_answers"
    id: str = "id"
    choices: str | list[str] | dict[str, str] | None = None
    answers_are: str = "letter"

    @property
    def of_single_choices(self) -> list[str]:
        """The columns that hold one choice each."""
        if self.choices is None or isinstance(self.choices, str):
            return []
        return list(self.choices.values() if isinstance(self.choices, Mapping) else self.choices)


def read_rows(
    path: str, config: str | None = None, split: str | None = None, revision: str | None = None
) -> tuple[str, Iterator[LocatedRow]]:
    """Open a local file or a dataset of the Hub.

    Returns:
        What to call the source, and its rows, each with the place to name in an error.

    Raises:
        BenchmarkError: for a source that is missing, empty or malformed (perhaps only once rows are drawn).
    """
    file = Path(path).expanduser()
    suffix = "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix
    if suffix not in FILE_SUFFIXES:
        return _hub_rows(path, config, split, revision)
    if config is not None or split is not None or revision is not None:
        raise BenchmarkError(
            f"{path}: config={config!r}, split={split!r}, revision={revision!r}: a file has none of these; leave them "
            "out"
        )
    if not file.is_file():
        raise BenchmarkError(f"{path}: no such file; check the path (working directory: {Path.cwd()})")
    if suffix == ".parquet":
        return path, _parquet_rows(file, path)
    if suffix == ".csv":
        return path, _csv_rows(file, path)
    if suffix == ".json" and file.read_bytes()[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return path, _array_rows(file, path)
    return path, ((f"{path}, line {number}", row) for number, row in iter_json_objects(file, BenchmarkError))


def _parquet_rows(file: Path, path: str) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise BenchmarkError(f"{path}: not a readable parquet file ({error}); write or fetch it again") from error
    return _numbered(path, table.to_pylist())


def _csv_rows(file: Path, path: str) -> Iterator[LocatedRow]:
    """Rows under a line of column names. Every cell is text, as it stands there; an empty one is a null."""
    # Readers that guess types turn "007" into 7 and the choice "None" into no choice.
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise BenchmarkError(
                        f"{place}: the row has not {len(reader.fieldnames or ())} cells as the first line has; quote "
                        "cells that hold a comma, and leave out none"
                    )
                yield place, {name: cell or None for name, cell in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise BenchmarkError(
                f"{path}, after line {reader.line_num}: not readable CSV in UTF-8 ({error}); write it again"
            ) from error


def _array_rows(file: Path, path: str) -> Iterator[LocatedRow]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: broken JSON ({error}); the file must hold one array of objects") from error
    for place, row in _numbered(path, rows):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{place}: an object is needed, found {shorten(row)}")
        yield place, row


def _hub_rows(
    path: str, config: str | None, split: str | None, revision: str | None
) -> tuple[str, Iterator[LocatedRow]]:
    if Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise BenchmarkError(f"{path}: neither a {', '.join(FILE_SUFFIXES)} file nor a dataset's name; check the path")
    if split is None:
        raise BenchmarkError(f"{path}: a dataset of the Hub needs `split:`, for example test")
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=split, revision=revision)
    # The library raises anything from KeyError to the network's errors here; all mean the same to a user.
    except Exception as error:
        raise BenchmarkError(
            f"{path} (config={config!r}, split={split!r}) cannot be loaded: {type(error).__name__}: "
            f"{shorten(str(error), 300)}. Check the name, config and split, or fetch it and name the file"
        ) from error
    where = f"{path}{f' ({config})' if config else ''}, split {split}{f'@{revision}' if revision else ''}"
    return where, _numbered(where, rows)


def _numbered(where: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[LocatedRow]:
    for number, row in enumerate(rows, start=1):
        yield f"{where}, row {number}", row


def questions_of(rows: Iterable[LocatedRow], columns: Columns, where: str) -> tuple[Question, ...]:
    """Turn every row into a question, in order. Rows without an id are numbered from 0.

    Raises:
        BenchmarkError: for no row, a row that cannot be used, an id that two rows share.
    """
    rows = list(rows)
    held = [row for _, row in rows]
    # Without an `id` rows are numbered.
    _check_columns(held, {columns.id} - {Columns.id}, "id_column", where)
    _check_columns(held, columns.of_single_choices, "choices_column", where)
    questions: list[Question] = []
    places: dict[str, str] = {}
    blank_aliases = 0
    for number, (place, row) in enumerate(rows):
        question, blank = _question(row, columns, place, str(number))
        blank_aliases += blank
        if question.id in places:
            raise BenchmarkError(
                f"{place}: the id {question.id!r} already occurs at {places[question.id]}; make ids unique, or leave "
                "them all out to number the rows"
            )
        places[question.id] = place
        questions.append(question)
    if not questions:
        raise BenchmarkError(f"{where}: there is no question in it; fetch or write it again")
    if blank_aliases:
        logger.warning("%s: %d blank gold answers stand beside others and were left out", where, blank_aliases)
    return tuple(questions)


def _check_columns(rows: list[Mapping[str, Any]], names: Iterable[str], setting: str, where: str) -> None:
    """One row may lack such a column, as JSON lines leave out what is null; all of them means a wrong name."""
    held = dict.fromkeys(name for row in rows for name in row)
    absent = [name for name in names if name not in held]
    if rows and absent:
        raise BenchmarkError(
            f"{where}: no row has the columns {', '.join(map(repr, absent))} that {setting} names; the columns "
            f"are {', '.join(map(str, held))}. Set {setting} to the right ones"
        )


def _question(row: Mapping[str, Any], columns: Columns, place: str, default_id: str) -> tuple[Question, int]:
    """The row's question, and how many of its gold answers were blank."""
    text = _column(row, columns.question, "question_column", place)
    if not isinstance(text, str) or not text.strip():
        raise BenchmarkError(f"{place}: the question is {shorten(text)}; a row needs a non-blank string: repair it")
    value = _column(row, columns.answers, "answers_column", place)
    if columns.choices is None and isinstance(value, str) and _WRITTEN_LIST.fullmatch(value.strip()):
        raise BenchmarkError(
            f"{place}: the gold answer {shorten(value)} is a list written as text, which no answer would ever equal; "
            "make it a list, in JSON lines or parquet (or, if answers do look like this, a list of this one)"
        )
    choices = None if columns.choices is None else _choices(row, columns.choices, place)
    answers = [_answer(entry, place) for entry in (value if isinstance(value, list | tuple) else [value])]
    golden = [answer for answer in answers if answer]
    if not golden:
        raise BenchmarkError(f"{place}: the gold answers are {shorten(value)}; a row needs one at least: repair it")
    if choices is not None:
        golden = [_letter(answer, choices, columns.answers_are, place) for answer in golden]
    identity = row.get(columns.id)
    if identity is None or identity == "":
        identity = default_id
    elif isinstance(identity, bool) or not isinstance(identity, str | int) or not str(identity).strip():
        raise BenchmarkError(f"{place}: the id is {shorten(identity)}; it must be a string or an integer")
    for written in (str(identity), text, *golden, *(choices or {}).values()):
        _check_encodable(written, place)
    question = Question(
        id=str(identity),
        question=text.strip(),
        golden_answers=tuple(golden),
        choices=choices,
        metadata=_metadata(row.get("metadata")),
    )
    return question, len(answers) - len(golden)


def _column(row: Mapping[str, Any], name: str, setting: str, place: str) -> Any:
    if name not in row:
        raise BenchmarkError(
            f"{place}: there is no column {name!r}; the columns are {', '.join(map(str, row))}. Set {setting} to the "
            "right one in a .yaml description"
        )
    return row[name]


def _answer(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not _is_text(value):
        raise BenchmarkError(
            f"{place}: the gold answer {shorten(value)} is a {type(value).__name__}; give strings or a list of strings"
        )
    return str(value).strip()


def _is_text(value: Any) -> bool:
    """Whether a value may stand for a text: a string or a number, but no truth value and not NaN."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _check_encodable(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BenchmarkError(
            f"{place}: {shorten(text)} holds half a surrogate pair, which no tokenizer can encode; repair the row"
        ) from None


def _choices(row: Mapping[str, Any], wanted: str | list[str] | dict[str, str], place: str) -> dict[str, str]:
    """Letter -> text of the choices that this row has."""
    if isinstance(wanted, str):
        held = _column(row, wanted, "choices_column", place)
    elif isinstance(wanted, Mapping):
        held = {letter: row.get(name) for letter, name in wanted.items()}
    else:
        held = [row.get(name) for name in wanted]
    if isinstance(held, Mapping) and held.keys() == {"label", "text"} and isinstance(held["text"], list | tuple):
        # As ARC, OpenBookQA and CommonsenseQA have it.
        pairs = (
            list(zip(held["label"], held["text"], strict=True)) if len(held["label"]) == len(held["text"]) else None
        )
    elif isinstance(held, Mapping):
        pairs = list(held.items())
    elif isinstance(held, list | tuple) and len(held) <= len(ascii_uppercase):
        pairs = list(zip(ascii_uppercase, held, strict=False))
    else:
        pairs = None
    if pairs is None:
        raise BenchmarkError(f"{place}: the choices are {shorten(held)}; give a list or a mapping of letters to texts")
    pairs = [(str(label).strip().upper(), text) for label, text in pairs if text is not None]
    choices = dict(pairs)
    wrong = [letter for letter in choices if len(letter) != 1 or letter not in ascii_uppercase]
    blank = [text for text in choices.values() if not _is_text(text) or not str(text).strip()]
    if wrong or blank or len(choices) < max(2, len(pairs)):
        raise BenchmarkError(
            f"{place}: the choices are {shorten(held, 160)}; at least two are needed, each under a letter from A to Z "
            "of its own and with a text"
        )
    return {letter: str(text).strip() for letter, text in sorted(choices.items())}


def _letter(answer: str, choices: Mapping[str, str], answers_are: str, place: str) -> str:
    """The letter that a gold answer means."""
    if answers_are == "letter" and answer.upper() in choices:
        return answer.upper()
    # A list's place in the alphabet is its index, also where some choices are null.
    if answers_are == "index" and answer.isdecimal() and int(answer) < len(ascii_uppercase):
        letter = ascii_uppercase[int(answer)]
        if letter in choices:
            return letter
    if answers_are == "text":
        letters = [letter for letter, text in choices.items() if text == answer]
        if len(letters) == 1:
            return letters[0]
    raise BenchmarkError(
        f"{place}: the gold answer {shorten(answer)}, read as {answers_are}, is none of the choices "
        f"{shorten(dict(choices), 160)}; repair the row, or set answers_are to letter, index or text"
    )


def _metadata(value: Any) -> dict[str, Any]:
    """Short scalar entries of a row's metadata."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): entry for key, entry in value.items() if _is_short(entry)}


def _is_short(value: Any) -> bool:
    if isinstance(value, float):  # JSON has no NaN
        return math.isfinite(value)
    return isinstance(value, bool | int) or (isinstance(value, str) and len(value) <= _METADATA_CHARACTERS)
