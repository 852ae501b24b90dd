"""Corpora of passages as JSON lines, in either of two layouts: `contents` (Pyserini, FlashRAG, Search-R1) or `text`
(BEIR, Tevatron), with a `title` beside it or without.

Invariant: every passage read has a non-blank text that encodes to UTF-8, and ids are unique over everything read.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

LAYOUTS = '{"id", "contents"} with contents = "\\"Title\\"\\ntext", or {"id", "title", "text"}'
# What identifies a passage: here, in BEIR, MS MARCO and DPR, Tevatron. A document's id may stand beside a passage's.
ID_FIELDS = ("id", "_id", "pid", "passage_id", "psg_id", "docid", "doc_id")
_OTHER_FORMATS = (".tsv", ".csv", ".parquet")
# A line that begins and ends with a quotation, as `"To be" is from "Hamlet"` does, without its outer quotes.
_TWO_QUOTATIONS = re.compile(r'[^"]*[^\s"]"(?!\w).*(?<![\w"])"[^\s"][^"]*', re.DOTALL)


class CorpusError(UserError):
    """A corpus cannot be used; the message names file, line, reason and way out."""


def passage_from_row(row: Mapping[str, Any], default_id: str) -> Passage:
    """Build a passage from a row of either layout; `default_id` stands in for a missing id.

    Raises:
        CorpusError: naming field and reason; the caller adds where the row came from, and the way out.
    """
    field = next((name for name in ("contents", "text") if row.get(name) is not None), None)
    if field is None:
        held = sorted(str(name) for name, value in row.items() if value is not None)
        raise CorpusError(f"missing fields, neither 'contents' nor 'text' among {held}")
    text, title = _string(row[field], field), _short_text(row, "title") or ""
    if field == "contents":
        title, text = (title, _without_title(text, title)) if title.strip() else split_contents(text)
    if not text.strip():
        raise CorpusError(f"empty text (title {shorten(title)})")
    named = filter(None, (_short_text(row, name) for name in ID_FIELDS))
    return Passage(id=next(named, default_id), title=title, text=text)


def split_contents(contents: str) -> tuple[str, str]:
    """Split contents into (title, text): the first line is the title, one pair of quotes around it dropped.

    Contents of one line, whatever blank lines follow, are text without a title; but a title in quotes and a line break
    without a text (as FlashRAG writes a passage that has none) are a title without a text.
    """
    head, newline, text = contents.partition("\n")
    head = head.strip()
    quoted = len(head) >= 2 and head[0] == head[-1] == '"' and not _TWO_QUOTATIONS.fullmatch(head[1:-1])
    if not newline or not (quoted or text.strip()):
        return "", contents.strip()
    return (head[1:-1] if quoted else head), text


def _without_title(contents: str, title: str) -> str:
    """Contents beside a title, which may be their first line."""
    head, _, text = contents.partition("\n")
    same = head.strip() == f'"{title}"' or " ".join(head.split()).strip('"') == " ".join(title.split()).strip('"')
    return text if same and text.strip() else contents


def join_contents(passage: Passage) -> str:
    """Title in quotes, line break, text: what `split_contents` splits again."""
    return f'"{passage.title}"\n{passage.text}'


def row_of_passage(passage: Passage) -> dict[str, str]:
    """`{"id", "contents"}`, and the title too where it could not be told from `contents`, so that `passage_from_row`
    inverts it exactly (for a title of one line without outer white space)."""
    row = {"id": passage.id, "contents": join_contents(passage)}
    exact = split_contents(row["contents"]) == (passage.title, passage.text)
    return row if exact else {**row, "title": passage.title}


def iter_passages(path: str | Path) -> Iterator[tuple[int, Passage]]:
    """Yield (line number, passage) of one JSON lines file; a row without an id gets its line number as id.

    Ids are not compared with each other, so that memory does not grow with the file.

    Raises:
        CorpusError: for a missing or empty file, text that is not UTF-8, broken JSON, a row that is not an object,
            missing fields, an empty text.
    """
    for number, row in iter_json_objects(path, CorpusError):
        try:
            passage = passage_from_row(row, default_id=str(number))
        except CorpusError as error:
            raise CorpusError(
                f"{path}, line {number}: {error}; repair the row or leave it out. A row is {LAYOUTS}"
            ) from None
        others = row.keys() - {"contents", "title", "text", *ID_FIELDS}
        if all(row.get(name) is None for name in ID_FIELDS):
            _tell_numbered(path, ", ".join(sorted(others)))
        if not passage.title and (titles := sorted(name for name in others if "title" in name.lower())):
            _tell_untitled(path, titles[0])
        yield number, passage


@cache
def _tell_untitled(path: str | Path, field: str) -> None:
    """Once a file: a title under another name is not read."""
    logger.warning("%s: the field %r is not read; rename it to title if it holds a passage's", path, field)


@cache
def _tell_numbered(path: str | Path, fields: str) -> None:
    """Once a file: a field that is not read may be its ids."""
    if fields:
        logger.warning(
            "%s: rows have none of the fields %s and are numbered by line; rename one of theirs (%s) to id if it "
            "identifies them",
            path,
            ", ".join(ID_FIELDS),
            fields,
        )


def iter_corpus(path: str | Path) -> Iterator[Passage]:
    """Yield the passages of one JSON lines file, see `iter_passages`.

    Raises:
        CorpusError: as there, and for an id that occurs twice.
    """
    lines_of_ids: dict[str, int] = {}
    for number, passage in iter_passages(path):
        first = lines_of_ids.setdefault(passage.id, number)
        if first != number:
            raise CorpusError(repeated_id(path, number, passage.id, first))
        yield passage


def repeated_id(path: str | Path, number: int, passage_id: str, first: int) -> str:
    """What to say of an id that two lines of a file share."""
    return (
        f"{path}, line {number}: the id {passage_id!r} already occurs on line {first}; "
        "make ids unique, or leave them all out to number rows by line"
    )


def read_corpus(paths: str | Path | Sequence[str | Path]) -> list[Passage]:
    """Read one or more corpus files, in the order given.

    An id that occurs in several files is prefixed with `folder/stem:` of its file, in each of them; others stay.

    Raises:
        CorpusError: see `iter_corpus`; also for no file at all or a file named twice.
    """
    files = corpus_files(paths)
    corpora = [list(iter_corpus(path)) for path in files]
    counts = Counter(passage.id for corpus in corpora for passage in corpus)
    merged = [
        replace(passage, id=f"{prefix}:{passage.id}") if counts[passage.id] > 1 else passage
        for prefix, corpus in zip(id_prefixes(files), corpora, strict=True)
        for passage in corpus
    ]
    clash, count = Counter(passage.id for passage in merged).most_common(1)[0]
    if count > 1:
        raise CorpusError(f"the id {clash!r} still occurs {count} times after prefixing; rename it in its file")
    return merged


def corpus_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a corpus is made of, in the order given.

    Raises:
        CorpusError: for no file at all or a file named twice.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise CorpusError("no corpus file was given; name at least one JSON lines file of passages")
    repeated = [str(path) for path, count in Counter(path.resolve() for path in files).items() if count > 1]
    if repeated:
        raise CorpusError(f"corpus files named twice: {', '.join(repeated)}; name each once")
    for path in files:
        if path.name.removesuffix(".gz").endswith(_OTHER_FORMATS):
            raise CorpusError(
                f"{path}: a corpus is JSON lines, rows of {LAYOUTS}; docs/retrieval.md has the command that makes "
                "them of a table such as DPR's psgs_w100.tsv"
            )
    return files


def id_prefixes(files: Sequence[Path]) -> list[str]:
    """What tells equal ids of different files apart: `folder/stem`, or the whole path where that is not enough."""
    short = [f"{path.resolve().parent.name}/{path.stem}" for path in files]
    if len(set(short)) == len(short):
        return short
    return [path.resolve().with_suffix("").as_posix() for path in files]


def write_corpus(passages: Iterable[Passage], path: str | Path) -> None:
    """Write passages as `{"id", "contents"}` rows; the file appears whole or not at all. Folders are made.

    Raises:
        CorpusError: for no passage, a repeated id, an empty text, a title with a line break.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, alone=False) as out:
        for passage in _checked_for_writing(passages, path):
            out.write((json.dumps(row_of_passage(passage), ensure_ascii=False) + "\n").encode())


