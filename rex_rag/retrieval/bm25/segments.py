"""tantivy's files: filled in a fixed way, so that equal passages give equal bytes, and opened without a write.

tantivy merges eight segments of about one size into one. Writing a power of eight of equal parts, one writer and one
commit each, therefore ends in one segment, however little memory a part may take, and every merge is waited for, so
none depends on time. Documents are kept sorted by row: the number of a document is that of its passage, and equal
scores come in corpus order. What else differs between two builds, random names of segments, is replaced by
`settled_names`.
"""

from __future__ import annotations

import json
import mmap
import re
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.text import passage_text, spaced
from rex_rag.retrieval.passages import PassageSource

if TYPE_CHECKING:
    import tantivy

META_FILE = "meta.json"
TEXT, ROW = "text", "row"
# "freq": terms and how often they occur; positions, which phrases would need, would double the index.
POSTINGS = "freq"
MERGED_AT_ONCE = 8
# Text of one part; in memory it takes about as much again. A part also has at least as many passages as tantivy's
# smallest class of sizes, or segments of different ages would be merged with each other.
PART_BYTES, PART_PASSAGES = 1 << 28, 10_000
SEGMENT_FILE = re.compile(r"[0-9a-f]{32}\..+")
# Where a writer would start a second segment in the middle of a part: never reached by text in a natural language.
_WRITER_BYTES = 2_000_000_000


def make_index(analyzer: tantivy.TextAnalyzer, directory: Path | None = None) -> tantivy.Index:
    """An index to write, in memory or in a directory; what was committed in a directory is still there."""
    import tantivy

    schema = tantivy.SchemaBuilder()
    schema.add_text_field(TEXT, tokenizer_name="passages", index_option=POSTINGS)
    schema.add_integer_field(ROW, fast=True)
    index = tantivy.Index(schema.build(), path=None if directory is None else str(directory), sort_by_field=ROW)
    index.register_tokenizer("passages", analyzer)
    return index


def check_passages(passages: Sized) -> None:
    """Raise `RetrievalError` for an empty corpus."""
    if not len(passages):
        raise RetrievalError("BM25 got 0 passages; a search could never be answered, so give it a corpus")


def check_terms(index: tantivy.Index, passages: int) -> None:
    """Raise `RetrievalError` for an index without a term: no search could find anything in it."""
    if not index.searcher().terms_with_prefix(TEXT, "", limit=1):
        raise RetrievalError(
            f"none of the {passages:,} passages holds an indexable word (letters or digits, no stop word); check the "
            "corpus, or pass stopwords=None"
        )


def part_borders(passages: int, text_bytes: int) -> list[int]:
    """Rows at which parts end: a power of eight of them, or one."""
    parts = 1
    while text_bytes / parts > PART_BYTES and passages >= MERGED_AT_ONCE * parts * PART_PASSAGES:
        parts *= MERGED_AT_ONCE
    return [passages * part // parts for part in range(1, parts + 1)]


def write_parts(index: tantivy.Index, passages: PassageSource, borders: list[int]) -> Iterator[int]:
    """Write what is not committed yet, part by part; yields the number of rows that are taken in, now and then."""
    import tantivy

    # Killed between a commit and the end of its merges: what was left to merge comes first, as it would have.
    writer = index.writer(_WRITER_BYTES, 1)
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    row = index.searcher().num_docs
    yield row
    for border in borders:
        if border <= row:
            continue
        writer = index.writer(_WRITER_BYTES, 1)
        while row < border:
            document = tantivy.Document()
            document.add_text(TEXT, spaced(passage_text(passages[row])))
            document.add_integer(ROW, row)
            writer.add_document(document)
            row += 1
            if row % 1_000 == 0:
                yield row
        writer.commit()
        writer.wait_merging_threads()
        yield row
    index.reload()


def settled_names(directory: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of a finished index, as name -> name that its first row gives, and the metadata that go with them.

    Segments stand in the order of their rows, so ties between several are broken by row as well.
    """
    import tantivy

    meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
    searcher = tantivy.Index.open(str(directory)).searcher()
    names: dict[str, str] = {}
    for number, segment in enumerate(meta["segments"]):
        [row] = searcher.fast_field_values(ROW, [tantivy.DocAddress(number, 0)])
        old, new = segment["segment_id"].replace("-", ""), f"{row:032x}"
        names |= {path.name: path.name.replace(old, new) for path in directory.glob(f"{old}.*")}
        segment["segment_id"] = str(uuid.UUID(new))
    meta["segments"].sort(key=lambda segment: segment["segment_id"])
    meta["opstamp"] = searcher.num_docs  # counts what was tried, and so how often a build was killed
    return names, meta


def _check_sum(path: Path) -> None:
    """Hold a file of a segment to the checksum at its end: tantivy itself does not, and would answer otherwise.

    The end: `{"version": …, "crc": …}`, its length and a magic number, 4 bytes each.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            body = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
            told = json.loads(data[body:-8])["crc"]
            with memoryview(data) as view, view[:body] as summed:
                whole = zlib.crc32(summed) == told
    except (ValueError, TypeError, KeyError):  # no end like that, or nothing at all
        whole = False
    if not whole:
        raise RetrievalError(f"{path} is damaged (its checksum differs); copy the index again or build it again")


def open_index(directory: Path) -> tantivy.Index:
    """Map the files of an index, once each has been read and found whole.

    tantivy takes a lock beside the files even to read them. Here it lies beside links to them, so that an index may
    stand where nobody can write, and never holds a file that its manifest does not know.
    """
    import tantivy

    # The reader made at first may take its lock once more while the links are removed: not a reason to fail.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as view:
        for path in directory.iterdir():
            if SEGMENT_FILE.fullmatch(path.name):
                _check_sum(path)
            (Path(view) / path.name).symlink_to(path.resolve())
        try:
            index = tantivy.Index.open(view)
        except ValueError as error:
            raise RetrievalError(
                f"{directory / META_FILE} and the files beside it cannot be opened ({error}); copy the index again or "
                "build it again"
            ) from None
        # All files are mapped by now; the reader made at first would look at the metadata twice a second, for ever.
        index.config_reader("manual")
    return index
