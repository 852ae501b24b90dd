"""Values of a question file as text, read strictly: the same for training, evaluation and a trainer's own dataset.

Invariant: what is returned encodes to UTF-8 and is what an answer could be compared with; what cannot be read is a
`QuestionError` that names its place, never a text that no answer would ever equal.
"""

from __future__ import annotations

import ast
import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rex_rag.support.errors import UserError
from rex_rag.support.wording import shorten

# What neither JSON nor Python reads as a list, but numpy, pandas, Spark or a word processor made of one.
_PRINTED = re.compile(
    r"\[\s*['\"\u2018\u201c].*\]|\[(?:nan|[\d\s.,+-])*\]|\[[^\[\]]*,[^\[\]]*\]|(?:array|(?:frozen)?set|list|tuple|dict_\w+)\([\[({].*\)",
    re.DOTALL,
)
# Of the answer, as MuSiQue (answer_aliases) and PopQA (o_aliases) have them; PopQA has aliases of the subject too.
_ALIASES = re.compile(r"(?!s(?:ubj(?:ect)?)?_)[\w -]*alias(?:es)?", re.IGNORECASE)
BLANK_ANSWERS = "%s: %d blank gold answers stand beside others and were left out"
_WAYS_OUT = {
    bool: "write yes or no",
    bytes: "decode them to text",
    datetime.date: "write it as text, as an answer has it (where a library made a date of a text, name the file)",
    datetime.time: "write it as text, as an answer has it",
    Mapping: "name the column, or write the list, of its texts",
    list: "give one string",
    float: "leave out what is no number",
    Decimal: "leave out what is no number",
}


class QuestionError(UserError):
    """Questions cannot be loaded; the message names the source, the reason and the way out."""


@dataclass(frozen=True)
class Columns:
    """Where a row holds what. `answers` may be several columns, whose answers are joined."""

    question: str = "question"
    answers: str | list[str] = "golden_answers"
    id: str = "id"

    @property
    def of_answers(self) -> list[str]:
        return [self.answers] if isinstance(self.answers, str) else list(self.answers)


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A row as text. `question` is empty and `answers` has no entry where the row has none; no answer is blank.

    blank: how many blank answers were left out.
    """

    id: str | None
    question: str
    answers: list[str]
    blank: int


def read_row(row: Mapping[str, Any], columns: Columns, place: str, may_be_lists: bool = False) -> QuestionRow:
    """Read a row; `place` begins the message of an error.

    Args:
        may_be_lists: whether an answer may look like a list, as a choice's text may.

    Raises:
        QuestionError: for a value that cannot be read, and for aliases in a column that `columns` does not name.
    """
    question = row.get(columns.question)
    if question is not None and not isinstance(question, str):
        raise QuestionError(f"{place}: the question is {shorten(question)}; it must be a string: repair the row")
    found = [read_answers(row.get(name), place, may_be_lists) for name in columns.of_answers]
    unread = [name for name in map(str, row) if isinstance(columns.answers, str) and is_alias_of(name, columns)]
    answers = [answer for answers, _ in found for answer in answers]
    if aliases := [name for name in unread if _says_more(row[name], answers)]:
        raise QuestionError(
            f"{place}: the column {aliases[0]!r} holds more gold answers than {columns.answers!r}; set answers_column "
            f"to [{columns.answers}, {aliases[0]}] to read both, or to [{columns.answers}] to read it alone"
        )
    return QuestionRow(
        text_of(row.get(columns.id), "id", place) or None,
        text_of(question, "question", place),
        answers,
        sum(blank for _, blank in found),
    )


def checked_answers(row: Mapping[str, Any], place: str) -> list[str]:
    """The gold answers of a row that is not a file's, but of a dataset that a program made: nothing is converted.

    Raises:
        QuestionError: for what `read_row` refuses, for a question that is absent, and for anything but texts.
    """
    question: Any = row.get("question")
    value: Any = row.get("golden_answers")
    if not isinstance(question, str) or not text_of(question, "question", place):
        raise QuestionError(f"{place}: the question is {shorten(question)}; it must be a non-blank string")
    value = value.tolist() if hasattr(value, "tolist") else value
    entries = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(entry, str) for entry in entries) and (answers := read_answers(value, place)[0]):
        return answers
    raise QuestionError(
        f"{place}: golden_answers is {shorten(value)}; it must be a list of strings, at least one of them not blank "
        "(a string alone is a list of one). rex_rag.data.qa.load_questions makes such rows of files and datasets"
    )


def is_alias_of(name: str, columns: Columns) -> bool:
    """Whether a column that is not read seems to hold further spellings of the gold answers."""
    return name not in columns.of_answers and _ALIASES.fullmatch(name) is not None


def _says_more(value: Any, answers: list[str]) -> bool:
    """Whether a column of aliases holds what the answers do not."""
    entries = value if isinstance(value, list | tuple) else [value]
    return any(str(entry).strip() not in ("", "None", "nan", "[]", "{}", *answers) for entry in entries)


def read_answers(value: Any, place: str, may_be_lists: bool = False) -> tuple[list[str], int]:
    """The gold answers that a value holds, a string or a number or a list of them, and how many blank ones it had.

    Raises:
        QuestionError: for anything else, and for a list that was written as text.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) and not may_be_lists and _is_written_list(value.strip()):
        raise QuestionError(
            f"{place}: the gold answer {shorten(value)} is a list written as text, which no answer would ever equal; "
            "make it a list, in JSON lines or parquet (or, if answers do look like this, a list of this one)"
        )
    texts = [text_of(entry, "gold answer", place) for entry in (value if isinstance(value, list | tuple) else [value])]
    answers = [text for text in texts if text]
    return answers, len(texts) - len(answers)


