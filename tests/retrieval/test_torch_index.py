"""Exact search by matrix products: inner products spelled out, ties by row, and the file format it shares."""

import numpy as np
import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.faiss_index import FaissIndex, FaissOptions, build_faiss_index
from rex_rag.retrieval.dense.flat_file import map_flat
from rex_rag.retrieval.dense.torch_index import TorchFlatIndex
from tests.retrieval.dense_parts import unit_vectors, vectors_on_disk

VECTORS = np.array([[1, 0], [0, 1], [3, 4], [-1, 0], [1, 0]], dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"], ["cpu"] * 7])
def test_inner_products_best_first_and_ties_by_row(dtype, chunk_rows, devices):
    index = TorchFlatIndex(VECTORS, devices, dtype, chunk_rows)
    # (2, 1) . rows = 2, 1, 10, -2, 2;  (0, -1) . rows = 0, -1, -4, 0, 0.
    scores, rows = index.search(np.array([[2, 1], [0, -1]]), 4)
    assert rows.tolist() == [[2, 0, 4, 1], [0, 3, 4, 1]]
    assert scores.tolist() == [[10, 2, 2, 1], [0, 0, 0, -1]]
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert index.search(np.array([[2, 1]]), 1)[1].tolist() == [[2]]
    assert index.search(np.array([[0, -1]]), 2)[1].tolist() == [[0, 3]]
    assert index.search(np.array([[2, 1]]), 99)[1].tolist() == [[2, 0, 4, 1, 3]]
    assert (len(index), index.dimension) == (5, 2)


def test_many_equal_scores_keep_the_first_rows():
    draws = np.random.default_rng(0)
    for _ in range(50):
        vectors = draws.integers(-1, 2, (draws.integers(1, 60), 2)).astype(np.float32)
        queries = draws.integers(-1, 2, (5, 2)).astype(np.float32)
        products = queries @ vectors.T
        for top_k in (1, 3, 10):
            _, rows = TorchFlatIndex(vectors, ["cpu"] * 2, chunk_rows=int(draws.integers(1, 20))).search(
                queries, top_k
            )
            assert rows.tolist() == np.argsort(-products, axis=1, kind="stable")[:, :top_k].tolist()


@pytest.mark.parametrize("kind", ["flat", "flat-fp16"])
def test_an_index_file_is_searched_in_place_and_as_faiss_does(tmp_path, kind):
    vectors, options = unit_vectors(500, 16), FaissOptions(kind)
    build_faiss_index(vectors_on_disk(tmp_path / "v", vectors, options.dtype), tmp_path / "index", options)
    codes = map_flat(tmp_path / "index")
    assert codes.dtype == options.dtype and np.array_equal(codes, vectors.astype(options.dtype))
    index = TorchFlatIndex.load(tmp_path / "index", devices=["cpu"], chunk_rows=64)
    assert np.shares_memory(TorchFlatIndex(codes, devices=["cpu"])._parts[0][1].numpy(), codes)
    queries = unit_vectors(40, 16, seed=1)
    scores, rows = index.search(queries, 10)
    expected_scores, expected_rows = FaissIndex(tmp_path / "index", options).search(queries, 10)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert rows.tolist() == expected_rows.tolist()
    assert index.description == f"torch flat ({options.dtype} on cpu)"


def test_what_cannot_be_searched_is_refused(tmp_path):
    index = TorchFlatIndex(VECTORS)
    for queries in (np.zeros((1, 3)), np.zeros(2)):
        with pytest.raises(RetrievalError, match="the index has 2 dimensions"):
            index.search(queries, 1)
    with pytest.raises(RetrievalError, match=r"shape \(0, 2\)"):
        TorchFlatIndex(VECTORS[:0])
    with pytest.raises(RetrievalError, match="held as 'int8'"):
        TorchFlatIndex(VECTORS, dtype="int8")
    with pytest.raises(RetrievalError, match=r"do not go onto cuda:99"):
        TorchFlatIndex(VECTORS, devices=["cuda:99"])
    options = FaissOptions("hnsw", m=4)
    build_faiss_index(vectors_on_disk(tmp_path / "v", VECTORS, "float16"), tmp_path / "graph", options)
    with pytest.raises(RetrievalError, match="no flat or flat-fp16 index"):
        TorchFlatIndex.load(tmp_path / "graph")
    with pytest.raises(RetrievalError, match="missing or empty"):
        TorchFlatIndex.load(tmp_path / "absent")
    build_faiss_index(vectors_on_disk(tmp_path / "w", VECTORS), tmp_path / "flat", FaissOptions())
    (tmp_path / "flat").write_bytes((tmp_path / "flat").read_bytes()[:-4])
    with pytest.raises(RetrievalError, match="cut short"):
        TorchFlatIndex.load(tmp_path / "flat")
