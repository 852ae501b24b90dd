"""Encoding to shards: the encoder's own vectors, the same bytes after a kill, nothing taken from another encoding."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encode_corpus import (
    VectorShards,
    check_rows,
    encode_corpus,
    read_check_vectors,
    write_check_vectors,
)
from rex_rag.retrieval.dense.encoder import Encoder, check_encoder
from rex_rag.retrieval.dense.estimate import estimate_dense, estimate_index, index_bytes
from rex_rag.retrieval.dense.faiss_index import FaissOptions, build_faiss_index
from rex_rag.retrieval.dense.families import resolve_encoder
from rex_rag.retrieval.passages import PassageList
from rex_rag.types import Passage
from tests.retrieval.dense_parts import save_word_encoder, unit_vectors, vectors_on_disk, word_passages

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"query_prefix": "", "passage_prefix": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_word_encoder(tmp_path_factory.mktemp("encoder") / "words")


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder(resolve_encoder(str(folder), **PLAIN), ["cpu"])


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_shards_hold_the_encoders_vectors_in_corpus_order(tmp_path, encoder):
    passages = word_passages(25)
    expected = encoder.encode_passages([passage.text for passage in passages])
    exact = encode_corpus(PassageList(passages), encoder, tmp_path / "32", shard_rows=10, dtype="float32")
    halves = encode_corpus(PassageList(passages), encoder, tmp_path / "16", shard_rows=10)
    assert [len(shard) for shard in exact] == [10, 10, 5]
    assert (len(exact), exact.dimension, exact.dtype, halves.dtype) == (25, 8, "float32", "float16")
    np.testing.assert_allclose(np.concatenate(list(exact)), expected, atol=1e-6)
    assert np.array_equal(np.concatenate(list(halves)), np.concatenate(list(exact)).astype(np.float16))
    assert np.array_equal(exact.take([24, 0, 9, 10]), np.concatenate(list(exact))[[24, 0, 9, 10]])
    with pytest.raises(IndexError, match="rows from 0 to 25 of 25"):
        exact.take([0, 25])


def test_what_another_corpus_or_encoder_left_is_not_taken(tmp_path, folder, encoder):
    first, second = word_passages(20, seed=0), word_passages(20, seed=1)
    encode_corpus(PassageList(first), encoder, tmp_path / "a", shard_rows=10)
    before = encode_corpus(PassageList(second), encoder, tmp_path / "a", shard_rows=10).take([0])
    encode_corpus(PassageList(second), encoder, tmp_path / "b", shard_rows=10)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    prefixed = Encoder(resolve_encoder(str(folder), query_prefix="", passage_prefix="passage: "), ["cpu"])
    after = encode_corpus(PassageList(second), prefixed, tmp_path / "a", shard_rows=10).take([0])
    assert not np.allclose(before, after, atol=1e-2)
    assert len(list((tmp_path / "a").glob("*.npy"))) == 2


def test_finished_shards_are_not_encoded_again(tmp_path, encoder):
    passages = PassageList(word_passages(30))
    encode_corpus(passages, encoder, tmp_path, shard_rows=10)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    second = sorted(before)[1]
    (tmp_path / second).unlink()
    (tmp_path / "vectors.json").unlink()
    (tmp_path / ".000001-dead.npy.part").write_bytes(b"half a shard")
    encode_corpus(passages, encoder, tmp_path, shard_rows=10)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == {second}
    assert not list(tmp_path.glob(".*.part"))


KILLED = """
import sys
from rex_rag.retrieval.dense.encode_corpus import encode_corpus
from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.families import resolve_encoder
from rex_rag.retrieval.passages import PassageList
from tests.retrieval.dense_parts import word_passages

encoder = Encoder(resolve_encoder(sys.argv[1], query_prefix="", passage_prefix=""), ["cpu"])
encode_corpus(PassageList(word_passages(60_000)), encoder, sys.argv[2], shard_rows=500)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path, folder, encoder):
    passages = PassageList(word_passages(60_000))
    encode_corpus(passages, encoder, tmp_path / "whole", shard_rows=500)
    directory = tmp_path / "killed"
    for shards_there in (1, 30):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), str(directory)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        while len(list(directory.glob("*.npy"))) < shards_there and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        with pytest.raises(RetrievalError, match="not encoded to its end"):
            VectorShards(directory)
    left = {path.name for path in directory.glob("*.npy")}
    assert 30 <= len(left) < 120
    stamps = {name: (directory / name).stat().st_mtime_ns for name in left}
    encode_corpus(passages, encoder, directory, shard_rows=500)
    assert hashes(directory) == hashes(tmp_path / "whole")
    assert {name: (directory / name).stat().st_mtime_ns for name in left} == stamps


