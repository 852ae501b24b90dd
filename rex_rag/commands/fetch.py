"""`rex-rag fetch`: questions, passages and indexes that the paper's field shares, from the Hub into one folder."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rex_rag.support.durable import locked, write_json, written_whole
from rex_rag.support.errors import UserError
from rex_rag.support.hub_files import (
    HubFile,
    HubListing,
    bytes_left,
    digest_of,
    fetch_file,
    list_files,
    read_beginning,
)

MANIFEST = "fetched.json"
SAMPLE = "hotpotqa-sample"
SAMPLE_FILES = ("qa.jsonl", "corpus.jsonl", "other_questions.jsonl")
# The first 24 MiB of HotpotQA's training file, some 4,000 questions: the sample's, and enough to train a start on.
_SAMPLE_BYTES = 24 << 20
_SAMPLE_QUESTIONS, _SAMPLE_CONTEXTS = 100, 700
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a Hub's repository whose path begins with `prefix`, and what to do with them then."""

    repository: str
    prefix: str
    then: str = ""


def sources() -> dict[str, Source]:
    """Everything that has a name here. Files and sizes are not written down: the Hub is asked."""
    from rex_rag.evaluation.benchmarks import FLASHRAG_REPOSITORY, FLASHRAG_SETS

    foreign = "for Search-R1's own server, which `retriever: http://…` asks; `rex-rag index` builds this package's"
    return {
        **{name: Source(FLASHRAG_REPOSITORY, f"{name}/") for name in FLASHRAG_SETS},
        SAMPLE: Source(
            FLASHRAG_REPOSITORY, "hotpotqa/train.jsonl", "recipes/hotpotqa_sample/rex_rag.yaml trains on it"
        ),
        "wiki-18": Source(
            "PeterJinGo/wiki-18-corpus",
            "wiki-18.jsonl.gz",
            "rex-rag index --config recipes/retrieval/wiki18_bm25.yaml, or wiki18_e5.yaml",
        ),
        "wiki-18-e5": Source("PeterJinGo/wiki-18-e5-index", "part_", f"cat part_* > e5_Flat.index there, {foreign}"),
        "wiki-18-bm25": Source("PeterJinGo/wiki-18-bm25-index", "bm25/", foreign),
    }


