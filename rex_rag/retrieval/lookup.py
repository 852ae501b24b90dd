"""Documents by title or passage id: where in a corpus the passages of one title lie.

The table is one sorted array of 64-bit numbers, a hash above and a row below: 8 bytes for each passage's id and for
each run of neighbouring passages with one title. It says where to look; what lies there is compared with the key, so
that equal hashes never mix two documents. As a file it is `lookup.u64`, memory-mapped; its first number is the size of
the passages' file, so that the table of another corpus is noticed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from rex_rag.support.progress_bars import progress_bar
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

LOOKUP_FILE = "lookup.u64"
# A document is read for one turn of an agent: what goes beyond is a corpus that gives all passages one title.
MAX_DOCUMENT_PASSAGES = 1_000
_ROW_BITS = 32
_ROWS_BETWEEN_UPDATES = 2_000


class Rows(Protocol):
    """Passages by row number, from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Passage: ...


class LookupBuilder:
    """The table of passages that are added in the order of their rows."""

    def __init__(self) -> None:
        self._entries = array("Q")
        self._folded = ""

    def add(self, row: int, passage: Passage) -> None:
        self._entries.append(_hash("id", passage.id.strip()) << _ROW_BITS | row)
        folded = _fold(passage.title)
        if folded and folded != self._folded:
            self._entries.append(_hash("title", folded) << _ROW_BITS | row)
        self._folded = folded

    def table(self) -> np.ndarray:
        """The numbers added, sorted; nothing can be added afterwards."""
        import numpy as np

        entries = np.frombuffer(self._entries, dtype="<u8")
        entries.sort()
        return entries


def make_table(passages: Rows) -> np.ndarray:
    """The table of a corpus that has none, with a progress bar."""
    builder = LookupBuilder()
    with progress_bar(len(passages), "listing titles", "passages") as bar:
        for row in range(len(passages)):
            builder.add(row, passages[row])
            if (row + 1) % _ROWS_BETWEEN_UPDATES == 0:
                bar.update(_ROWS_BETWEEN_UPDATES)
        bar.update(len(passages) % _ROWS_BETWEEN_UPDATES)
    return builder.table()


def find_document(passages: Rows, table: np.ndarray, key: str) -> list[int]:
    """Rows of the document that a key names, see `Retriever.read`: at most `MAX_DOCUMENT_PASSAGES`."""
    title = one_spaced(key)
    if not title:
        return []
    if rows := _titled(passages, table, title, exactly=True):
        return rows
    for row in _rows(table, "id", key.strip()):
        found = passages[row]
        if found.id.strip() == key.strip():
            own = one_spaced(found.title)
            return _titled(passages, table, own, exactly=True) if own else [row]
    return _titled(passages, table, title, exactly=False)


def one_spaced(title: str) -> str:
    """A title as a store keeps it: single blanks, none around it."""
    return " ".join(title.split())


def _titled(passages: Rows, table: np.ndarray, title: str, exactly: bool) -> list[int]:
    """Rows of a title, in corpus order; not exactly: of the first title that differs from it in case alone."""
    rows: list[int] = []
    for row, found in _folded_alike(passages, table, title):
        if not exactly and not rows:
            title = found
        if found == title:
            rows.append(row)
            if len(rows) == MAX_DOCUMENT_PASSAGES:
                break
    return rows


def _folded_alike(passages: Rows, table: np.ndarray, title: str) -> Iterator[tuple[int, str]]:
    folded = _fold(title)
    for first in _rows(table, "title", folded):
        for row in range(first, len(passages)):
            found = one_spaced(passages[row].title)
            if found.casefold() != folded:
                break
            yield row, found


def _rows(table: np.ndarray, kind: str, text: str) -> list[int]:
    """The rows at which a hash stands, in order."""
    import numpy as np

    low = _hash(kind, text) << _ROW_BITS
    bounds = np.array([low, low | (1 << _ROW_BITS) - 1], dtype=np.uint64)
    first, last = np.searchsorted(table, bounds[:1], "left")[0], np.searchsorted(table, bounds[1:], "right")[0]
    return [int(entry) & (1 << _ROW_BITS) - 1 for entry in table[first:last]]


def _fold(title: str) -> str:
    return one_spaced(title).casefold()


def _hash(kind: str, text: str) -> int:
    """32 bits, of titles others than of ids."""
    # Half a surrogate pair, which a model may write, stands in no corpus.
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4, person=kind.encode())
    return int.from_bytes(digest.digest(), "little")
