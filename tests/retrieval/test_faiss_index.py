"""FAISS indexes: inner products spelled out, files equal byte for byte, what approximation loses, refusals."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encode_corpus import VectorShards
from rex_rag.retrieval.dense.faiss_index import FaissIndex, FaissOptions, build_faiss_index
from rex_rag.retrieval.indexed import NO_ROW
from tests.retrieval.dense_parts import unit_vectors, vectors_on_disk

faiss = pytest.importorskip("faiss")

ROOT = Path(__file__).resolve().parents[2]
VECTORS = np.array([[1, 0], [0, 1], [3, 4], [-1, 0]], dtype=np.float32)
ALL = [
    FaissOptions("flat"),
    FaissOptions("flat-fp16"),
    FaissOptions("ivf"),
    FaissOptions("ivf", storage="float32"),
    FaissOptions("hnsw"),
    FaissOptions("hnsw", storage="float32"),
]


def built(folder: Path, vectors: np.ndarray, options: FaissOptions, shard_rows: int = 700) -> Path:
    shards = vectors_on_disk(folder / options.dtype, vectors, options.dtype, shard_rows)
    build_faiss_index(shards, folder / "index.faiss", options)
    return folder / "index.faiss"


def name(options: FaissOptions) -> str:
    return f"{options.kind}-{options.dtype}"


def clustered(rows: int, dimension: int, clusters: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around some centres, as texts lie around topics."""
    draws = np.random.default_rng(seed)
    centres = unit_vectors(clusters, dimension, seed=99)
    vectors = centres[draws.integers(0, clusters, rows)] + 0.1 * draws.standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("options", ALL, ids=name)
def test_inner_products_best_first(tmp_path, options):
    index = FaissIndex(built(tmp_path, VECTORS, options), options)
    # (2, 1) . rows = 2, 1, 10, -2: not normalized, so the long vector wins.
    scores, rows = index.search(np.array([[2, 1], [-1, 0]]), 4)
    assert rows[0].tolist() == [2, 0, 1, 3]
    assert scores.tolist() == [[10, 2, 1, -2], [1, 0, -1, -3]]
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert index.search(np.array([[2, 1]]), 99)[1].shape == (1, 4)
    assert (len(index), index.dimension) == (4, 2)
    assert index.description.startswith(f"FAISS {options.kind}")


@pytest.mark.parametrize("options", ALL, ids=name)
def test_two_builds_are_equal_whatever_the_size_of_shards(tmp_path, options):
    vectors = clustered(2500, 16, 40)
    one = built(tmp_path / "a", vectors, options, shard_rows=700)
    other = built(tmp_path / "b", vectors, options, shard_rows=999)
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


@pytest.mark.parametrize("kind", ["flat", "flat-fp16"])
def test_a_streamed_flat_file_is_the_one_that_faiss_writes(tmp_path, kind):
    vectors, options = unit_vectors(300, 12), FaissOptions(kind)
    path = built(tmp_path, vectors, options, shard_rows=70)
    halves = faiss.ScalarQuantizer.QT_fp16
    like = (
        faiss.IndexFlatIP(12) if kind == "flat" else faiss.IndexScalarQuantizer(12, halves, faiss.METRIC_INNER_PRODUCT)
    )
    like.add(vectors)
    assert path.read_bytes() == faiss.serialize_index(like).tobytes()


@pytest.mark.parametrize("options", ALL, ids=name)
def test_a_mapped_file_gives_what_a_read_one_does(tmp_path, options):
    vectors, queries = clustered(2000, 16, 30), clustered(50, 16, 30, seed=1)
    path = built(tmp_path, vectors, options)
    mapped = FaissIndex(path, options)
    held = FaissIndex(path, options)
    held._index = faiss.read_index(str(path))
    for ours, theirs in zip(mapped.search(queries, 7), held.search(queries, 7), strict=True):
        assert np.array_equal(ours, theirs)


def test_halves_move_scores_by_less_than_a_thousandth_and_no_ranking_that_is_clear(tmp_path):
    vectors, queries = clustered(3000, 32, 50), clustered(100, 32, 50, seed=1)
    exact = FaissIndex(built(tmp_path / "a", vectors, FaissOptions("flat")), FaissOptions("flat"))
    halves = FaissIndex(built(tmp_path / "b", vectors, FaissOptions("flat-fp16")), FaissOptions("flat-fp16"))
    scores, rows = exact.search(queries, 10)
    half_scores, half_rows = halves.search(queries, 10)
    assert np.abs(scores - half_scores).max() < 1e-3
    clear = scores[:, 0] - scores[:, 1] > 2e-3
    assert clear.sum() > 50 and np.array_equal(rows[clear, 0], half_rows[clear, 0])


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (FaissOptions("ivf"), 0.95),
        (FaissOptions("ivf", storage="float32"), 0.95),
        (FaissOptions("ivf", nprobe=10_000), 0.99),
        (FaissOptions("hnsw"), 0.97),
        (FaissOptions("hnsw", storage="float32"), 0.97),
    ],
    ids=lambda value: name(value) if isinstance(value, FaissOptions) else str(value),
)
def test_what_approximation_loses_against_exact_search(tmp_path, options, least):
    vectors, queries = clustered(5000, 32, 60), clustered(200, 32, 60, seed=1)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    _, rows = FaissIndex(built(tmp_path, vectors, options), options).search(queries, 10)
    recall = np.mean([len(set(found) & set(best)) / 10 for found, best in zip(rows, exact, strict=True)])
    assert recall >= least


