"""The streaming builder against bm25s's own index of the same terms, bit for bit, and against kills at any moment."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import bm25s
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.build import DATA_FILE, MAX_PASSAGES, build_bm25, estimate_bm25
from rex_rag.retrieval.bm25.postings import MappedVocabulary, Postings, PostingsSearcher
from rex_rag.retrieval.bm25.retriever import SETTINGS_FILE, BM25Retriever
from rex_rag.retrieval.bm25.shards import _start_worker
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter, passage_text
from rex_rag.retrieval.passages import OFFSETS_FILE, PASSAGES_FILE, PassageList, PassageStore, passage_json
from rex_rag.types import Passage

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
REAL_CORPORA = [REAL_DATA / "hotpotqa_sample" / "corpus.jsonl", REAL_DATA / "2wiki_passages" / "corpus.jsonl"]
needs_real_data = pytest.mark.skipif(
    not all(path.is_file() for path in REAL_CORPORA), reason="the real passages are not at ../shared/data"
)


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


def _columns(scores, vocabulary):
    """Term -> (rows, scores) as bytes: equal means equal in every bit."""
    indptr = scores["indptr"]
    spans = {term: slice(int(indptr[number]), int(indptr[number + 1])) for term, number in vocabulary.items()}
    return {term: (scores["indices"][span].tobytes(), scores["data"][span].tobytes()) for term, span in spans.items()}


def _check_against_bm25s(passages, directory, options):
    terms = TermSplitter(options).terms([passage_text(passage) for passage in passages])
    expected = bm25s.BM25(k1=options.k1, b=options.b)
    expected.index(terms, create_empty_token=False, show_progress=False)
    built = bm25s.BM25.load(directory, mmap=True)
    assert built.scores["data"].dtype == np.float32 and built.scores["indices"].dtype == np.int32
    assert built.scores["indptr"].dtype == np.int64  # postings may be more than 2^31
    assert built.scores["num_docs"] == len(passages)
    assert _columns(built.scores, built.vocab_dict) == _columns(expected.scores, expected.vocab_dict)
    # Numbered in the order of the code points, and found by that order in the memory-mapped vocabulary.
    assert list(built.vocab_dict) == sorted(built.vocab_dict)
    mapped = MappedVocabulary(directory)
    assert len(mapped) == len(built.vocab_dict)
    assert all(mapped.get(term) == number for term, number in built.vocab_dict.items())
    assert [mapped.get(term) for term in ("", "\x00", "\U0010ffff", "no such term")] == [None] * 4
    return built


@needs_real_data
@pytest.mark.parametrize(("corpora", "size"), [(REAL_CORPORA[:1], 994), (REAL_CORPORA, 7113)])
def test_real_passages_get_the_index_that_bm25s_gives_them(corpora, size, tmp_path):
    passages = PassageList(read_corpus(corpora))
    assert len(passages) == size
    options = BM25Options()
    found = build_bm25(passages, tmp_path, shard_passages=500, block_postings=10_000)
    built = _check_against_bm25s(passages, tmp_path, options)
    assert found["terms"] == len(built.vocab_dict) and found["postings"] == len(built.scores["data"])

    loaded, in_memory = BM25Retriever.load(tmp_path, passages), BM25Retriever(list(passages))
    queries = [passage.text[:80] for passage in list(passages)[:: size // 50]] + ["zzz", "the of"]
    assert loaded.search(queries, 10) == in_memory.search(queries, 10)
    loaded.check()


WORDS = st.sampled_from(
    [
        "oslo",
        "Oslo",
        "rivers",
        "river",
        "the",
        "of",
        "a",
        "42",
        "Straße",
        "ÎLE",
        "naïve",
        "北京",
        "e\u0301te\u0301",
        "x_y",
    ]
    + [f"w{n}" for n in range(12)]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=15).map(" ".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=25),
    repeats=st.sampled_from([1, 300]),
    shard=st.integers(1, 30),
    block=st.integers(1, 60),
    k1=st.sampled_from([0, 0.9, 1.5, 100.0]),
    b=st.sampled_from([0, 0.4, 0.75, 1.0]),
    stemmer=st.sampled_from(["english", None]),
    stopwords=st.sampled_from(["english", None, ("oslo",)]),
)
def test_any_corpus_gets_the_index_that_bm25s_gives_it(
    texts, repeats, shard, block, k1, b, stemmer, stopwords, tmp_path
):
    # The last passage holds one word so often that a byte could not count it.
    passages = _corpus(*texts, " ".join(["madrid"] * repeats))
    options = BM25Options(k1, b, stemmer, stopwords)
    shutil.rmtree(tmp_path)
    build_bm25(passages, tmp_path, options, shard_passages=shard, block_postings=block, processes=1)
    _check_against_bm25s(passages, tmp_path, options)
    assert "work" not in {path.name for path in tmp_path.iterdir()}
    loaded = BM25Retriever.load(tmp_path, passages)
    expected = BM25Retriever(list(passages), k1, b, stemmer, stopwords)
    queries = [*texts, "madrid oslo w3 w3", "zzz"]
    assert loaded.search(queries, 3) == expected.search(queries, 3)


def test_processes_shards_and_blocks_leave_every_byte_as_it_is(tmp_path):
    passages = _random_corpus(300)
    build_bm25(passages, tmp_path / "one", processes=1)
    build_bm25(passages, tmp_path / "two", processes=2, shard_passages=40, block_postings=100)
    assert _hashes(tmp_path / "one") == _hashes(tmp_path / "two")
    assert len(_hashes(tmp_path / "one")) == 9


def test_more_shards_than_files_may_be_open(tmp_path):
    store = _store(_random_corpus(300), tmp_path / "store")
    code = """
