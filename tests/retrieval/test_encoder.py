"""Encoders: prefixes applied once, layouts, pinned weights, and everything that does not agree refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.checkpoints import public_name, short_name
from rex_rag.retrieval.dense.encoder import CHUNK_ROWS, Encoder, EncoderSpec, check_encoder, spec_from_dict
from rex_rag.retrieval.dense.families import FAMILIES, resolve_encoder
from rex_rag.types import Passage
from tests.retrieval.dense_parts import WORDS, minilm_folder, save_word_encoder, word_passages

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAIN = {"query_prefix": "", "passage_prefix": ""}


def word_vector(*words, dimension=8, seed=0):
    """What `save_word_encoder`'s model computes, from its seed: the mean of the words' vectors, at length 1."""
    table = np.random.default_rng(seed).standard_normal((len(WORDS) + 1, dimension), dtype=np.float32)
    mean = np.mean([table[1 + WORDS.index(word)] for word in words], axis=0)
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_word_encoder(tmp_path_factory.mktemp("encoder") / "words")


@pytest.fixture(scope="module")
def minilm():
    return Encoder(resolve_encoder(minilm_folder(), family="minilm"), devices=["cpu"])


def hub_copy(cache: Path, repository: str, folder: Path) -> None:
    """Lay a model out as the Hub's client caches it."""
    home = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize(
    ("repository", "query", "passage", "layout", "normalize"),
    [
        ("intfloat/e5-base-v2", "query: ", "passage: ", "contents", True),
        ("BAAI/bge-base-en-v1.5", "Represent this sentence for searching relevant passages: ", "", "contents", True),
        ("BAAI/bge-m3", "", "", "contents", True),
        ("Qwen/Qwen3-Embedding-0.6B", FAMILIES["qwen3-embedding"].query_prefix, "", "contents", True),
        ("thenlper/gte-base", "", "", "contents", True),
        ("facebook/contriever-msmarco", "", "", "blank", False),
        ("sentence-transformers/all-MiniLM-L6-v2", "", "", "contents", True),
    ],
)
def test_known_encoders_by_their_hub_name(tmp_path, monkeypatch, words, repository, query, passage, layout, normalize):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_copy(tmp_path, repository, words)
    spec = resolve_encoder(repository)
    assert (spec.query_prefix, spec.passage_prefix, spec.passage_format) == (query, passage, layout)
    assert (spec.name, spec.revision, spec.normalize) == (repository, COMMIT, normalize)


@pytest.mark.parametrize("name", ["someone/e5-base-v2", "intfloat/e5-mistral-7b-instruct", "me/my-bge-base-en-v1.5"])
def test_a_name_that_only_looks_like_a_known_one_is_not_guessed(name):
    with pytest.raises(RetrievalError, match=r"not known what .* --query-prefix '' --passage-prefix ''"):
        resolve_encoder(name)


def test_a_local_folder_needs_a_family_or_both_prefixes(tmp_path, words):
    with pytest.raises(RetrievalError, match="not known what"):
        resolve_encoder(str(words), query_prefix="query: ")
    assert resolve_encoder(str(words), **PLAIN).query_prefix == ""
    spec = resolve_encoder(str(words), family="e5", max_tokens=128)
    assert (spec.query_prefix, spec.passage_prefix, spec.max_tokens) == ("query: ", "passage: ", 128)
    with pytest.raises(RetrievalError, match="no encoder family 'e6'; choose one of e5, bge-en"):
        resolve_encoder(str(words), family="e6")
    with pytest.raises(RetrievalError, match=r"no such setting .*prefixx"):
        resolve_encoder(str(words), prefixx="", **PLAIN)
    prompted = save_word_encoder(tmp_path / "prompted", prompts={"query": "the ", "document": ""})
    with pytest.raises(RetrievalError, match=r"names the prompts \{'query': 'the '\}"):
        resolve_encoder(str(prompted))
    with pytest.raises(RetrievalError, match=r"names the query prompt 'the ' .* family's is 'query: '"):
        resolve_encoder(str(prompted), family="e5")
    assert resolve_encoder(str(prompted), family="e5", query_prefix="the ").passage_prefix == "passage: "


