"""The files of an index as they were when it was opened: held, so that what changes underneath is noticed and said.

An index is mapped, not copied: whoever writes into its files changes what a running reader finds, and one that is cut
short ends the process without a word. So files are kept open, and looked at before and after each search; one that was
exchanged by renaming another over it does no harm, since the one that was opened is still there.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import EngineAway, RetrievalError
from rex_rag.support.progress_bars import progress_bar

if TYPE_CHECKING:
    from rex_rag.retrieval.manifest import Manifest

# Hashed whenever an index is opened, the smallest files first; the rest where its name goes on a card, or when
# something in it cannot be read.
HASHED_AT_OPENING_BYTES = 256 * 2**20
# A look behind one answer is as good as one before the next, if that follows at once.
SECONDS_BETWEEN_LOOKS = 0.001
_BLOCK_BYTES = 1 << 24


class HeldFiles:
    """The files that a manifest names, open. Safe to share between threads.

    Raises:
        RetrievalError: for a file that is missing.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._files: dict[str, tuple[int, os.stat_result]] = {}
        self._checked = time.monotonic()
        self._hashed: dict[str, bool] = {}  # name -> whether it is as the manifest says
        weakref.finalize(self, _close, self._files)
        for name in manifest.files:
            try:
                file = os.open(directory / name, os.O_RDONLY)
            except OSError as error:
                raise RetrievalError(f"{directory / name}: {error.strerror}; {self._way_out}") from error
            self._files[name] = file, os.fstat(file)

    def check(self) -> None:
        """Raise `EngineAway` if a file was written into since it was opened: what is found may be anything."""
        self._checked = time.monotonic()
        for name, (file, then) in self._files.items():
            now = os.fstat(file)
            if now.st_mtime_ns != then.st_mtime_ns or now.st_size != then.st_size:
                raise EngineAway(
                    f"{self.directory / name} was written into while the index was open: what is found now is not of "
                    f"the index {self.manifest.fingerprint}. Start again; put another index into another directory, "
                    "or exchange whole directories by renaming them"
                )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around what reads the files: a change before or meanwhile, and damage that ends it, are said."""
        # What counts is the look behind an answer; the one before it only spares reading a file that was cut short.
        if time.monotonic() - self._checked > SECONDS_BETWEEN_LOOKS:
            self.check()
        with self.explained():
            yield
        self.check()

    def check_places(self) -> None:
        """The same, also for files exchanged between holding them and opening the index by their names."""
        self.check()
        for name, (_, then) in self._files.items():
            if not os.path.samestat(then, os.stat(self.directory / name)):
                raise RetrievalError(f"{self.directory / name} was exchanged while the index was opened; start again")

    def verify(self, most_bytes: float = math.inf) -> None:
        """Raise `RetrievalError` unless files hash to what the manifest says; each is hashed once.

        most_bytes: leave out the largest files, until the others have not more together.
        """
        by_size = sorted(self._files, key=lambda name: self._files[name][1].st_size)
        sizes = itertools.accumulate(self._files[name][1].st_size for name in by_size)
        self._hash([name for name, size in zip(by_size, sizes, strict=True) if size <= most_bytes])
        damaged = [str(self.directory / name) for name, whole in self._hashed.items() if not whole]
        if damaged:
            raise RetrievalError(
                f"{', '.join(damaged)}: not as built (another SHA-256 than the manifest's); {self._way_out}"
            )
        self.check()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of a library's in this block is said with the files that are damaged; with none, it is a bug."""
        try:
            yield
        except RetrievalError:
            raise
        except Exception as error:
            try:
                self.verify()
            except RetrievalError as damage:
                raise damage from error
            raise

    @property
    def _way_out(self) -> str:
        return f"`rex-rag index --verify {self.directory}` names all damage: copy the index again or build it again"

    def _hash(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._hashed]
        total = sum(self._files[name][1].st_size for name in new)
        with progress_bar(total, "hashing", "B") if total > HASHED_AT_OPENING_BYTES else nullcontext() as bar:
            for name in new:
                digest, place = hashlib.sha256(), 0
                # Not by the file's own place, which processes forked from this one share.
                while block := os.pread(self._files[name][0], _BLOCK_BYTES, place):
                    digest.update(block)
                    place += len(block)
                    if bar is not None:
                        bar.update(len(block))
                self._hashed[name] = digest.hexdigest() == self.manifest.files[name]["sha256"]


def _close(files: dict[str, tuple[int, os.stat_result]]) -> None:
    for file, _ in files.values():
        os.close(file)