import resource, sys
from rex_rag.retrieval.bm25.build import build_bm25
from rex_rag.retrieval.passages import PassageStore
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
build_bm25(PassageStore(sys.argv[1]), sys.argv[2], shard_passages=1, block_postings=2000, processes=1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, store, tmp_path / "limited"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    build_bm25(PassageStore(store), tmp_path / "free", processes=1)
    assert _hashes(tmp_path / "limited") == _hashes(tmp_path / "free")


BUILD = """
import sys
from rex_rag.retrieval.bm25.build import build_bm25
from rex_rag.retrieval.passages import PassageStore
build_bm25(PassageStore(sys.argv[1]), sys.argv[2], shard_passages=100, block_postings=500, processes=2)
"""


def _start_build(store, output):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, store, output], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )


def _kill(process):
    """SIGKILL the builder alone; the processes it started must notice."""
    try:
        workers = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        workers = []
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "tokenising processes outlive a killed builder"


def _progress(work, shards, terms):
    """How far a build is, from 0 to 1: counting is the first half, writing postings the second."""
    counted = len(list(work.glob("shard-*.indptr.npy"))) / shards
    written = work / "written.json"
    return counted / 2 + (json.loads(written.read_text()) / terms / 2 if written.exists() else 0)


@pytest.mark.slow
def test_a_build_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(tmp_path):
    store = _store(_random_corpus(5_000), tmp_path / "store")
    straight = _start_build(store, tmp_path / "straight")
    _, errors = straight.communicate()
    assert straight.returncode == 0, errors.decode()
    terms = json.loads((tmp_path / "straight" / SETTINGS_FILE).read_text())["terms"]

    output, work = tmp_path / "killed", tmp_path / "killed" / "work"
    draws = random.Random(0)
    reached = 0.0
    for moment in sorted([0.0, 0.5, *(draws.random() * 0.85 for _ in range(8))]):
        process = _start_build(store, output)
        while not work.exists() or _progress(work, 50, terms) < moment:
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.001)
        time.sleep(draws.random() * 0.02)  # into the middle of whatever comes next
        _kill(process)
        assert not (output / SETTINGS_FILE).exists()
        # What is done stays done.
        assert _progress(work, 50, terms) >= max(reached, moment)
        reached = _progress(work, 50, terms)
        with pytest.raises(RetrievalError, match="unfinished"):
            BM25Retriever.load(output, PassageStore(store))
    last = _start_build(store, output)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert _hashes(output) == _hashes(tmp_path / "straight")
    BM25Retriever.load(output, PassageStore(store)).check()


