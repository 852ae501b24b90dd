"""What an index build will take, said before it starts, and whether this machine can give it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from rex_rag.support.errors import UserError

# A container's folder, and its limit, use and details of memory: version 2 and version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Pages of a memory map count as used until the kernel needs them; below this margin a build would start to swap.
HEADROOM = 1.1
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class NotEnoughRoom(UserError):
    """The machine cannot hold what a build needs; the message gives need, supply and way out."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that a stage of a build takes. Stages run one after the other."""

    peak_ram: int  # while building, besides the interpreter and its libraries
    serving_ram: int  # what a server needs resident; memory-mapped parts that may stay on disk are left out
    work_disk: int  # written while building and gone at the end
    final_disk: int  # what stays
    seconds: float
    notes: tuple[str, ...] = field(default_factory=tuple)

    def then(self, later: Estimate) -> Estimate:
        """This stage and a later one of the same build."""
        return Estimate(
            max(self.peak_ram, later.peak_ram),
            max(self.serving_ram, later.serving_ram),
            self.work_disk + later.work_disk,
            self.final_disk + later.final_disk,
            self.seconds + later.seconds,
            self.notes + later.notes,
        )


@dataclass(frozen=True)
class Room:
    """What a machine can give a build, in bytes."""

    ram: int
    disk: int


def measure_room(directory: str | Path) -> Room:
    """Free memory of this machine (or of the container around it) and free disk where `directory` will lie."""
    ram = _available_ram()
    existing = Path(directory).resolve()
    while not existing.exists():
        existing = existing.parent
    return Room(ram, shutil.disk_usage(existing).free)


def check_room(estimate: Estimate, room: Room) -> None:
    """Refuse a build that the machine cannot hold.

    Raises:
        NotEnoughRoom: naming what is needed, what is there and what to do.
    """
    lacking = []
    if estimate.peak_ram * HEADROOM > room.ram:
        lacking.append(
            f"{human_bytes(estimate.peak_ram * HEADROOM)} of memory ({human_bytes(estimate.peak_ram)} and a tenth to "
            f"spare), and {human_bytes(room.ram)} are free"
        )
    disk = estimate.work_disk + estimate.final_disk
    if disk * HEADROOM > room.disk:
        lacking.append(
            f"{human_bytes(disk * HEADROOM)} of disk ({human_bytes(estimate.final_disk)} for the index, "
            f"{human_bytes(estimate.work_disk)} while building), and {human_bytes(room.disk)} are free"
        )
    if lacking:
        raise NotEnoughRoom(
            f"the build needs {'; '.join(lacking)}. Take a smaller index (flat-fp16 halves flat; bm25 needs the least "
            "memory), a larger machine, a smaller corpus, or --force if these figures are wrong"
        )


def human_bytes(count: float) -> str:
    """Bytes in binary units, three figures: 1536 -> '1.50 KiB'."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count /= 1024
        power += 1
    figures = f"{count:.0f}" if power == 0 or count >= 100 else f"{count:.3g}"
    return f"{figures} {_UNITS[power]}"


def human_seconds(seconds: float) -> str:
    """Seconds as people say them: '45 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _available_ram() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, limit, usage in _CGROUPS:
        if not (folder / limit).is_file() or not (folder / usage).is_file():
            continue
        text = (folder / limit).read_text().strip()
        if text.isdigit():
            used = int((folder / usage).read_text()) - _file_pages(folder / "memory.stat")
            available = min(available, max(0, int(text) - used))
    return available


def _file_pages(details: Path) -> int:
    """Bytes of a container's memory that hold file contents, which the kernel gives up when memory is asked for.

    They count as used: after a corpus larger than the container's memory was read, nothing else would seem to be free.
    """
    if not details.is_file():
        return 0
    found = dict(line.split() for line in details.read_text().splitlines())
    prefix = "total_" if "total_inactive_file" in found else ""
    return sum(int(found.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
