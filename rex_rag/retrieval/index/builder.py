"""Build an index directory: estimate, passages, index, manifest, and only then the directory's own name.

All work happens in `OUTPUT.building/`, held by a lock. A build that is killed at any moment goes on where it stood
when the same command is given again, and ends with the same bytes; `OUTPUT` itself appears by one rename, complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rex_rag.data.corpus import CorpusError, corpus_files
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.estimate import Estimate, Room, check_room, human_bytes, human_seconds, measure_room
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.kinds import KINDS
from rex_rag.retrieval.index.passage_writer import CorpusFile, sample_passages, scan_corpus, write_store
from rex_rag.retrieval.index_kind import IndexKind
from rex_rag.retrieval.manifest import MANIFEST_FILE, Manifest, hash_files, library_versions
from rex_rag.retrieval.passages import OFFSET_BYTES, PASSAGES_FILE, PassageStore, passage_json
from rex_rag.support.durable import locked, remove_partial, sync_folder, write_json
from rex_rag.support.wording import counted, shorten
from rex_rag.types import Passage

SAMPLE_SIZE = 1_000
# All that a build makes in its work area; a directory of that name that holds anything else is somebody's.
_WORK_AREA = {"lock", "plan.json", ".plan.json.part", "passages.json", ".passages.json.part", "index", "work"}
# Reading, checking and writing passages, on one core of 2020s hardware; the estimate's only unmeasured rate.
_STORE_ROWS_PER_SECOND = 40_000


def build_index(
    arguments: IndexArguments,
    say: Callable[[str], None],
    force: bool = False,
    dry_run: bool = False,
) -> Path | None:
    """Build the index that `arguments` ask for, and return its directory; `say` gets the estimate and what happens.

    force: build even if the estimate exceeds what the machine can give. dry_run: stop after the estimate.

    Raises:
        CorpusError: for a corpus that is missing, empty or malformed.
        NotEnoughRoom: when memory or disk do not suffice.
        RetrievalError: when the directory holds another index, another process builds it, or what lies there
            unfinished was asked for otherwise.
    """
    files = corpus_files(arguments.corpus)
    output, building = _places(arguments.output)
    scanned = scan_corpus(files)
    plan = {
        "arguments": arguments.identity,
        "corpus_files": [asdict(file) for file in scanned],
        "versions": library_versions(),
    }
    if _is_built(output, plan, say):
        shutil.rmtree(building, ignore_errors=True)
        return output
    if output.is_mount():
        raise RetrievalError(f"{output} is a mount point, which no rename replaces; name a directory inside it")
    kind = KINDS[arguments.kind](arguments)
    total = sum(file.lines for file in scanned)
    sample = sample_passages(files, SAMPLE_SIZE)
    estimate = _store_estimate(sample, total).then(kind.estimate(sample, total))
    room = measure_room(output)
    room = Room(room.ram, room.disk + _size(building))
    say(describe_estimate(estimate, room, total))
    if not force:
        check_room(estimate, room)
    if dry_run:
        return None
    building.mkdir(parents=True, exist_ok=True)
    with locked(building / "lock") as ours:
        if not ours:
            raise RetrievalError(f"another process is building {output}; wait for it, or stop it and try again")
        if _is_built(output, plan, say):  # by another process, since this one looked
            shutil.rmtree(building, ignore_errors=True)
            return output
        _check_plan(building, plan, say)
        try:
            _build(kind, files, scanned, building, plan)
        except OSError as error:
            # numpy says how many numbers it could not write, but not why, and neither says where.
            if error.errno == errno.ENOSPC or (error.errno is None and " requested and " in str(error)):
                raise RetrievalError(
                    f"the disk is full: {building} could not be written to its end ({error}); make room and give the "
                    "same command again, which goes on from there"
                ) from error
            raise
        os.rename(building / "index", output)
        sync_folder(output.parent)
        shutil.rmtree(building, ignore_errors=True)
    manifest = Manifest.read(output)
    size = sum(entry["bytes"] for entry in manifest.files.values())
    say(f"{output}: {counted(manifest.passages, 'passage')}, {human_bytes(size)}, fingerprint {manifest.fingerprint}")
    return output


def describe_estimate(estimate: Estimate, room: Room, total: int) -> str:
    """The estimate for people, beside what the machine has."""
    lines = [
        f"about {counted(total, 'passage')}; this build will take",
        f"  time    {human_seconds(estimate.seconds)}",
        f"  memory  {human_bytes(estimate.peak_ram)} ({human_bytes(room.ram)} free), "
        f"{human_bytes(estimate.serving_ram)} to search afterwards",
        f"  disk    {human_bytes(estimate.final_disk)}, and {human_bytes(estimate.work_disk)} while building "
        f"({human_bytes(room.disk)} free)",
    ]
    return "\n".join(lines + [f"  {note}" for note in estimate.notes])


def _build(
    kind: IndexKind, files: Sequence[Path], scanned: Sequence[CorpusFile], building: Path, plan: dict[str, Any]
) -> None:
    index, work = building / "index", building / "work"
    if (index / MANIFEST_FILE).exists():
        return
    index.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    try:
        info = write_store(files, scanned, index, building / "passages.json")
    except CorpusError:
        # The corpus must change, so nothing of this is worth keeping, and left there it would refuse the mended one.
        shutil.rmtree(building, ignore_errors=True)
        raise
    passages = PassageStore(index)
    encoder, parameters = kind.build(passages, info.sha256, index, work)
    remove_partial(index)
    Manifest(
        kind=plan["arguments"]["kind"],
        passages=info.passages,
        corpus_files=plan["corpus_files"],
        corpus_sha256=info.sha256,
        encoder=encoder,
        index=parameters,
        files=hash_files(index, known={PASSAGES_FILE: info.sha256}),
        arguments=plan["arguments"],
        versions=plan["versions"],
    ).write(index)


def _store_estimate(sample: Sequence[Passage], total: int) -> Estimate:
    row = sum(len(passage_json(passage)) + 1 for passage in sample) / len(sample) + OFFSET_BYTES
    row += 2 * OFFSET_BYTES  # in the table of ids and titles, at most
    return Estimate(
        # Digests of all ids, and their sorted copy with the order; the table.
        peak_ram=total * 5 * OFFSET_BYTES,
        serving_ram=0,
        work_disk=0,
        final_disk=int(row * total),
        seconds=total / _STORE_ROWS_PER_SECOND,
    )


def _places(given: str) -> tuple[Path, Path]:
    """Where the index will lie and where it is built: beside each other, so that one rename moves it.

    Raises:
        RetrievalError: for a work area in which something else lies.
    """
    output = Path(given)
    if output.is_symlink() or not output.name:
        output = output.resolve()  # a rename would not follow a link, and `.` has no name to add to
    building = output.with_name(output.name + ".building")
    found = {path.name for path in building.iterdir()} if building.is_dir() else set()
    if foreign := sorted(found - _WORK_AREA):
        raise RetrievalError(
            f"{building}, where the index would be built and which is removed at the end, holds {foreign[0]!r}, which "
            "no build left there; it is not touched: choose another output directory, or move it away"
        )
    return output, building


def _is_built(output: Path, plan: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the index that is asked for lies there; whatever else lies there is refused."""
    if not output.exists() or _is_empty_folder(output):
        return False
    _check_built(output, plan)
    say(f"{output} is already built: nothing to do")
    return True