def test_a_finished_index_is_kept_and_another_one_asked_for_replaces_it(tmp_path):
    passages = _random_corpus(50)
    found = build_bm25(passages, tmp_path, processes=1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build_bm25(passages, tmp_path, processes=1) == found
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    # Other passages of the same number, other scoring, other words: built anew, without a trace of what was there.
    for others, options in [
        (_random_corpus(50, seed=1), BM25Options()),
        (passages, BM25Options(k1=0.9)),
        (passages, BM25Options(stopwords=None)),
    ]:
        build_bm25(others, tmp_path, options, processes=1)
        build_bm25(others, tmp_path / "fresh", options, processes=1)
        fresh = _hashes(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "fresh")
        assert _hashes(tmp_path) == fresh


def test_what_an_unlike_build_left_is_not_used(tmp_path):
    store = _store(_random_corpus(5_000), tmp_path / "store")
    output = tmp_path / "index"
    process = _start_build(store, output)
    while not list(output.glob("work/shard-*.indptr.npy")):
        assert process.poll() is None
        time.sleep(0.001)
    _kill(process)
    passages = _random_corpus(100, seed=5)
    build_bm25(passages, output, processes=1)
    build_bm25(passages, tmp_path / "fresh", processes=1)
    assert _hashes(output) == _hashes(tmp_path / "fresh")


def test_a_tokenising_process_that_dies_is_an_error_that_says_so(tmp_path):
    store = PassageStore(_store(_random_corpus(5_000), tmp_path / "store"))

    def kill_one():
        while not list((tmp_path / "index").glob("work/shard-*.indptr.npy")):
            time.sleep(0.001)
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        workers[-1].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RetrievalError, match=r"one of 2 tokenising processes died.*fewer workers"):
        build_bm25(store, tmp_path / "index", processes=2, shard_passages=50)
    killer.join()
    build_bm25(store, tmp_path / "index", processes=1, shard_passages=50)
    BM25Retriever.load(tmp_path / "index", store).check()


class _TooMany(PassageList):
    def __len__(self):
        return MAX_PASSAGES + 1


@pytest.mark.parametrize(
    ("passages", "options", "message"),
    [
        (_corpus(), {}, "0 passages"),
        (_corpus("the", "of a"), {}, "none of the 2 passages holds"),
        (_TooMany([]), {}, r"2,147,483,648 passages are more than the 2,147,483,647"),
        (_corpus("oslo"), {"stemmer": "klingon"}, "no stemmer 'klingon'"),
        (_corpus("oslo"), {"stopwords": "klingon"}, "no list of stop words 'klingon'"),
        (_corpus("oslo"), {"k1": -1}, "k1=-1"),
        (_corpus("oslo"), {"k1": float("nan")}, "k1=nan"),
        (_corpus("oslo"), {"b": 1.5}, "b=1.5"),
    ],
)
def test_what_cannot_be_indexed_is_refused(passages, options, message, tmp_path):
    with pytest.raises(RetrievalError, match=message):
        build_bm25(passages, tmp_path / "index", BM25Options(**options), processes=1)
    assert not (tmp_path / "index" / SETTINGS_FILE).exists()


def _edit_settings(directory, **changes):
    path = directory / SETTINGS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(directory, name):
    with (directory / name).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: (index / SETTINGS_FILE).unlink(), "bm25.json is missing.*no BM25 index"),
        (lambda index: (index / SETTINGS_FILE).write_text("{"), "cannot be read"),
        (lambda index: _edit_settings(index, format=99), "format 99, this version reads 2"),
        (lambda index: _edit_settings(index, passages=99), "indexes 99 passages, but 100 were given"),
        (lambda index: _edit_settings(index, terms=7), "'terms': 7"),
        (
            lambda index: (index / SETTINGS_FILE).write_text('{"format": 2}'),
            "lacks b, k1, passages, postings, stemmer",
        ),
        (lambda index: (index / DATA_FILE).unlink(), "cannot be opened.*data.csc"),
        (lambda index: _cut(index, DATA_FILE), "cannot be opened"),
        (lambda index: _cut(index, "terms.txt"), "do not belong together"),
        # As if the stemmer or the list of stop words had changed since.
        (lambda index: _edit_settings(index, stemmer="porter"), "does not lead from 'dy' to passage 0"),
        (lambda index: _edit_settings(index, stopwords=[]), "does not lead from 'of' to passage 0.*bm25s"),
    ],
)
def test_an_index_that_is_damaged_or_of_another_tokenizer_is_refused(damage, message, tmp_path):
    passages = _corpus(*["the organization of generously dying rivers"] * 100)
    build_bm25(passages, tmp_path, processes=1)
    damage(tmp_path)
    with pytest.raises(RetrievalError, match=message):
        BM25Retriever.load(tmp_path, passages)


