"""Files that are there whole or not at all."""

import threading
from pathlib import Path

import pytest

from rex_rag.durable import written_whole


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, alone: bool):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "file", alone) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


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