def add_fetch(commands: argparse._SubParsersAction) -> None:
    """`rex-rag fetch`: say what would be downloaded, and download it."""
    parser = commands.add_parser(
        "fetch",
        help="questions, passages and indexes from the Hub",
        description="Download data sets from the Hub into the layout that the recipes name. Sizes are told first and "
        "held against the free disk space; what is there is not fetched again; the same command goes on where a "
        "killed one stopped. A folder's fetched.json says which commit it holds, and later calls stay with it.",
        epilog="NAMES: nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle (questions; one split as "
        "hotpotqa/dev); hotpotqa-sample (100 questions and 7,000 passages); wiki-18 (21 million passages, as "
        "Search-R1 has them); wiki-18-e5 and wiki-18-bm25 (Search-R1's indexes of them).",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="what to fetch; the names are listed below")
    parser.add_argument("--output", type=Path, default=Path("data"), metavar="DIR", help="folder (default: data)")
    parser.add_argument(
        "--revision", help="branch, tag or commit of the repository (default: fetched.json's, or newest)"
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tell the sizes, and stop")
    parser.set_defaults(run=_fetch)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one name means: the files of `listing` that are wanted, and those of them that are not in `folder` yet."""

    name: str
    folder: Path
    listing: HubListing
    wanted: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]

    def target(self, file: HubFile) -> Path:
        return self.folder / file.path.removeprefix(f"{self.folder.name}/")

    def size(self, file: HubFile) -> int:
        """Bytes of a file that are read: of HotpotQA's training file the sample takes the beginning."""
        return min(file.size, _SAMPLE_BYTES) if self.name == SAMPLE else file.size

    @property
    def bytes_left(self) -> int:
        if self.name == SAMPLE:
            return sum(map(self.size, self.missing))
        return sum(bytes_left(file, self.target(file)) for file in self.missing)


def _fetch(options: argparse.Namespace) -> None:
    # A split beside its whole set is in it.
    names = [
        name for name in dict.fromkeys(options.names) if name == _set_of(name) or _set_of(name) not in options.names
    ]
    plans = [make_plan(name, options.output, options.revision) for name in names]
    for plan in plans:
        size = sum(map(plan.size, plan.wanted))
        left = f"{_size(plan.bytes_left)} to fetch" if plan.missing else "all there"
        print(f"{plan.name:<16} {_size(size):>9}, {left}: {plan.listing.repository}@{plan.listing.revision[:12]}")
    total, free = sum(plan.bytes_left for plan in plans), _free_bytes(options.output)
    print(f"{_size(total)} to fetch into {options.output}, where {_size(free)} are free", flush=True)
    if total > free:
        raise UserError(
            f"{options.output} has room for {_size(free)}, and {_size(total)} are to come; make room, name another "
            "--output, or fetch less"
        )
    if options.dry_run:
        return
    for plan in plans:
        if plan.missing:
            _carry_out(plan)
        print(f"{plan.name}: {plan.folder}" + (f"; {then}" if (then := sources()[_set_of(plan.name)].then) else ""))


def make_plan(name: str, output: Path, revision: str | None = None) -> Plan:
    """Work out what a name, or NAME/SPLIT, still lacks; the Hub is asked unless the folder's manifest answers.

    Raises:
        UserError: for an unknown name or split, a Hub that does not answer, and a file in the way.
    """
    known = sources()
    source, split = known.get(_set_of(name)), name.partition("/")[2]
    if source is None or (split and source.prefix != f"{_set_of(name)}/"):
        [near] = difflib.get_close_matches(name, known, n=1) or [""]
        meant = f" (did you mean {near}?)" if near else ""
        raise UserError(f"there is no {name!r} to fetch{meant}; there are {', '.join(known)}")
    folder = output / _set_of(name).replace("-", "_")
    held = _read_manifest(folder)
    pinned = revision or (held.revision if held else None)
    there = held is not None and (name != SAMPLE or all(_whole(folder / file.path, file) for file in held.files))
    listing = held if held is not None and there and pinned == held.revision else _ask(source, pinned)
    wanted = tuple(file for file in listing.files if split in ("", PurePosixPath(file.path).stem))
    if not wanted:
        splits = ", ".join(PurePosixPath(file.path).stem for file in listing.files)
        raise UserError(f"{_set_of(name)} has no split {split!r}; it has {splits}")
    plan = Plan(name, folder, listing, wanted, ())
    if name == SAMPLE:
        in_the_way = [folder / file for file in SAMPLE_FILES if held is None and (folder / file).exists()]
        if in_the_way:
            raise UserError(f"{in_the_way[0]} is there and was not fetched; move it away, or name another --output")
        missing = () if listing is held else wanted
    else:
        missing = tuple(file for file in wanted if not _is_there(plan.target(file), file, held))
    return Plan(name, folder, listing, wanted, missing)


def _ask(source: Source, revision: str | None) -> HubListing:
    whole = list_files(source.repository, revision)
    files = tuple(file for file in whole.files if file.path.startswith(source.prefix))
    if not files:
        raise UserError(f"{source.repository} at {whole.revision} has no {source.prefix}*; name an earlier --revision")
    return HubListing(whole.repository, whole.revision, files)


def _set_of(name: str) -> str:
    return name.partition("/")[0]


def _whole(target: Path, file: HubFile) -> bool:
    return target.is_file() and target.stat().st_size == file.size


def _is_there(target: Path, file: HubFile, held: HubListing | None) -> bool:
    if not target.exists():
        return False
    ours = {known.path: known for known in held.files}.get(file.path) if held else None
    if ours is not None and _whole(target, ours):
        return ours == file  # another revision's is replaced
    if _whole(target, file) and digest_of(target, file) == file.digest:
        return True
    raise UserError(f"{target} is there and is not {file.path} of the Hub; move it away, or name another --output")


def _carry_out(plan: Plan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder / ".fetching") as ours:
        if not ours:
            raise UserError(f"another process fetches into {plan.folder}; let it end")
        if plan.name == SAMPLE:
            _cut_sample(plan)
            return
        _write_manifest(plan.folder, plan.listing)
        for file in plan.missing:
            fetch_file(plan.listing, file, plan.target(file))


def _cut_sample(plan: Plan) -> None:
    from rex_rag.data.hotpotqa import cut_sample

    [source] = plan.wanted
    lines = read_beginning(plan.listing, source, _SAMPLE_BYTES).split(b"\n")
    whole = lines if source.size <= _SAMPLE_BYTES else lines[:-1]
    contents = cut_sample(map(json.loads, filter(bytes.strip, whole)), _SAMPLE_QUESTIONS, _SAMPLE_CONTEXTS)
    files = [
        HubFile(name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
        for name, content in zip(SAMPLE_FILES, contents, strict=True)
    ]
    _write_manifest(plan.folder, HubListing(plan.listing.repository, plan.listing.revision, tuple(files)))
    for name, content in zip(SAMPLE_FILES, contents, strict=True):
        with written_whole(plan.folder / name) as file:
            file.write(content)


def _read_manifest(folder: Path) -> HubListing | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(HubFile(name, int(one["bytes"]), one["digest"]) for name, one in content["files"].items())
        return HubListing(content["repository"], content["revision"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is broken ({error}); remove it, and what is whole will be recognised") from error


def _write_manifest(folder: Path, listing: HubListing) -> None:
    files = {file.path: {"bytes": file.size, "digest": file.digest} for file in listing.files}
    content = {"repository": listing.repository, "revision": listing.revision, "files": files}
    write_json(folder / MANIFEST, content)


def _free_bytes(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _size(number: float) -> str:
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}" if unit else f"{number:.0f} B"
