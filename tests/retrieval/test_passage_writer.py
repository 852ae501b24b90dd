"""Passage stores against `read_corpus`, their reader, and every kind of bad corpus."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rex_rag.data.corpus import CorpusError, read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.index.passage_writer import _shared_digests, sample_passages, scan_corpus, write_store
from rex_rag.retrieval.passages import PassageList, PassageStore, passage_json
from rex_rag.types import Passage

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def store_of(files: list[Path], folder: Path) -> PassageStore:
    folder.mkdir(exist_ok=True)
    write_store(files, scan_corpus(files), folder, folder / "info.json")
    return PassageStore(folder)


def test_the_bytes_on_disk_are_the_ones_documented(tmp_path: Path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"id": 7, "title": " Olso\n fjord ", "text": "é"}, {"contents": "b"}])
    info = write_store([corpus], scan_corpus([corpus]), tmp_path, tmp_path / "info.json")
    first = '{"id": "7", "contents": "\\"Olso fjord\\"\\né"}\n'.encode()
    second = b'{"id": "2", "contents": "\\"\\"\\nb"}\n'
    assert (tmp_path / "passages.jsonl").read_bytes() == first + second
    offsets = [0, len(first), len(first) + len(second)]
    assert (tmp_path / "offsets.u64").read_bytes() == b"".join(n.to_bytes(8, "little") for n in offsets)
    assert (info.passages, info.bytes, info.prefixed_ids) == (2, offsets[-1], 0)
    assert info.sha256 == hashlib.sha256(first + second).hexdigest()
    store = PassageStore(tmp_path)
    assert list(store) == [Passage("7", "Olso fjord", "é"), Passage("2", "", "b")]
    assert store.json(0) == first[:-1]
    for row in (-1, 2):
        with pytest.raises(IndexError):
            store.json(row)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_text_survives_the_store(tmp_path_factory, rows):
    passages = [Passage(str(n), " ".join(title.split()), text) for n, (title, text) in enumerate(rows) if text.strip()]
    if not passages:
        return
    folder = tmp_path_factory.mktemp("store")
    corpus = write_lines(folder / "c.jsonl", [{"id": p.id, "title": p.title, "text": p.text} for p in passages])
    assert list(store_of([corpus], folder)) == passages
    in_memory = PassageList(passages)
    assert [in_memory.json(row) for row in range(len(passages))] == [passage_json(passage) for passage in passages]


def test_ids_that_files_share_are_told_apart_as_in_read_corpus(tmp_path: Path):
    one = write_lines(tmp_path / "x" / "one.jsonl", [{"id": "a", "contents": "A"}, {"id": "b", "contents": "B"}])
    two = write_lines(tmp_path / "x" / "two.jsonl", [{"id": "b", "contents": "B2"}, {"id": "c", "contents": "C"}])
    store = store_of([one, two], tmp_path / "store")
    assert [passage.id for passage in store] == ["a", "x/one:b", "x/two:b", "c"]
    assert list(store) == read_corpus([one, two])
    assert json.loads((tmp_path / "store" / "info.json").read_text())["prefixed_ids"] == 2


def test_ids_that_repeat_whatever_is_put_in_front_are_refused(tmp_path: Path):
    one = write_lines(tmp_path / "x" / "one.jsonl", [{"id": "b", "contents": "B"}, {"id": "x/two:b", "contents": "!"}])
    two = write_lines(tmp_path / "x" / "two.jsonl", [{"id": "b", "contents": "B2"}])
    with pytest.raises(CorpusError, match="still repeat"):
        store_of([one, two], tmp_path / "store")
    # Within one file: its own "b" becomes what another of its ids already is.
    write_lines(one, [{"id": "b", "contents": "B"}, {"id": "x/one:b", "contents": "!"}])
    with pytest.raises(CorpusError, match="still repeat"):
        store_of([one, two], tmp_path / "other")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the Wikipedia passages in ../shared/data")
def test_real_passages_are_those_of_read_corpus(tmp_path: Path):
    files = [REAL_DATA / name / "corpus.jsonl" for name in ("hotpotqa_sample", "2wiki_passages")]
    store = store_of(files, tmp_path / "store")
    assert len(store) == 7_113
    assert list(store) == read_corpus(files)


def test_gzipped_corpora_are_read_and_broken_ones_named(tmp_path: Path):
    rows = [{"id": str(n), "contents": f"text {n}"} for n in range(50)]
    plain = write_lines(tmp_path / "c.jsonl", rows)
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(store_of([packed], tmp_path / "store")) == read_corpus([plain])
    assert scan_corpus([packed])[0].lines == 50
    assert len(sample_passages([packed], 10)) == 10
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(CorpusError, match=r"c\.jsonl\.gz, after line \d+: broken gzip data"):
        scan_corpus([packed])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty"),
        (b"\n \n", r"the file is empty"),
        (b'{"contents": "a"}\n{"contents": \n', r"c\.jsonl, line 2: broken JSON"),
        (b'{"contents": "a"}\n\n[1]\n', r"c\.jsonl, line 3: a JSON object is needed"),
        (b'{"contents": "a"}\n{"body": "b"}\n', r"c\.jsonl, line 2: missing fields"),
        (b'{"contents": "a"}\n{"contents": "\xff"}\n', r"c\.jsonl, line 2: not UTF-8"),
        ('{"contents": "a"}\n'.encode("utf-16"), r"c\.jsonl, line 1: not UTF-8"),
        (
            b'{"id": "z", "contents": "a"}\n{"id": "y", "contents": "b"}\n{"id": "z", "contents": "c"}\n',
            "line 3: the id",
        ),
        (b'{"id": "z", "contents": "  "}\n', r"line 1: empty text"),
    ],
)
def test_bad_corpora_are_refused_with_the_line_and_leave_no_store(tmp_path: Path, content: bytes, message: str):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        files = [corpus]
        scanned = scan_corpus(files)
        sample_passages(files, 10)
        write_store(files, scanned, tmp_path, tmp_path / "info.json")
    assert not (tmp_path / "passages.jsonl").exists()
    with pytest.raises(RetrievalError, match="missing or empty"):
        PassageStore(tmp_path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(CorpusError, match="no such file"):
        scan_corpus([tmp_path / "absent.jsonl"])
    with pytest.raises(CorpusError, match="this is a folder"):
        scan_corpus([tmp_path])


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"contents": "a"}])
    scanned = scan_corpus([corpus])
    write_lines(corpus, [{"contents": "a"}, {"contents": "b"}])
    with pytest.raises(CorpusError, match="changed while it was read"):
        write_store([corpus], scanned, tmp_path, tmp_path / "info.json")


def test_a_store_that_is_gone_is_written_again_whatever_was_noted_of_it(tmp_path: Path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"contents": "a"}])
    store_of([corpus], tmp_path / "store")
    (tmp_path / "store" / "passages.jsonl").unlink()
    assert [passage.text for passage in store_of([corpus], tmp_path / "store")] == ["a"]


def test_different_ids_with_the_same_digest_are_no_fault(tmp_path: Path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"id": "a", "contents": "A"}, {"id": "b", "contents": "B"}])
    assert _shared_digests([corpus], [2], np.array([5, 5], dtype=np.uint64)) is None


def test_a_sample_is_spread_over_the_file_and_skips_what_cannot_be_used(tmp_path: Path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"id": str(n), "contents": f"text {n:04d}"} for n in range(1000)])
    rows = [int(passage.id) for passage in sample_passages([corpus], 10)]
    assert len(rows) == 10
    assert rows == sorted(rows)
    assert all(abs(row - 100 * number) <= 15 for number, row in enumerate(rows))
    assert len(sample_passages([corpus], 5000)) == 1000
    corpus.write_text('broken\n{"contents": "a"}\n')
    assert [passage.text for passage in sample_passages([corpus], 10)] == ["a"]


def test_a_store_whose_files_do_not_belong_together_is_refused(tmp_path: Path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"contents": "a"}, {"contents": "b"}])
    store_of([corpus], tmp_path)
    passages, offsets = tmp_path / "passages.jsonl", tmp_path / "offsets.u64"
    whole, positions = passages.read_bytes(), offsets.read_bytes()
    passages.write_bytes(whole + b"{}\n")
    with pytest.raises(RetrievalError, match="do not belong together"):
        PassageStore(tmp_path)
    passages.write_bytes(whole)
    offsets.write_bytes(positions[:-3])
    with pytest.raises(RetrievalError, match="no whole number of offsets"):
        PassageStore(tmp_path)
