"""Files and folders that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def written_whole(path: Path, alone: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing beside `path`; it takes that name, synced, when the block ends without an error.

    The folder is made where it is missing.

    alone: nothing else writes this file at the same time, so the file beside it has a fixed name, and the next attempt
    overwrites what a killed one left. Otherwise every thread and process has its own, and the last one wins.
    """
    own = "" if alone else f".{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}{own}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk names none
        raise
    sync_folder(path.parent)


def remove_partial(folder: Path) -> None:
    """Remove what killed writers of `written_whole` left anywhere under a folder that nobody writes to now.

    A process that outlived a killed one for a moment may remove its own at the same time.
    """
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any, alone: bool = True) -> None:
    """Write a JSON file for people and programs, whole or not at all; equal values give equal bytes.

    alone: as in `written_whole`.
    """
    with written_whole(path, alone) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file as long as the block runs; yields False if another process holds it.

    The kernel drops the lock when the process dies, so nothing is left to clean up after a kill.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file since it was opened here: then the next one locks a new file.
            ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        yield ours