def test_prefixes_are_applied_once_even_where_the_checkpoint_has_prompts(tmp_path):
    folder = save_word_encoder(tmp_path / "words", prompts={"query": "query: ", "document": "passage: "})
    settings = tmp_path / "words" / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"default_prompt_name": "query"}))
    encoder = Encoder(resolve_encoder(str(folder), query_prefix="query: ", passage_prefix="passage: "), ["cpu"])
    np.testing.assert_allclose(encoder.encode_queries(["oslo"])[0], word_vector("query", ":", "oslo"), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_passages(["rome"])[0], word_vector("passage", ":", "rome"), atol=1e-6)
    plain = Encoder(resolve_encoder(str(folder), **PLAIN), ["cpu"])
    np.testing.assert_allclose(plain.encode_queries(["oslo", "rome"])[1], word_vector("rome"), atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("contents", '"Oslo"\nA city.'), ("lines", "Oslo\nA city."), ("blank", "Oslo A city.")],
)
def test_passage_layouts(layout, expected):
    spec = EncoderSpec("x", passage_format=layout)
    assert spec.passage_text(Passage("1", "Oslo", "A city.")) == expected
    assert spec.passage_text(Passage("1", " ", "A city.")) == "A city."


def test_a_spec_is_plain_data():
    spec = EncoderSpec("x", "abc", "q: ", "p: ", "blank", "mean", True, 128, 384)
    assert spec_from_dict(json.loads(json.dumps(asdict(spec)))) == spec
    with pytest.raises(RetrievalError, match=r"found \['name'\]; build the index again"):
        spec_from_dict({"name": "x"})
    with pytest.raises(RetrievalError, match="no passage format 'xml'"):
        EncoderSpec("x", passage_format="xml")
    with pytest.raises(RetrievalError, match="max_tokens is 0"):
        EncoderSpec("x", max_tokens=0)


def test_the_encoders_own_spec_is_complete_and_binding(words):
    encoder = Encoder(EncoderSpec(str(words)), ["cpu"])
    spec = encoder.spec
    assert (spec.pooling, spec.normalize, spec.max_tokens, spec.dimension) == ("", True, None, 8)
    assert spec.revision.startswith("sha256:") and len(spec.revision) == 71
    assert Encoder(spec, ["cpu"]).spec == spec
    assert encoder.encode_queries([]).shape == (0, 8)
    for wrong, message in [
        ({"dimension": 384}, "dimension 8, not 384"),
        ({"pooling": "mean"}, "pooling '', not 'mean'"),
        ({"normalize": False}, "layer of its own"),
        ({"revision": "sha256:" + "0" * 64}, "not sha256:000"),
    ]:
        with pytest.raises(RetrievalError, match=message):
            Encoder(EncoderSpec(**asdict(spec) | wrong), ["cpu"])


def test_vectors_that_are_not_normalized_stay_so(tmp_path):
    folder = save_word_encoder(tmp_path / "words", normalize=False)
    [vector] = Encoder(EncoderSpec(str(folder)), ["cpu"]).encode_queries(["oslo"])
    table = np.random.default_rng(0).standard_normal((len(WORDS) + 1, 8), dtype=np.float32)
    np.testing.assert_allclose(vector, table[1], atol=1e-6)
    assert abs(np.linalg.norm(vector) - 1) > 0.1
    [vector] = Encoder(EncoderSpec(str(folder), normalize=True), ["cpu"]).encode_queries(["oslo"])
    np.testing.assert_allclose(vector, word_vector("oslo"), atol=1e-6)


def test_the_revision_of_a_folder_follows_its_content_not_its_place(tmp_path, words):
    shutil.copytree(words, tmp_path / "copy")
    before = Encoder(EncoderSpec(str(words)), ["cpu"]).spec
    moved = Encoder(before, ["cpu"], location=tmp_path / "copy")
    assert moved.spec == before
    other = save_word_encoder(tmp_path / "other", seed=1)
    with pytest.raises(RetrievalError, match="give the original checkpoint"):
        Encoder(before, ["cpu"], location=other)