def _check_built(output: Path, plan: dict[str, Any]) -> None:
    if not output.is_dir():
        raise RetrievalError(f"{output} is a file; choose another output directory")
    if not (output / MANIFEST_FILE).is_file():
        raise RetrievalError(
            f"{output} exists and is no index; it is not touched: choose another output directory, or remove it"
        )
    manifest = Manifest.read(output)
    found = {"arguments": manifest.arguments, "corpus_files": manifest.corpus_files, "versions": manifest.versions}
    differing = _differences(found, plan, ("arguments", "corpus_files"))
    if differing:
        raise RetrievalError(
            f"{output} holds an index of its own ({differing}); it is not overwritten: choose another output "
            "directory, or remove it"
        )


def _check_plan(building: Path, plan: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuse to go on with what another command began; write down what this one asks for."""
    state = building / "plan.json"
    if not state.exists():
        write_json(state, plan)
        return
    differing = _differences(json.loads(state.read_text(encoding="utf-8")), plan, tuple(plan))
    if differing:
        raise RetrievalError(
            f"{building} holds an unfinished build of something else ({differing}); give the command that began it to "
            "finish it, or remove the directory to begin anew"
        )
    say(f"going on with the unfinished build in {building}")


def _differences(found: dict[str, Any], wanted: dict[str, Any], parts: Sequence[str]) -> str:
    """What differs between two plans, in words; empty if nothing does."""
    said = []
    for part in parts:
        if found[part] == wanted[part]:
            continue
        if part == "corpus_files":
            said.append("another corpus")
            continue
        for name in sorted(found[part].keys() | wanted[part].keys()):
            old, new = found[part].get(name), wanted[part].get(name)
            if old != new:
                said.append(f"{name} {shorten(old)}, now {shorten(new)}")
    return ", ".join(said)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _size(directory: Path) -> int:
    """Bytes that a folder takes on disk: files made large ahead of their content do not count in full."""
    taken = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # another process may be building there
            taken += path.lstat().st_blocks * 512
    return taken
