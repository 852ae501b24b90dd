"""The streaming builder: one segment with the answers of the retriever in memory, whatever kills or damages it."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25 import segments
from rex_rag.retrieval.bm25.build import build_bm25
from rex_rag.retrieval.bm25.estimate import estimate_bm25
from rex_rag.retrieval.bm25.retriever import SETTINGS_FILE, BM25Retriever
from rex_rag.retrieval.bm25.segments import META_FILE, part_borders
from rex_rag.retrieval.bm25.text import BM25Options
from rex_rag.retrieval.passages import OFFSETS_FILE, PASSAGES_FILE, PassageList, PassageStore, passage_json
from rex_rag.types import Passage

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
REAL_CORPORA = [REAL_DATA / "hotpotqa_sample" / "corpus.jsonl", REAL_DATA / "2wiki_passages" / "corpus.jsonl"]
needs_real_data = pytest.mark.skipif(
    not all(path.is_file() for path in REAL_CORPORA), reason="the real passages are not at ../shared/data"
)
FIRST_SEGMENT = f"{0:032x}"


@pytest.fixture
def many_parts(monkeypatch):
    """Several parts of a corpus that would be one."""
    monkeypatch.setattr(segments, "PART_BYTES", 20_000)
    monkeypatch.setattr(segments, "PART_PASSAGES", 1)


def _corpus(*texts):
    return PassageList([Passage(str(n), "", text) for n, text in enumerate(texts)])


def _random_corpus(size, seed=0):
    draws = random.Random(seed)
    words = [f"word{n}" for n in range(size)]
    weights = [1 / (n + 1) for n in range(size)]
    return PassageList(
        [Passage(str(n), f"Title {n}", " ".join(draws.choices(words, weights, k=30))) for n in range(size)]
    )


def _store(passages, directory):
    directory.mkdir(parents=True, exist_ok=True)
    lines = [passage_json(passage) + b"\n" for passage in passages]
    (directory / PASSAGES_FILE).write_bytes(b"".join(lines))
    np.cumsum([0, *map(len, lines)], dtype="<u8").tofile(directory / OFFSETS_FILE)
    return directory


def _hashes(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@needs_real_data
@pytest.mark.parametrize(("part_bytes", "parts"), [(segments.PART_BYTES, 1), (1 << 20, 8)])
def test_real_passages_in_a_directory_are_ranked_as_in_memory_in_several_parts_too(
    part_bytes, parts, tmp_path, monkeypatch
):
    passages = PassageList(read_corpus(REAL_CORPORA))
    in_memory = BM25Retriever(list(passages))
    monkeypatch.setattr(segments, "PART_BYTES", part_bytes)
    monkeypatch.setattr(segments, "PART_PASSAGES", 1)
    assert len(part_borders(len(passages), sum(len(passages.json(row)) for row in range(len(passages))))) == parts
    build_bm25(passages, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {FIRST_SEGMENT, "bm25", "meta"}
    loaded = BM25Retriever.load(tmp_path, passages)
    queries = [passage.text[:80] for passage in list(passages)[::100]] + ["zzz", "the of", "film", "born"]
    assert loaded.search(queries, 200) == in_memory.search(queries, 200)
    loaded.check()


def test_parts_are_a_power_of_eight_and_none_is_too_small_to_merge_with_its_like():
    assert part_borders(5, 100) == [5]
    assert part_borders(21_000_000, 11 << 30)[:2] == [21_000_000 // 64, 21_000_000 * 2 // 64]
    assert len(part_borders(79_999, 1 << 40)) == 1 and len(part_borders(80_000, 1 << 40)) == 8


def test_equal_scores_come_in_corpus_order_out_of_any_number_of_parts(many_parts, tmp_path):
    passages = _corpus(*["oslo harbour", "rome", "oslo rome"] * 300)
    build_bm25(passages, tmp_path)
    _, [rows] = BM25Retriever.load(tmp_path, passages).rank([["oslo"]], 900)
    pairs = [row for row in range(900) if row % 3 != 1]
    assert rows.tolist() == pairs + [row for row in range(900) if row % 3 == 1]


def test_segments_that_were_not_merged_are_ranked_by_row_too(tmp_path, monkeypatch):
    """As where a writer's memory was full in the middle of a part."""
    passages = _corpus(*["oslo harbour", "rome"] * 30)
    monkeypatch.setattr("rex_rag.retrieval.bm25.build.part_borders", lambda *_: [10, 20, 40, 60])
    build_bm25(passages, tmp_path / "index")
    assert len(json.loads((tmp_path / "index" / META_FILE).read_text())["segments"]) == 4
    retriever = BM25Retriever.load(tmp_path / "index", passages)
    assert retriever.search(["oslo", "rome"], 45) == BM25Retriever(list(passages)).search(["oslo", "rome"], 45)
    build_bm25(passages, tmp_path / "again")
    assert _hashes(tmp_path / "again") == _hashes(tmp_path / "index")


