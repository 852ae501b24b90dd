"""Rows of a question set as questions to be answered: each becomes a `Question`, or the load fails and names it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from rex_rag.data.question_files import LocatedRow
from rex_rag.data.question_rows import (
    BLANK_ANSWERS,
    Columns,
    QuestionError,
    is_alias_of,
    no_column,
    read_row,
    text_of,
)
from rex_rag.evaluation.obfuscation import reveal
from rex_rag.evaluation.records import Question
from rex_rag.support.wording import shorten

logger = logging.getLogger(__name__)

# Sets carry whole documents in their metadata; a prediction keeps what fits beside it.
_METADATA_CHARACTERS = 200


@dataclass(frozen=True)
class BenchmarkColumns(Columns):
    """Where a row holds what, see `BenchmarkSource`."""

    choices: str | list[str] | dict[str, str] | None = None
    answers_are: str = "letter"
    documents: str | None = None
    canary: str | None = None

    def are_read(self, name: str) -> bool:
        """Whether a column of this name is looked at; sets may hold whole documents in others."""
        own = (self.id, self.question, *self.of_answers, *self.of_single_choices, self.choices, self.documents)
        return name in (*own, "metadata") or is_alias_of(name, self)

    @property
    def of_single_choices(self) -> list[str]:
        """The columns that hold one choice each."""
        if self.choices is None or isinstance(self.choices, str):
            return []
        return list(self.choices.values() if isinstance(self.choices, Mapping) else self.choices)


def questions_of(
    rows: Iterable[LocatedRow], held: Iterable[str], columns: BenchmarkColumns, where: str
) -> tuple[Question, ...]:
    """Turn every row into a question, in order. Rows without an id are numbered from 0.

    Args:
        held: the names of all columns. One row may lack a column, as JSON lines leave out what is null.

    Raises:
        QuestionError: for a row that cannot be used, an id that two rows share, a column that all rows lack.
    """
    # Without an `id` rows are numbered.
    named = {
        "id_column": {columns.id} - {Columns.id},
        "answers_column": columns.of_answers,
        "choices_column": columns.of_single_choices,
        "documents_column": [columns.documents] if columns.documents else [],
    }
    for setting, names in named.items():
        if absent := [name for name in names if name not in held]:
            raise no_column(where, absent, setting, held)
    questions: list[Question] = []
    places: dict[str, str] = {}
    blank_aliases = 0
    for number, (place, row) in enumerate(rows):
        question, blank = _question(row, columns, place, str(number))
        blank_aliases += blank
        if question.id in places:
            raise QuestionError(
                f"{place}: the id {question.id!r} already occurs at {places[question.id]}; make ids unique, or leave "
                "them all out to number the rows"
            )
        places[question.id] = place
        questions.append(question)
    if blank_aliases:
        logger.warning(BLANK_ANSWERS, where, blank_aliases)
    return tuple(questions)


def _question(row: Mapping[str, Any], columns: BenchmarkColumns, place: str, default_id: str) -> tuple[Question, int]:
    """The row's question, and how many of its gold answers were blank."""
    for names, setting in (([columns.question], "question_column"), (columns.of_answers, "answers_column")):
        if not any(name in row for name in names):
            raise no_column(place, names, setting, row)
    if columns.canary is not None:
        hidden = [name for name in (columns.question, *columns.of_answers) if isinstance(row.get(name), str)]
        row = {**row, **{name: reveal(row[name], columns.canary, place) for name in hidden}}
    read = read_row(row, columns, place, may_be_lists=columns.choices is not None)
    if not read.question:
        raise QuestionError(f"{place}: the question is {shorten(row[columns.question])}; a row needs one: repair it")
    if not read.answers:
        values = [row.get(name) for name in columns.of_answers]
        raise QuestionError(
            f"{place}: the gold answers are {shorten(values[0] if len(values) == 1 else values)}; a row needs one at "
            "least: repair it"
        )
    choices = None if columns.choices is None else _choices(row, columns.choices, place)
    golden = read.answers
    if choices is not None:
        golden = [_letter(answer, choices, columns.answers_are, place) for answer in golden]
    metadata = _metadata(row.get("metadata"))
    documents = _documents(row, columns, place)
    return Question(read.id or default_id, read.question, tuple(golden), choices, metadata, documents), read.blank


def _documents(row: Mapping[str, Any], columns: BenchmarkColumns, place: str) -> tuple[str, ...]:
    """The ids of the row's gold documents: its own texts, or the `docid` or `id` of mappings; none where none is
    asked for."""
    if columns.documents is None:
        return ()
    held = row.get(columns.documents)
    entries = held if isinstance(held, list | tuple) else []
    ids = [entry.get("docid", entry.get("id")) if isinstance(entry, Mapping) else entry for entry in entries]
    texts = [text_of(entry, "id of a document", place) for entry in ids]
    if not texts or not all(texts):
        raise QuestionError(
            f"{place}: the gold documents are {shorten(held)}; a row needs a list of ids, or of objects with a docid: "
            "repair it, or leave documents_column out"
        )
    if columns.canary is not None:
        texts = [reveal(text, columns.canary, place) for text in texts]
    return tuple(dict.fromkeys(texts))


def _choices(row: Mapping[str, Any], wanted: str | list[str] | dict[str, str], place: str) -> dict[str, str]:
    """Letter -> text of the choices that this row has."""
    if isinstance(wanted, str):
        if wanted not in row:
            raise no_column(place, [wanted], "choices_column", row)
        held = row[wanted]
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
        raise QuestionError(f"{place}: the choices are {shorten(held)}; give a list or a mapping of letters to texts")
    pairs = [(str(label).strip().upper(), text_of(text, "choice", place)) for label, text in pairs if text is not None]
    choices = dict(pairs)
    wrong = [letter for letter in choices if len(letter) != 1 or letter not in ascii_uppercase]
    if wrong or not all(choices.values()) or len(choices) < max(2, len(pairs)):
        raise QuestionError(
            f"{place}: the choices are {shorten(held, 160)}; at least two are needed, each under a letter from A to Z "
            "of its own and with a text"
        )
    return dict(sorted(choices.items()))


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
    raise QuestionError(
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