def test_an_index_of_other_passages_is_refused(tmp_path):
    passages, others = _corpus("oslo", "rome"), _corpus("oslo", "madrid")
    build_bm25(passages, tmp_path, processes=1)
    with pytest.raises(RetrievalError, match=r"does not lead from 'madrid' to passage 1 \(id '1'\)"):
        BM25Retriever.load(tmp_path, others)


def test_a_loaded_index_answers_many_threads_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("rex_rag.retrieval.bm25.retriever.ROWS_WORTH_THREADS", 1)
    passages = _random_corpus(2_000)
    build_bm25(passages, tmp_path, processes=1)
    retriever = BM25Retriever.load(tmp_path, passages)
    queries = [passage.text for passage in list(passages)[:64]]
    alone = [retriever.search([query], 5)[0] for query in queries]
    assert retriever.search(queries, 5) == alone
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: retriever.search(queries, 5), range(16))) == [alone] * 16


def test_an_index_beyond_2_to_the_31_postings_is_searched(tmp_path):
    # Sparse files: what is never written takes no disk. Term 0 has 2^31 + 10 postings, term 1 the two behind them.
    build_bm25(_corpus("alpha beta", "beta"), tmp_path, BM25Options(stemmer=None), processes=1)
    many = 2**31 + 10
    for name, dtype, last in ((DATA_FILE, "<f4", [0.5, 0.25]), ("indices.csc.index.npy", "<i4", [0, 1])):
        array = np.lib.format.open_memmap(tmp_path / name, "w+", np.dtype(dtype), (many + 2,))
        array[many:] = last
        del array
    np.save(tmp_path / "indptr.csc.index.npy", np.array([0, many, many + 2]))
    _edit_settings(tmp_path, postings=many + 2)
    index = bm25s.BM25.load(tmp_path, mmap=True)
    searcher = PostingsSearcher(
        Postings(*(index.scores[name] for name in ("data", "indices", "indptr")), np.array([0.5, 0.5], np.float32), 2)
    )
    scores, rows = searcher.search([1], 2)
    assert (scores.tolist(), rows.tolist()) == ([0.5, 0.25], [0, 1])


@needs_real_data
def test_the_estimate_from_a_sample_is_near_what_the_build_takes(tmp_path):
    passages = PassageList(read_corpus(REAL_CORPORA))
    estimate = estimate_bm25(list(passages)[::7], len(passages), processes=1)
    started = time.perf_counter()
    build_bm25(passages, tmp_path, processes=1)
    seconds = time.perf_counter() - started
    disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert estimate.final_disk == pytest.approx(disk, rel=0.2)
    assert seconds / 4 < estimate.seconds < seconds * 4
    assert estimate.serving_ram == 4 * 7113 * len(os.sched_getaffinity(0))
    assert "57 terms a passage, 42 of them different, in a sample of 1,017" in estimate.notes[0]


def test_an_estimate_grows_with_the_corpus_and_takes_tiny_samples():
    sample = list(_random_corpus(200))
    small, large = estimate_bm25(sample, 1_000_000, processes=2), estimate_bm25(sample, 20_000_000, processes=2)
    for part in ("final_disk", "work_disk"):
        assert 18 < getattr(large, part) / getattr(small, part) < 20.5
    # Memory does not grow with it, apart from a few numbers a passage and term.
    assert large.peak_ram < small.peak_ram + 20 * 20_000_000
    assert estimate_bm25(sample[:1], 1, processes=1).final_disk > 0


def test_ctrl_c_ends_workers_without_a_word():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=(BM25Options(),)) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_DFL