BUILD = """
import sys
from rex_rag.retrieval.bm25 import segments
from rex_rag.retrieval.bm25.build import build_bm25
from rex_rag.retrieval.passages import PassageStore
segments.PART_BYTES, segments.PART_PASSAGES = 20_000, 1
build_bm25(PassageStore(sys.argv[1]), sys.argv[2])
"""


def _start_build(store, output):
    return subprocess.Popen([sys.executable, "-c", BUILD, store, output], cwd=ROOT, stderr=subprocess.PIPE)


def _kill(process):
    process.kill()
    process.communicate()


def _committed(work):
    """Passages that a build has taken in for good."""
    meta = work / "segments" / META_FILE
    return sum(segment["max_doc"] for segment in json.loads(meta.read_text())["segments"]) if meta.exists() else 0


@pytest.mark.slow
def test_a_build_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(tmp_path):
    store = _store(_random_corpus(5_000), tmp_path / "store")
    straight = _start_build(store, tmp_path / "straight")
    _, errors = straight.communicate()
    assert straight.returncode == 0, errors.decode()

    output, work = tmp_path / "killed", tmp_path / "killed" / "work"
    draws = random.Random(0)
    reached = 0
    for moment in sorted([0, *(draws.randrange(4_500) for _ in range(9))]):
        process = _start_build(store, output)
        while not work.exists() or _committed(work) < moment:
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.001)
        time.sleep(draws.random() * 0.05)  # into the middle of whatever comes next
        _kill(process)
        assert not (output / SETTINGS_FILE).exists()
        # What is done stays done.
        assert _committed(work) >= max(reached, moment)
        reached = _committed(work)
        with pytest.raises(RetrievalError, match="unfinished"):
            BM25Retriever.load(output, PassageStore(store))
    last = _start_build(store, output)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert _hashes(output) == _hashes(tmp_path / "straight")
    BM25Retriever.load(output, PassageStore(store)).check()


@pytest.mark.parametrize("moved", range(6))
def test_killed_between_moving_two_files_a_build_ends_with_the_same_bytes(moved, tmp_path, monkeypatch):
    passages = _random_corpus(50)
    build_bm25(passages, tmp_path / "straight")
    replace, done = os.replace, []

    def dying(source, target):
        if Path(source).parent.name == "segments":
            done.append(source)
            if len(done) > moved:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            build_bm25(passages, tmp_path / "killed")
    build_bm25(passages, tmp_path / "killed")
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "straight")


def test_a_finished_index_is_kept_and_another_one_asked_for_replaces_it(tmp_path):
    passages = _random_corpus(50)
    found = build_bm25(passages, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build_bm25(passages, tmp_path) == found
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    # Other passages of the same number, other words: built anew, without a trace of what was there.
    for others, options in [
        (_random_corpus(50, seed=1), BM25Options()),
        (passages, BM25Options(stemmer=None)),
        (passages, BM25Options(stopwords=("word1",))),
    ]:
        build_bm25(others, tmp_path, options)
        build_bm25(others, tmp_path / "fresh", options)
        fresh = _hashes(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "fresh")
        assert _hashes(tmp_path) == fresh


def test_what_an_unlike_build_left_is_not_used(tmp_path):
    store = _store(_random_corpus(5_000), tmp_path / "store")
    output = tmp_path / "index"
    process = _start_build(store, output)
    while not _committed(output / "work"):
        assert process.poll() is None
        time.sleep(0.001)
    _kill(process)
    passages = _random_corpus(100, seed=5)
    build_bm25(passages, output)
    build_bm25(passages, tmp_path / "fresh")
    assert _hashes(output) == _hashes(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("passages", "options", "message"),
    [
        (_corpus(), {}, "0 passages"),
        (_corpus("the", "of a"), {}, "none of the 2 passages holds"),
        (_corpus("oslo"), {"stemmer": "klingon"}, "no such stemmer"),
        (_corpus("oslo"), {"stopwords": "klingon"}, "stopwords='klingon'"),
    ],
)
def test_what_cannot_be_indexed_is_refused(passages, options, message, tmp_path):
    with pytest.raises(RetrievalError, match=message):
        build_bm25(passages, tmp_path / "index", BM25Options(**options))
    assert not (tmp_path / "index" / SETTINGS_FILE).exists()


def _edit_settings(directory, **changes):
    path = directory / SETTINGS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path):
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: (index / SETTINGS_FILE).unlink(), "bm25.json is missing.*no BM25 index"),
        (lambda index: (index / SETTINGS_FILE).write_text("{"), "cannot be read"),
        (lambda index: _edit_settings(index, format=2), "format 2, this version reads 3"),
        (lambda index: _edit_settings(index, passages=99), "indexes 99 passages, but 100 were given"),
        (lambda index: (index / SETTINGS_FILE).write_text('{"format": 3}'), "lacks passages, stemmer"),
        (lambda index: (index / META_FILE).unlink(), "cannot be opened"),
        (lambda index: (index / META_FILE).write_text("{"), "cannot be opened"),
        (lambda index: (index / f"{FIRST_SEGMENT}.idx").unlink(), f"cannot be opened.*{FIRST_SEGMENT}"),
        (lambda index: _cut(index / f"{FIRST_SEGMENT}.term"), f"{FIRST_SEGMENT}.term is damaged"),
        (lambda index: (index / f"{FIRST_SEGMENT}.pos").write_bytes(b""), f"{FIRST_SEGMENT}.pos is damaged"),
        # As if the stemmer or the list of stop words had changed since.
        (lambda index: _edit_settings(index, stemmer="german"), "does not lead from 'dying' to passage 0"),
        (lambda index: _edit_settings(index, stopwords=None), "does not lead from 'of' to passage 0.*tantivy"),
    ],
)
def test_an_index_that_is_damaged_or_of_another_tokenizer_is_refused(damage, message, tmp_path):
    passages = _corpus(*["the organization of generously dying rivers"] * 100)
    build_bm25(passages, tmp_path)
    damage(tmp_path)
    with pytest.raises(RetrievalError, match=message):
        BM25Retriever.load(tmp_path, passages)


