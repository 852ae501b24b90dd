"""A directory is an index if and only if its manifest says so and the files agree."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.manifest import Manifest, hash_files, library_versions, verify


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "index"
    (directory / "sub").mkdir(parents=True)
    (directory / "passages.jsonl").write_bytes(b"abc")
    (directory / "sub" / "data").write_bytes(b"12345")
    manifest_of(directory).write(directory)
    return directory


def manifest_of(directory: Path) -> Manifest:
    return Manifest(
        kind="bm25",
        passages=3,
        corpus_files=[{"name": "c.jsonl", "bytes": 9, "lines": 3, "sha256": "f" * 64}],
        corpus_sha256="a" * 64,
        encoder=None,
        index={"k1": 1.5},
        files=hash_files(directory),
        arguments={"kind": "bm25"},
        versions=library_versions(),
    )


def test_what_is_written_is_read(directory: Path):
    manifest = Manifest.read(directory)
    assert replace(manifest, sha256="") == manifest_of(directory) and len(manifest.sha256) == 64
    assert manifest.files == {
        "passages.jsonl": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
        "sub/data": {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()},
    }
    assert manifest.versions["tantivy"].startswith("0.27.")
    assert verify(directory) == manifest


def test_the_fingerprint_follows_corpus_encoder_and_parameters_but_no_version(directory: Path):
    manifest = Manifest.read(directory)
    assert len(manifest.fingerprint) == 16
    assert replace(manifest, versions={}, files={}).fingerprint == manifest.fingerprint
    for change in (
        {"corpus_sha256": "b" * 64},
        {"index": {"k1": 1.2}},
        {"encoder": {"revision": "sha256:1"}},
        {"passages": 4},
        {"kind": "dense"},
    ):
        assert replace(manifest, **change).fingerprint != manifest.fingerprint


def test_the_fingerprint_does_not_depend_on_what_an_encoder_is_called(directory: Path):
    one, other, third = (
        replace(Manifest.read(directory), encoder={"name": name, "revision": revision}).fingerprint
        for name, revision in (("e", "sha256:1"), ("some/where/e", "sha256:1"), ("e", "sha256:2"))
    )
    assert one == other != third


def test_no_directory_no_manifest_and_an_unfinished_build(tmp_path: Path):
    with pytest.raises(RetrievalError, match="no such directory; build one with `rex-rag index`"):
        Manifest.read(tmp_path / "absent")
    (tmp_path / "absent.building").mkdir()
    with pytest.raises(RetrievalError, match=r"unfinished build lies in .*absent\.building: give the same"):
        Manifest.read(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(RetrievalError, match=r"no manifest\.json, so it is not a finished index"):
        Manifest.read(tmp_path / "bare")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is broken"),
        ("[]", "has format None"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1}', "is broken"),
    ],
)
def test_a_broken_manifest_is_refused(directory: Path, content: str, message: str):
    (directory / "manifest.json").write_text(content)
    with pytest.raises(RetrievalError, match=message):
        Manifest.read(directory)


def test_damage_is_named_size_at_once_and_content_by_verify(directory: Path):
    data = directory / "sub" / "data"
    data.write_bytes(b"1234")
    with pytest.raises(RetrievalError, match="sub/data is 4 bytes, the manifest says 5 bytes"):
        Manifest.read(directory)
    data.write_bytes(b"12346")
    Manifest.read(directory)
    with pytest.raises(RetrievalError, match="not what its manifest says: sub/data"):
        verify(directory)
    data.unlink()
    with pytest.raises(RetrievalError, match="sub/data is missing"):
        Manifest.read(directory)
    data.write_bytes(b"12345")
    (directory / "more").write_bytes(b"")
    with pytest.raises(RetrievalError, match="not what its manifest says: more"):
        verify(directory)


def test_another_corpus_is_refused_with_both_named(directory: Path):
    manifest = Manifest.read(directory)
    manifest.check_corpus(json.loads(json.dumps(manifest.corpus_files)), directory)
    other = [{"name": "d.jsonl", "bytes": 8, "lines": 3, "sha256": "e" * 64}]
    with pytest.raises(RetrievalError, match=r"c\.jsonl \(9 bytes.*not from d\.jsonl \(8 bytes"):
        manifest.check_corpus(other, directory)