def _checked_for_writing(passages: Iterable[Passage], path: Path) -> Iterator[Passage]:
    seen: set[str] = set()
    for passage in passages:
        where = f"{path}: passage {passage.id!r}"
        if passage.id in seen:
            raise CorpusError(f"{where} occurs twice; make ids unique before writing")
        if not passage.text.strip():
            raise CorpusError(f"{where} has an empty text; leave it out")
        if "\n" in passage.title or passage.title != passage.title.strip():
            raise CorpusError(
                f"{where} has the title {shorten(passage.title)}; the layout keeps titles on one line, so remove line "
                "breaks and outer spaces"
            )
        seen.add(passage.id)
        yield passage
    if not seen:
        raise CorpusError(f"{path}: there is no passage to write; an empty corpus could not be searched")


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"field {name!r} must be a string, found {type(value).__name__} {shorten(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"field {name!r} holds half a surrogate pair at character {error.start}, which no tokenizer can encode"
        ) from None
    return value


def _short_text(row: Mapping[str, Any], name: str) -> str | None:
    """A title or an id: a string, or a whole number, which pandas writes as 7.0 where a column has a gap."""
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name != "title" and isinstance(value, str) and not value.strip():
        raise CorpusError(f"field {name!r} is blank")
    return None if value is None else _string(value, name)
