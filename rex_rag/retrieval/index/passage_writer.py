"""From corpus files to a passage store, streaming: memory grows by 8 bytes a passage for finding repeated ids, and by
as much for its id, and again for its title, in the table of titles and ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.data.corpus import CorpusError, id_prefixes, iter_passages, passage_from_row, repeated_id
from rex_rag.retrieval.lookup import LOOKUP_FILE, LookupBuilder
from rex_rag.retrieval.passages import OFFSETS_FILE, PASSAGES_FILE, passage_json, write_table
from rex_rag.support.durable import sync_folder, write_json
from rex_rag.support.jsonl import open_lines
from rex_rag.support.progress_bars import progress_bar
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

STORE_FILES = (PASSAGES_FILE, OFFSETS_FILE, LOOKUP_FILE)
_BLOCK_BYTES = 1 << 22
_ROWS_BETWEEN_UPDATES = 2_000


@dataclass(frozen=True)
class CorpusFile:
    """What identifies a corpus file, wherever it lies."""

    name: str
    bytes: int
    lines: int
    sha256: str


@dataclass(frozen=True)
class StoreInfo:
    """What was written: the number of passages, and size and SHA-256 of the file that holds them."""

    passages: int
    bytes: int
    sha256: str
    prefixed_ids: int  # passages whose id occurs in several files, and so got its file's name in front


def scan_corpus(files: Sequence[Path]) -> list[CorpusFile]:
    """Hash every file and count its lines, at the speed of the disk.

    Raises:
        CorpusError: for a missing file, a folder or an empty file.
    """
    for path in files:
        if not path.is_file():
            reason = "this is a folder; name the JSON lines file inside it" if path.is_dir() else "no such file"
            raise CorpusError(f"{path}: {reason} (working directory: {Path.cwd()})")
        if not path.stat().st_size:
            raise CorpusError(f"{path}: the file is empty; it needs one JSON object a line")
    scanned = []
    with progress_bar(sum(path.stat().st_size for path in files), "reading corpus", "B") as bar:
        for path in files:
            digest, size, ended = hashlib.sha256(), 0, True
            lines = 0
            with path.open("rb") as raw:
                while block := raw.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    lines += block.count(b"\n")
                    ended = block.endswith(b"\n")
                    bar.update(len(block))
            if path.suffix == ".gz":
                lines, ended = _gzipped_lines(path), True
            scanned.append(CorpusFile(path.name, size, lines + (not ended), digest.hexdigest()))
    return scanned


def sample_passages(files: Sequence[Path], count: int) -> list[Passage]:
    """About `count` passages to estimate from: spread evenly over plain files, the first ones of gzipped files.

    Rows that cannot be used are left out here: reading the whole corpus refuses them with their line's number.

    Raises:
        CorpusError: if no row can be used.
    """
    share = max(1, count // len(files))
    sample: list[Passage] = []
    for path in files:
        for line in _head(path, share) if path.suffix == ".gz" else _spread(path, share):
            with suppress(ValueError, AttributeError, RecursionError):
                sample.append(passage_from_row(json.loads(line), default_id="0"))
    if not sample:
        for path in files:
            for _ in iter_passages(path):
                pass
        raise CorpusError(f"no usable passage in the sample of {', '.join(map(str, files))}; check the files")
    return sample


def write_store(files: Sequence[Path], scanned: Sequence[CorpusFile], directory: Path, info_path: Path) -> StoreInfo:
    """Write the files of a store, and what was written to `info_path`; if that is there, all is done.

    An id that occurs in several files gets its file's name in front in each of them, as in `read_corpus`.

    Raises:
        CorpusError: for a file that is malformed, or changed since it was scanned; for an id that occurs twice in a
            file.
    """
    if info_path.exists() and all((directory / name).exists() for name in STORE_FILES):
        return StoreInfo(**json.loads(info_path.read_text(encoding="utf-8")))
    info, shared = _write_pass(files, scanned, directory, prefixed=None)
    if shared is not None:
        info, shared = _write_pass(files, scanned, directory, prefixed=shared)
        if shared is not None:
            raise CorpusError(
                f"ids still repeat after putting file names in front ({', '.join(map(str, files))}); make them unique"
            )
    write_json(info_path, asdict(info))
    return info


def _write_pass(
    files: Sequence[Path], scanned: Sequence[CorpusFile], directory: Path, prefixed: np.ndarray | None
) -> tuple[StoreInfo, np.ndarray | None]:
    """Write the store once; return what was written and, if there are any, the digests of ids that files share."""
    import numpy as np

    parts = [directory / f".{name}.part" for name in STORE_FILES]
    counts: list[int] = []
    digests, count_prefixed, lookup = _GrowingDigests(), 0, LookupBuilder()
    content, position = hashlib.sha256(), 0
    total = sum(file.lines for file in scanned)
    with parts[0].open("wb") as text, parts[1].open("wb") as offsets, progress_bar(total, "passages") as bar:
        offsets.write(np.uint64(0).tobytes())
        for path, prefix, before in zip(files, id_prefixes(files), scanned, strict=True):
            rows = 0
            for _, passage in iter_passages(path):
                digest = _digest(passage.id)
                if prefixed is not None and _contains(prefixed, digest):
                    passage = replace(passage, id=f"{prefix}:{passage.id}")
                    digest = _digest(passage.id)
                    count_prefixed += 1
                line = passage_json(passage) + b"\n"
                text.write(line)
                content.update(line)
                position += len(line)
                offsets.write(position.to_bytes(8, "little"))
                digests.append(digest)
                lookup.add(sum(counts) + rows, passage)
                rows += 1
                if rows % _ROWS_BETWEEN_UPDATES == 0:
                    bar.update(_ROWS_BETWEEN_UPDATES)
            bar.update(rows % _ROWS_BETWEEN_UPDATES)
            if path.stat().st_size != before.bytes:
                raise CorpusError(f"{path} changed while it was read ({before.bytes:,} bytes before); start again")
            counts.append(rows)
        for file in (text, offsets):
            file.flush()
            os.fsync(file.fileno())
    shared = _shared_digests(files, counts, digests.values(), prefixed is not None)
    if shared is None:
        with parts[2].open("wb") as file:
            write_table(file, lookup.table(), position)
            file.flush()
            os.fsync(file.fileno())
        for part, name in zip(parts, STORE_FILES, strict=True):
            os.replace(part, directory / name)
        sync_folder(directory)
    return StoreInfo(sum(counts), position, content.hexdigest(), count_prefixed), shared


def _shared_digests(
    files: Sequence[Path], counts: Sequence[int], digests: np.ndarray, prefixed: bool = False
) -> np.ndarray | None:
    """Digests of ids that occur in more than one file, sorted; refuses an id that occurs twice in one.

    prefixed: ids have files' names in front by now, so any that are equal, in one file or several, are returned.
    """
    import numpy as np

    origin = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    order = np.argsort(digests, kind="stable")
    ordered, origin = digests[order], origin[order]
    equal = ordered[1:] == ordered[:-1]
    within = equal & (origin[1:] == origin[:-1]) & (not prefixed)
    for file_number in np.unique(origin[1:][within]):
        suspects = set(ordered[1:][within & (origin[1:] == file_number)].tolist())
        _refuse_repeated(files[file_number], suspects)
    between = np.unique(ordered[1:][equal & ~within])
    return between if len(between) else None


def _refuse_repeated(path: Path, suspects: set[int]) -> None:
    """Read the file once more for the lines of an id that repeats; equal digests of different ids are no fault."""
    first_lines: dict[str, int] = {}
    for number, passage in iter_passages(path):
        if _digest(passage.id) in suspects:
            first = first_lines.setdefault(passage.id, number)
            if first != number:
                raise CorpusError(repeated_id(path, number, passage.id, first))


class _GrowingDigests:
    """64-bit integers appended one by one and held without a Python object each."""

    def __init__(self) -> None:
        from array import array

        self._values = array("Q")
        self.append = self._values.append

    def values(self) -> np.ndarray:
        import numpy as np

        return np.frombuffer(self._values, dtype=np.uint64)


def _digest(passage_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")


def _contains(ordered: np.ndarray, value: int) -> bool:
    import numpy as np

    position = int(np.searchsorted(ordered, np.uint64(value)))
    return position < len(ordered) and int(ordered[position]) == value


def _gzipped_lines(path: Path) -> int:
    import gzip
    import zlib

    lines = 0
    try:
        with open_lines(path) as rows:
            for _ in rows:
                lines += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(
            f"{path}, after line {lines}: broken gzip data ({error}); fetch or compress the file again"
        ) from error
    return lines


def _head(path: Path, count: int) -> Iterator[bytes]:
    with open_lines(path) as rows:
        for line in rows:
            if line.strip():
                yield line
                count -= 1
            if not count:
                return


def _spread(path: Path, count: int) -> Iterator[bytes]:
    """Whole lines at evenly spaced places of a file; all of a file that has no more than `count`."""
    size = path.stat().st_size
    with path.open("rb") as raw:
        position = 0
        for number in range(count):
            place = size * number // count
            if place > position:
                raw.seek(place - 1)
                raw.readline()
            line = raw.readline()
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            position = raw.tell()
            if line.strip():
                yield line
            if position >= size:
                return