@pytest.mark.parametrize(
    ("folder", "config", "expected"),
    [
        ("MiniLM-fine", {"model_type": "bert"}, "MiniLM-fine"),
        ("model", {"model_type": "bert"}, "bert encoder"),
        ("checkpoint-500", {"model_type": "bert"}, "bert encoder"),
        (COMMIT, {"model_type": "../x y"}, "local encoder"),
        ("models", {}, "local encoder"),
    ],
)
def test_a_local_checkpoint_is_named_without_its_path(tmp_path, monkeypatch, folder, config, expected):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path / folder)
    for name in (str(tmp_path / folder), f"../{folder}/", "."):
        assert public_name(name, "sha256:0123456789abcdef") == expected
        assert short_name(name, "sha256:0123456789abcdef") == f"{expected} (0123456789ab)"
    assert public_name("intfloat/e5-base-v2", COMMIT) == "intfloat/e5-base-v2"
    assert short_name("intfloat/e5-base-v2", COMMIT) == "e5-base-v2"


def test_unsafe_and_absent_checkpoints_are_refused(tmp_path, words):
    shutil.copytree(words, tmp_path / "pickle")
    [weights] = (tmp_path / "pickle").rglob("model.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))
    shutil.copytree(words, tmp_path / "code")
    modules = json.loads((tmp_path / "code" / "modules.json").read_text())
    modules[0]["type"] = "custom_code.Model"
    (tmp_path / "code" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "empty").mkdir()
    for name, message in [
        (tmp_path / "pickle", "pickled ones are never loaded"),
        (tmp_path / "code", r"needs code of its own \(custom_code.Model\)"),
        (tmp_path / "empty", "neither config.json nor modules.json"),
        (tmp_path / "absent", "neither a folder nor a Hub repository"),
        ("nobody/nothing", "could not be had from the Hub or its cache"),
    ]:
        with pytest.raises(RetrievalError, match=message):
            Encoder(EncoderSpec(str(name)), ["cpu"])
    with pytest.raises(RetrievalError, match="dtype='int8'"):
        Encoder(EncoderSpec(str(words)), ["cpu"], dtype="int8")
    with pytest.raises(RetrievalError, match=r"is a local folder of sha256:\w+, so revision='main' cannot"):
        resolve_encoder(str(words), "main", **PLAIN)


def test_weights_cut_short_and_devices_that_are_not_there_are_named(tmp_path, words):
    shutil.copytree(words, tmp_path / "short")
    [weights] = (tmp_path / "short").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(RetrievalError, match=r"short cannot be loaded on cpu: SafetensorError: .*is whole"):
        Encoder(EncoderSpec(str(tmp_path / "short")), ["cpu"])
    for device in ("gpu", "cuda:99"):
        with pytest.raises(RetrievalError, match=rf"cannot be loaded on {device}: \w+: .*check the device"):
            Encoder(EncoderSpec(str(words)), [device])


def test_a_batch_that_does_not_fit_into_memory_is_one_error(words, monkeypatch):
    """A real encoder whose forward pass asks for more than there is, as CUDA does above four texts."""
    encoder = Encoder(EncoderSpec(str(words)), ["cpu"], batch_size=8)
    forward = encoder._model.forward

    def narrow(features, **options):
        if len(features.get("offsets", features["input_ids"])) > 4:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nSee docs"
            )
        return forward(features, **options)

    monkeypatch.setattr(encoder._model, "forward", narrow)
    assert encoder.encode_passages(["oslo"] * 4).shape == (4, 8)
    for encode in (encoder.encode_passages, encoder.encode_queries, encoder.measure_rate):
        with pytest.raises(
            RetrievalError,
            match=r"^batch_size=8 texts .* of cpu .*\(CUDA out of memory\. Tried .* 79\.10 GiB\); lower batch_size",
        ):
            encode(["oslo"] * 5)
    assert encoder.encode_queries(["oslo"] * 4).shape == (4, 8)