@pytest.mark.parametrize("kind", ["fast", "fieldnorm", "idx", "pos", "store", "term"])
def test_no_byte_of_a_segment_changes_unnoticed(kind, tmp_path):
    passages = _corpus("oslo harbour", "rome")
    build_bm25(passages, tmp_path)
    path = tmp_path / f"{FIRST_SEGMENT}.{kind}"
    whole = path.read_bytes()
    body = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for position in range(body):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with pytest.raises(RetrievalError, match=f"{FIRST_SEGMENT}.{kind} is damaged"):
            BM25Retriever.load(tmp_path, passages)


def test_an_index_of_other_passages_is_refused(tmp_path):
    passages, others = _corpus("oslo", "rome"), _corpus("oslo", "madrid")
    build_bm25(passages, tmp_path)
    with pytest.raises(RetrievalError, match=r"does not lead from 'madrid' to passage 1 \(id '1'\)"):
        BM25Retriever.load(tmp_path, others)


@pytest.mark.parametrize("saved", [True, False])
def test_an_index_answers_many_threads_and_a_forked_process_alike(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("rex_rag.retrieval.bm25.retriever.ROWS_WORTH_THREADS", 1)
    passages = _random_corpus(2_000)
    if saved:
        build_bm25(passages, tmp_path)
    retriever = BM25Retriever.load(tmp_path, passages) if saved else BM25Retriever(list(passages))
    queries = [passage.text for passage in list(passages)[:64]]
    alone = [retriever.search([query], 5)[0] for query in queries]
    assert retriever.search(queries, 5) == alone
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: retriever.search(queries, 5), range(16))) == [alone] * 16
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(retriever.search(queries, 5)))
    child.start()
    assert receive.poll(60) and receive.recv() == alone
    child.join()


def test_an_index_is_opened_where_nobody_can_write_and_nothing_is_added_to_it(tmp_path):
    passages = _corpus("oslo", "rome")
    build_bm25(passages, tmp_path / "index")
    before = _hashes(tmp_path / "index")
    # Whoever may do anything is not kept from writing by a folder's permissions, so another user opens it.
    code = """
import os, numpy
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.types import Passage
if os.getuid() == 0:
    os.setuid(65534)
found = BM25Retriever.load("index", [Passage(str(n), "", text) for n, text in enumerate(("oslo", "rome"))])
assert not os.access("index", os.W_OK)
print(found.search(["rome"], 1)[0][0].id)
"""
    (tmp_path / "index").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60
    )
    (tmp_path / "index").chmod(0o755)
    assert ended.stdout.strip() == "1", ended.stderr
    assert _hashes(tmp_path / "index") == before


@needs_real_data
def test_the_estimate_from_a_sample_is_near_what_the_build_takes(tmp_path):
    passages = PassageList(read_corpus(REAL_CORPORA))
    estimate = estimate_bm25(list(passages)[::7], len(passages))
    started = time.perf_counter()
    build_bm25(passages, tmp_path)
    seconds = time.perf_counter() - started
    disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert estimate.final_disk == pytest.approx(disk, rel=0.2)
    assert seconds / 4 < estimate.seconds < seconds * 4


def test_an_estimate_grows_with_the_corpus_and_takes_tiny_samples():
    sample = list(_random_corpus(200))
    small, large = estimate_bm25(sample, 1_000_000), estimate_bm25(sample, 20_000_000)
    assert 15 < large.final_disk / small.final_disk < 20.5
    # Memory does not grow with it, apart from a few numbers a passage.
    assert large.peak_ram < small.peak_ram + 20 * 20_000_000
    assert estimate_bm25(sample[:1], 1).final_disk > 0