def text_of(value: Any, what: str, place: str) -> str:
    """A string or a number as text, without white space around it; nothing for a null.

    A number has neither exponent nor trailing zeros: 1999.0, which pandas makes of 1999 where a column has a gap, is
    "1999".

    Raises:
        QuestionError: for a value of another kind, and for text that no tokenizer can encode.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return ""
    if isinstance(value, float | Decimal) and value == 0:  # which may have a sign
        return "0"
    if isinstance(value, float | Decimal) and math.isfinite(value):
        text = format(Decimal(_shortest(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        way_out = next((hint for kind, hint in _WAYS_OUT.items() if isinstance(value, kind)), "give strings")
        raise QuestionError(f"{place}: the {what} {shorten(value)} is a {type(value).__name__}; {way_out}")
    if "\0" in value or not _encodes(value):
        problem = "a NUL character" if "\0" in value else "half a surrogate pair, which no tokenizer can encode"
        raise QuestionError(f"{place}: {shorten(value)} holds {problem}; repair the row")
    return value.strip().strip("\ufeff").strip()


def _shortest(number: float | Decimal) -> str:
    import numpy as np

    # Single precision turns 3.1 into 3.0999999046325684, which is exactly a number of single precision.
    if isinstance(number, float) and not number.is_integer() and float(np.float32(number)) == number:
        return str(np.float32(number))
    return str(number)


def check_answers_column(value: Any, where: str) -> None:
    """Raise `QuestionError` unless the value is the name of a column or a list of such."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise QuestionError(f"{where}: answers_column={value!r}; it must be the name of a column, or a list of them")


def no_column(where: str, names: Iterable[str], setting: str, held: Iterable[Any]) -> QuestionError:
    """The error of columns that are not there."""
    return QuestionError(
        f"{where}: there is no column {', '.join(map(repr, names))}; the columns are {', '.join(map(str, held))}. Set "
        f"{setting} to the right one"
    )


def _is_written_list(text: str) -> bool:
    for read in (json.loads, ast.literal_eval) if text[:1] in ("[", "{", "(") else ():
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return isinstance(read(text), list | tuple | set | dict)
    return _PRINTED.fullmatch(text) is not None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
