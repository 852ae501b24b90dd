"""What an index directory says of itself: corpus, encoder, index, versions, and the hash of every file.

A directory with a manifest is a finished index, since the manifest is written last; one without is none. Nothing in it
depends on when or where it was built, so two builds of the same index have the same manifest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.lookup import LOOKUP_FILE
from rex_rag.support.durable import write_json
from rex_rag.support.progress_bars import progress_bar

MANIFEST_FILE = "manifest.json"
# Beside the manifest, where the index was built with a local encoder: the folder in which it lies on this machine. No
# part of the index: not hashed, not needed where `retriever_encoder` is given, to be left out of what is published.
ENCODER_FOLDER_FILE = "encoder_folder.txt"
FORMAT = 1
_LIBRARIES = (
    "numpy",
    "tantivy",
    "faiss-cpu",
    "faiss-gpu",
    "torch",
    "sentence-transformers",
    "qdrant-client",
)
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    kind: `bm25`, `dense` or `late_interaction`. passages: how many. corpus_files: name, bytes, lines and SHA-256 of
    each source file. corpus_sha256: of `passages.jsonl`. encoder: the encoder's specification, dimension and revision,
    None for bm25. index: kind and parameters of the index. files: relative path -> {bytes, sha256}. arguments: what
    was asked for. versions: of the libraries that built it. sha256: of all of this but itself; empty of an index of an
    earlier version, whose manifest nothing vouches for.
    """

    kind: str
    passages: int
    corpus_files: list[dict[str, Any]]
    corpus_sha256: str
    encoder: dict[str, Any] | None
    index: dict[str, Any]
    files: dict[str, dict[str, Any]]
    arguments: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT
    sha256: str = ""

    @property
    def fingerprint(self) -> str:
        """Identifies corpus, encoder and index parameters, in 16 hexadecimal digits; versions do not count.

        The encoder counts by its revision, prefixes and so on, not by its name: a folder may have any.
        """
        encoder = self.encoder and {name: value for name, value in self.encoder.items() if name != "name"}
        identity = (self.kind, self.passages, self.corpus_sha256, encoder, self.index)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, directory: Path) -> None:
        write_json(directory / MANIFEST_FILE, asdict(self) | {"sha256": self._own_sha256()})

    def _own_sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self) | {"sha256": ""}, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Read the manifest and hold the files' sizes to it.

        Raises:
            RetrievalError: for a directory that is missing or has no manifest, a broken manifest or one of another
                format, a file that is missing or of another size.
        """
        directory = Path(directory)
        path = directory / MANIFEST_FILE
        if not directory.is_dir():
            raise RetrievalError(_absent(directory, "no such directory"))
        if not path.is_file():
            raise RetrievalError(_absent(directory, f"it has no {MANIFEST_FILE}, so it is not a finished index"))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.get("format") if isinstance(content, dict) else None
            if found != FORMAT:
                raise RetrievalError(
                    f"{path} has format {found!r}, this version reads {FORMAT}; build the index again with "
                    "`rex-rag index`, or use the version that built it"
                )
            manifest = cls(**content)
            sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
            if manifest.sha256 and manifest.sha256 != manifest._own_sha256():
                raise RetrievalError(
                    f"{path} was changed (its SHA-256 differs): copy the index again or build it again"
                )
        except RetrievalError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RetrievalError(f"{path} is broken ({error}); build the index again") from error
        for name, size in sizes.items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != size:
                there = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
                raise RetrievalError(
                    f"{file} is {there}, the manifest says {size:,} bytes: the index is damaged; copy it again or "
                    "build it again"
                )
        return manifest

    def check_corpus(self, scanned: Sequence[Mapping[str, Any]], directory: Path) -> None:
        """Refuse corpus files that are not those the index was built from (compared by size and hash, in order).

        Raises:
            RetrievalError: naming both.
        """
        if [file["sha256"] for file in scanned] != [file["sha256"] for file in self.corpus_files]:
            raise RetrievalError(
                f"the index {directory} was built from {_named(self.corpus_files)}, not from {_named(scanned)}; leave "
                "the corpus out to search what is in the index, or build an index of this corpus"
            )


def _named(files: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{file['name']} ({file['bytes']:,} bytes, SHA-256 {file['sha256'][:12]}…)" for file in files)


def _absent(directory: Path, reason: str) -> str:
    building = directory.with_name(directory.name + ".building")
    way_out = (
        f"an unfinished build lies in {building}: give the same `rex-rag index` command again to finish it"
        if building.is_dir()
        else "build one with `rex-rag index`"
    )
    return f"{directory}: {reason}; {way_out}"


def hash_files(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Relative path -> size and SHA-256 of every file of the index but the manifest; `known` spares hashing."""
    apart = (MANIFEST_FILE, ENCODER_FOLDER_FILE)
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in apart)
    known = known or {}
    described = {}
    with progress_bar(sum(path.stat().st_size for path in paths), "hashing", "B") as bar:
        for path in paths:
            name, size = path.relative_to(directory).as_posix(), path.stat().st_size
            if name in known:
                described[name] = {"bytes": size, "sha256": known[name]}
                bar.update(size)
                continue
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    bar.update(len(block))
            described[name] = {"bytes": size, "sha256": digest.hexdigest()}
    return described


def verify(directory: str | Path) -> Manifest:
    """Hash every file of an index and compare with its manifest; `Manifest.read` compares sizes alone.

    Raises:
        RetrievalError: naming the files that differ, are missing or do not belong there.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    found = hash_files(directory)
    # A table of titles that an index of an earlier version was given later belongs to it all the same.
    names = (found.keys() - {LOOKUP_FILE}) | manifest.files.keys()
    wrong = sorted(name for name in names if found.get(name) != manifest.files.get(name))
    if wrong:
        raise RetrievalError(
            f"{directory} is not what its manifest says: {', '.join(wrong)}; copy the index again or build it again"
        )
    return manifest


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a build depends on, those that are installed."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