def test_a_worker_that_dies_is_an_error_and_ctrl_c_ends_workers_without_a_word(words):
    texts = ["oslo"] * (CHUNK_ROWS + 1)
    with Encoder(EncoderSpec(str(words)), ["cpu", "cpu"]) as encoder:
        assert encoder._workers().submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_DFL
        with suppress(BrokenProcessPool):
            encoder._workers().submit(os._exit, 1).result()
        with pytest.raises(RetrievalError, match=r"one of 2 encoding processes \(cpu, cpu\) died"):
            encoder.encode_passages(texts)
        assert encoder.encode_passages(texts).shape == (CHUNK_ROWS + 1, 8)


def test_minilm_is_loaded_as_it_was_trained_and_a_bare_checkpoint_needs_its_pooling(tmp_path, minilm):
    assert (minilm.spec.pooling, minilm.spec.normalize) == ("mean", True)
    assert (minilm.spec.max_tokens, minilm.spec.dimension) == (256, 384)
    texts = ["Oslo is the capital of Norway.", "The river flows to the sea."]
    expected = minilm.encode_passages(texts)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(f"{minilm_folder()}/{name}")
    with pytest.raises(RetrievalError, match="give pooling"):
        Encoder(EncoderSpec(str(tmp_path)), ["cpu"])
    bare = Encoder(EncoderSpec(str(tmp_path), pooling="mean", normalize=True), ["cpu"])
    np.testing.assert_allclose(bare.encode_passages(texts), expected, atol=1e-5)
    short = Encoder(EncoderSpec(str(tmp_path), pooling="cls", normalize=False, max_tokens=4), ["cpu"])
    assert short.spec.max_tokens == 4
    # [CLS] oslo is [SEP]: what follows is cut off.
    one, other = short.encode_passages(["Oslo is the capital.", "Oslo is a city."])
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_check_of_an_encoder_tells_prefixes_weights_and_passages_apart(tmp_path, words, minilm):
    passages = word_passages(16)
    texts = [passage.text for passage in passages]
    encoder = Encoder(resolve_encoder(str(words), **PLAIN), ["cpu"])
    stored = encoder.encode_passages(texts).astype(np.float16)
    assert check_encoder(encoder, passages, stored) > 0.999
    other = Encoder(resolve_encoder(str(save_word_encoder(tmp_path / "other", seed=1)), **PLAIN), ["cpu"])
    with pytest.raises(RetrievalError, match=r"cosines down to .* with what is stored .*, and 0.999 is the least"):
        check_encoder(other, passages, stored)
    with pytest.raises(RetrievalError, match="cosines down to"):
        check_encoder(encoder, passages[1:] + passages[:1], stored)
    with pytest.raises(RetrievalError, match=r"shape \(15, 8\) for 16 passages"):
        check_encoder(encoder, passages, stored[:15])
    # With real weights, a forgotten prefix alone is enough.
    stored = minilm.encode_passages(["passage: Oslo is the capital of Norway."])
    with pytest.raises(RetrievalError, match="passage prefix ''"):
        check_encoder(minilm, [Passage("1", "", "Oslo is the capital of Norway.")], stored)


WORKERS = """
import os, sys
import numpy as np
from rex_rag.retrieval.dense.encoder import Encoder, EncoderSpec

if __name__ == "__main__":
    encoder = Encoder(EncoderSpec(sys.argv[1]), ["cpu", "cpu"])
    done = []
    texts = [f"oslo river {'hill ' * (n % 7)}" for n in range(int(sys.argv[3]))]
    vectors = encoder.encode_passages(texts, done.append)
    np.save(sys.argv[2], vectors)
    print(sum(done), *encoder._pool._processes, flush=True)
    sys.stdin.read()
"""


def test_workers_give_the_same_bytes_and_end_with_a_parent_that_is_killed(tmp_path, words):
    count = 2 * CHUNK_ROWS + 5
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, str(script), str(words), str(tmp_path / "vectors.npy"), str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    try:
        done, *workers = map(int, parent.stdout.readline().split())
        assert done == count and len(workers) == 2
        alone = Encoder(EncoderSpec(str(words)), ["cpu"])
        expected = alone.encode_passages([f"oslo river {'hill ' * (n % 7)}" for n in range(count)])
        assert np.load(tmp_path / "vectors.npy").tobytes() == expected.tobytes()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/stat").exists() and _runs(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