def test_a_ranking_that_cannot_be_filled_ends_with_no_row(tmp_path):
    # Two far clusters, two lists, one of which is read: the other half of the rows cannot be found.
    vectors = np.repeat(np.eye(2, dtype=np.float32), 50, axis=0)
    options = FaissOptions("ivf", nlist=2, nprobe=1)
    scores, rows = FaissIndex(built(tmp_path, vectors, options), options).search(np.array([[1.0, 0.1]]), 60)
    assert sorted(rows[0, :50]) == list(range(50))
    assert (rows[0, 50:] == NO_ROW).all() and np.isneginf(scores[0, 50:]).all()


def test_defaults_follow_the_number_of_vectors():
    options = FaissOptions("ivf")
    assert (options.lists(1_000_000), options.probes(1_000_000)) == (4000, 250)
    assert (options.lists(100_000), options.probes(100_000)) == (1265, 80)
    assert (options.lists(10_000), options.probes(10_000)) == (256, 64)
    assert (options.lists(5), options.probes(5)) == (1, 1)
    assert [FaissOptions(kind).dtype for kind in ("flat", "flat-fp16", "ivf", "hnsw")] == [
        "float32",
        "float16",
        "float16",
        "float16",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pq"}, "no index kind 'pq'; choose one of flat"),
        ({"storage": "int8"}, "storage='int8'"),
        ({"nprobe": 0}, "nprobe=0"),
        ({"nlist": 4, "nprobe": 5}, "nprobe=5 is more than the nlist=4"),
        ({"m": 1}, "m=1 links make no graph"),
        ({"ef_search": True}, "ef_search=True"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(RetrievalError, match=message):
        FaissOptions(**options)


def test_too_many_lists_are_refused_with_the_numbers(tmp_path):
    with pytest.raises(RetrievalError, match=r"nlist=10 lists need 390 vectors \(39 a list\), and there are 100"):
        built(tmp_path, unit_vectors(100, 4), FaissOptions("ivf", nlist=10))
    assert not (tmp_path / "index.faiss").exists()


def test_wrong_damaged_and_missing_files_are_refused(tmp_path):
    path = built(tmp_path, VECTORS, FaissOptions("flat"))
    with pytest.raises(RetrievalError, match=r"holds a FAISS IndexFlatIP .*, not the IndexHNSWSQ"):
        FaissIndex(path, FaissOptions("hnsw"))
    with pytest.raises(RetrievalError, match="is missing"):
        FaissIndex(tmp_path / "absent", FaissOptions())
    with pytest.raises(RetrievalError, match="the index has 2 dimensions"):
        FaissIndex(path, FaissOptions()).search(np.zeros((1, 3)), 1)
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[:20], whole[:-8]):
        path.write_bytes(damaged)
        with pytest.raises(RetrievalError, match="is no index that FAISS reads"):
            FaissIndex(path, FaissOptions())
    faiss.write_index(faiss.IndexFlatL2(2), str(path))
    with pytest.raises(RetrievalError, match="IndexFlatL2 of metric 1"):
        FaissIndex(path, FaissOptions())


def test_gpus_that_are_not_there_are_refused_not_replaced(tmp_path):
    path = built(tmp_path, VECTORS, FaissOptions("flat-fp16"))
    there = faiss.get_num_gpus()
    for gpus in ([], [there], [0, there], [0, 0]):
        with pytest.raises(RetrievalError, match=rf"and sees {there}: install faiss-gpu"):
            FaissIndex(path, FaissOptions("flat-fp16"), gpus=gpus)


def test_a_killed_write_leaves_no_index(tmp_path, monkeypatch):
    shards = vectors_on_disk(tmp_path / "v", unit_vectors(50, 4))

    class Failing(VectorShards):
        def __iter__(self):
            yield from list(super().__iter__())[:3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing = Failing.__new__(Failing)
        failing.__dict__.update(shards.__dict__)
        build_faiss_index(failing, tmp_path / "index.faiss", FaissOptions())
    assert not (tmp_path / "index.faiss").exists()
    build_faiss_index(shards, tmp_path / "index.faiss", FaissOptions())
    assert len(FaissIndex(tmp_path / "index.faiss", FaissOptions())) == 50


def test_threads_see_the_same_rankings(tmp_path):
    vectors, queries = clustered(2000, 16, 30), clustered(64, 16, 30, seed=1)
    for options in ALL:
        index = FaissIndex(built(tmp_path / name(options), vectors, options), options)
        alone = [index.search(query[None], 5)[1].tolist() for query in queries]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda query, index=index: index.search(query[None], 5)[1].tolist(), queries))
        assert together == alone


MEMORY = """
import json, re, sys
from pathlib import Path
from rex_rag.retrieval.dense.encode_corpus import VectorShards
from rex_rag.retrieval.dense.faiss_index import FaissOptions, FaissIndex, build_faiss_index
import faiss, numpy

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def grown(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

shards = VectorShards(sys.argv[1])
build = grown(lambda: build_faiss_index(shards, sys.argv[2], FaissOptions("flat-fp16")))
held = []
print(json.dumps([build, grown(lambda: held.append(FaissIndex(sys.argv[2], FaissOptions("flat-fp16"))))]))
"""


def test_a_flat_index_is_written_and_opened_without_holding_it(tmp_path):
    # 200,000 x 256 halves: 97.7 MiB in 25 shards of 3.9 MiB.
    vectors = np.zeros((200_000, 256), np.float16)
    vectors_on_disk(tmp_path / "v", vectors, "float16", shard_rows=8_000)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "v"), str(tmp_path / "index")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    built_bytes, opened_bytes = json.loads(done.stdout)
    assert (tmp_path / "index").stat().st_size > 97 * 2**20
    assert built_bytes < 40 * 2**20
    assert opened_bytes < 8 * 2**20
