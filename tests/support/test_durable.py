"""Files that are there whole or not at all."""

import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rex_rag.support.durable import remove_partial, written_whole


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, alone: bool):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "file", alone) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_folder_that_is_missing_is_made(tmp_path: Path):
    with written_whole(tmp_path / "a" / "b" / "file") as file:
        file.write(b"text")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"text"


def test_writers_that_are_not_alone_do_not_meet(tmp_path: Path):
    """One begins while the other writes; with one file beside the target, the later rename would find it gone."""
    path, begun = tmp_path / "file", threading.Event()

    def other() -> None:
        with written_whole(path, alone=False) as file:
            file.write(b"other")
        begun.set()

    with written_whole(path, alone=False) as file:
        file.write(b"one")
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(10)
        assert path.read_bytes() == b"other"
    thread.join()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"one")]


def test_a_disk_without_room_is_an_error_that_names_the_file(tmp_path: Path):
    """The limit of a process stands in for a full disk: the system's error names no file either."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "file").write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError) as raised, written_whole(tmp_path / "file") as file:
            file.write(b"more than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(tmp_path / "file")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_what_killed_writers_left_is_removed_even_where_it_goes_away_by_itself(tmp_path: Path):
    """Two who clean up at once: each lists files that the other removes before it comes to them."""
    (tmp_path / "deep").mkdir()
    for number in range(1_000):
        (tmp_path / f".{number}.part").write_bytes(b"half")
    (tmp_path / "deep" / ".file.part").write_bytes(b"half")
    (tmp_path / "whole.part").write_bytes(b"a name of its own")
    start = threading.Barrier(2)

    def clean_up(_: int) -> None:
        start.wait(10)
        remove_partial(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(clean_up, range(2)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "whole.part"]