def test_damaged_shards_and_bad_settings_are_refused(tmp_path, encoder):
    passages = PassageList(word_passages(20))
    encode_corpus(passages, encoder, tmp_path, shard_rows=10)
    name = sorted(tmp_path.glob("*.npy"))[1]
    np.save(name, np.zeros((9, 8), np.float16))
    with pytest.raises(RetrievalError, match="lists 20 vectors, its shards hold 19"):
        VectorShards(tmp_path)
    np.save(name, np.zeros((10, 8), np.float32))
    with pytest.raises(RetrievalError, match="holds float32 of shape"):
        VectorShards(tmp_path)
    for options, message in [
        ({"shard_rows": 1500}, "shard_rows=1500; use a multiple of 1024"),
        ({"shard_rows": 0}, "shard_rows=0"),
        ({"dtype": "int8"}, "cannot be stored as 'int8'"),
    ]:
        with pytest.raises(RetrievalError, match=message):
            encode_corpus(passages, encoder, tmp_path / "x", **options)
    with pytest.raises(RetrievalError, match="no passage to encode"):
        encode_corpus(PassageList([]), encoder, tmp_path / "x")


def test_vectors_too_large_for_halves_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = save_word_encoder(tmp_path / "words", normalize=False)
    [weights] = folder.rglob("model.safetensors")
    save_file({name: value * 1e6 for name, value in load_file(weights).items()}, weights)
    encoder = Encoder(resolve_encoder(str(folder), **PLAIN), ["cpu"])
    with pytest.raises(RetrievalError, match=r"do not fit float16, whose largest number is 6.55e\+04"):
        encode_corpus(PassageList(word_passages(3)), encoder, tmp_path / "v")
    assert len(encode_corpus(PassageList(word_passages(3)), encoder, tmp_path / "v", dtype="float32")) == 3


def test_check_vectors_come_from_all_over_the_corpus(tmp_path, encoder):
    assert check_rows(1) == [0]
    assert check_rows(3) == [0, 1, 2]
    assert check_rows(1001)[:2] == [0, 66] and check_rows(1001)[-1] == 1000 and len(check_rows(1001)) == 16
    passages = PassageList(word_passages(40))
    write_check_vectors(encode_corpus(passages, encoder, tmp_path / "v"), tmp_path)
    chosen, stored = read_check_vectors(tmp_path, passages)
    assert [passage.id for passage in chosen] == [str(row) for row in check_rows(40)]
    assert check_encoder(encoder, chosen, stored) > 0.999
    with pytest.raises(RetrievalError, match="the encoder cannot be checked"):
        read_check_vectors(tmp_path / "v", passages)


def test_estimated_bytes_are_those_of_the_file(tmp_path):
    vectors = unit_vectors(3000, 24)
    for options in [
        FaissOptions("flat"),
        FaissOptions("flat-fp16"),
        FaissOptions("ivf"),
        FaissOptions("ivf", storage="float32", nlist=10),
        FaissOptions("hnsw", m=8, ef_construction=20),
    ]:
        shards = vectors_on_disk(tmp_path / options.dtype, vectors, options.dtype, shard_rows=1000)
        build_faiss_index(shards, tmp_path / "index", options)
        size = (tmp_path / "index").stat().st_size
        assert index_bytes(3000, 24, options) == pytest.approx(size, rel=0.02), options.kind
    # 21 million passages of E5: 21e6 x 768 x 4 bytes, and half of it.
    assert estimate_index(21_000_000, 768, FaissOptions("flat")).serving_ram == 64_512_000_000
    assert estimate_index(21_000_000, 768, FaissOptions("flat-fp16")).final_disk == 32_256_000_000


def test_the_estimate_times_the_real_encoder(encoder):
    sample = [Passage(str(n), "", "oslo river hill " * 20) for n in range(512)]
    estimate = estimate_dense(sample, 100_000, encoder, FaissOptions("flat-fp16"))
    start = time.perf_counter()
    for _ in range(4):
        encoder.encode_passages([passage.text for passage in sample])
    measured = (time.perf_counter() - start) / (4 * 512) * 100_000
    assert measured / 5 < estimate.seconds < measured * 5
    assert (estimate.work_disk, estimate.final_disk) == (100_000 * 8 * 2, 100_000 * 8 * 2)
    assert "passages a second, measured on 512" in estimate.notes[0]
    with pytest.raises(RetrievalError, match="from 0 needs at least one"):
        estimate_dense([], 10, encoder, FaissOptions())
    assert "no two builds are equal" in estimate_index(10_000, 8, FaissOptions("hnsw", build_threads=4)).notes[0]


def test_the_list_of_shards_is_plain_json(tmp_path, encoder):
    encode_corpus(PassageList(word_passages(3)), encoder, tmp_path)
    content = json.loads((tmp_path / "vectors.json").read_text())
    assert (content["rows"], content["dimension"], content["dtype"], len(content["shards"])) == (3, 8, "float16", 1)
