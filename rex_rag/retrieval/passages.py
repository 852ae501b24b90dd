"""Passages by row number: held in memory, or memory-mapped from an index directory.

On disk a store is `passages.jsonl`, one `{"id", "contents"}` object a line in corpus order, and `offsets.u64`, the
byte position of every line and the end of the last: 8 bytes a passage besides its own text, none of it held in memory.
The bytes of a line are what the server puts on the wire: fetching a passage there neither parses nor renders it. With
`lookup.u64` beside them, documents are found by title or id (see `lookup`); a store of an earlier version lacks it.
"""

from __future__ import annotations

import json
import logging
import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from rex_rag.data.corpus import passage_from_row, row_of_passage
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.lookup import LOOKUP_FILE, find_document, make_table, one_spaced
from rex_rag.support.durable import written_whole
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

PASSAGES_FILE = "passages.jsonl"
OFFSETS_FILE = "offsets.u64"
OFFSET_BYTES = 8
_TO_JSON = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` with options makes an encoder each time


class PassageSource(Protocol):
    """A corpus that an index points into by row number, from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Passage: ...

    def __iter__(self) -> Iterator[Passage]: ...

    def json(self, row: int) -> bytes:
        """The passage as a UTF-8 JSON object `{"id", "contents"}`."""
        ...

    def find(self, key: str) -> list[int]:
        """Rows of the document that a title or a passage's id names, see `Retriever.read`; none for an unknown one."""
        ...


def passage_json(passage: Passage) -> bytes:
    """A passage as it lies in a store and goes over the wire, without a line break.

    White space in the title is reduced to single blanks: `contents` keeps the title on its first line.
    """
    title = one_spaced(passage.title)
    if title != passage.title:
        passage = replace(passage, title=title)
    return _TO_JSON(row_of_passage(passage)).encode()


class _Documents(ABC):
    """Passages whose table of titles and ids is made, or opened, when it is first asked for."""

    def __init__(self) -> None:
        self._table: np.ndarray | None = None
        self._table_lock = threading.Lock()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Passage: ...

    def find(self, key: str) -> list[int]:
        with self._table_lock:
            if self._table is None:
                self._table = self._lookup_table()
        return find_document(self, self._table, key)

    def _lookup_table(self) -> np.ndarray:
        return make_table(self)


class PassageList(_Documents):
    """Passages held as Python objects: for corpora that fit."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        super().__init__()
        self._passages = list(passages)

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, row: int) -> Passage:
        return self._passages[row]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    def json(self, row: int) -> bytes:
        return passage_json(self._passages[row])


class PassageStore(_Documents):
    """The passages of an index directory, memory-mapped: opening takes no time, however large. Safe between threads.

    Raises:
        RetrievalError: for a file that is missing or whose size contradicts the other's.
    """

    def __init__(self, directory: str | Path) -> None:
        import numpy as np

        super().__init__()
        self._directory = directory = Path(directory)
        text, offsets = directory / PASSAGES_FILE, directory / OFFSETS_FILE
        for path in (text, offsets):
            if not path.is_file() or not path.stat().st_size:
                raise RetrievalError(f"{path} is missing or empty; build the index again with `rex-rag index`")
        size = offsets.stat().st_size
        if size % OFFSET_BYTES or size < 2 * OFFSET_BYTES:
            raise RetrievalError(f"{offsets} has {size} bytes, no whole number of offsets; build the index again")
        self._offsets = np.memmap(offsets, dtype="<u8", mode="r")
        if int(self._offsets[-1]) != text.stat().st_size:
            raise RetrievalError(
                f"{text} has {text.stat().st_size:,} bytes, but {offsets} ends at {int(self._offsets[-1]):,}: "
                "the two do not belong together; build the index again"
            )
        with text.open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Now, as the rest: another file may lie there later.
        self._table = self._mapped_table()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        return passage_from_row(json.loads(self.json(row)), default_id=str(row))

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def json(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} passages")
        return self._text[int(self._offsets[row]) : int(self._offsets[row + 1]) - 1]

    def _lookup_table(self) -> np.ndarray:
        """Of a store that has none: made and kept beside it, or in memory where nothing can be written."""
        table = make_table(self)
        path = self._directory / LOOKUP_FILE
        try:
            with written_whole(path, alone=False) as file:
                write_table(file, table, len(self._text))
        except OSError as error:
            logger.warning("%s cannot be kept (%s): documents are looked up in memory", path, error)
        return table

    def _mapped_table(self) -> np.ndarray | None:
        import numpy as np

        path = self._directory / LOOKUP_FILE
        if not path.is_file():
            return None
        size = path.stat().st_size
        found = np.memmap(path, dtype="<u8", mode="r") if size and not size % OFFSET_BYTES else np.empty(0)
        if len(found) > len(self) and int(found[0]) == len(self._text):
            return np.asarray(found[1:])
        logger.warning("%s is not of these passages; it is made anew", path)
        return None


def write_table(file: IO[bytes], table: np.ndarray, text_bytes: int) -> None:
    """Write the table of a store whose passages take `text_bytes`."""
    file.write(text_bytes.to_bytes(OFFSET_BYTES, "little"))
    file.write(table.data)
