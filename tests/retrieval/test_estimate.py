"""Estimates add up as stages do, and a machine that is too small is refused with the numbers."""

from pathlib import Path

import pytest

from rex_rag.retrieval import estimate
from rex_rag.retrieval.estimate import (
    Estimate,
    NotEnoughRoom,
    Room,
    check_room,
    human_bytes,
    human_seconds,
    measure_room,
)

GIB = 1 << 30


def test_stages_share_memory_and_add_up_on_disk():
    first = Estimate(5, 0, 7, 11, 2.0, ("a",))
    assert first.then(Estimate(3, 4, 1, 1, 0.5, ("b",))) == Estimate(5, 4, 8, 12, 2.5, ("a", "b"))


def test_too_little_memory_or_disk_is_refused_with_need_and_supply():
    estimate = Estimate(10 * GIB, 0, 4 * GIB, 6 * GIB, 1.0)
    check_room(estimate, Room(ram=11 * GIB, disk=11 * GIB))
    with pytest.raises(NotEnoughRoom, match=r"11 GiB of memory .*, and 8 GiB are free\. Take"):
        check_room(estimate, Room(ram=8 * GIB, disk=100 * GIB))
    with pytest.raises(
        NotEnoughRoom, match=r"11 GiB of disk \(6 GiB for the index, 4 GiB while building\), and 9 GiB"
    ):
        check_room(estimate, Room(ram=100 * GIB, disk=9 * GIB))
    with pytest.raises(NotEnoughRoom, match=r"memory.*; .*disk"):
        check_room(estimate, Room(ram=GIB, disk=GIB))


def test_this_machine_has_room_even_where_the_folder_does_not_exist_yet(tmp_path: Path):
    room = measure_room(tmp_path / "a" / "b")
    assert room.ram > 1 << 20
    assert room.disk > 1 << 20


@pytest.mark.parametrize("prefix", ["", "total_"])
def test_what_a_container_holds_of_files_is_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str):
    """A limit of 64 MiB of which 60 are used, 50 of them by files that were read: 54 are there for a build."""
    mib = 1 << 20
    for name, value in (("memory.max", 64), ("memory.current", 60)):
        (tmp_path / name).write_text(f"{value * mib}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {10 * mib}\n{prefix}inactive_file {45 * mib}\n{prefix}active_file {5 * mib}\n"
    )
    monkeypatch.setattr(estimate, "_CGROUPS", ((tmp_path, "memory.max", "memory.current"),))
    assert measure_room(tmp_path).ram == 54 * mib
    (tmp_path / "memory.max").write_text("max\n")
    assert measure_room(tmp_path).ram > 64 * mib


def test_units_for_people():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 * GIB, 5e15)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3 GiB",
        "4547 TiB",
    ]
    assert [human_seconds(n) for n in (4.4, 89, 91, 7200)] == ["4 s", "89 s", "2 min", "2.0 h"]
