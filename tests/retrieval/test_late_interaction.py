"""Late interaction: token vectors as ColBERT makes them, MaxSim by hand, and an index of its own kind.

The checkpoints are tiny and of random weights; that a real ColBERT finds well is not shown here.
"""

import shutil
from itertools import pairwise

import numpy as np
import pytest

from rex_rag.data.corpus import write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encoder import Encoder, EncoderSpec
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.builder import build_index
from rex_rag.retrieval.index.kinds import open_index
from rex_rag.retrieval.index_kind import SearchOptions
from rex_rag.retrieval.late_interaction import kind, token_vectors
from rex_rag.retrieval.late_interaction.maxsim import MaxSimIndex
from rex_rag.retrieval.late_interaction.token_encoder import TokenEncoder, TokenEncoderSpec
from rex_rag.retrieval.manifest import Manifest, verify
from tests.retrieval.dense_parts import (
    REAL_DATA,
    minilm_folder,
    real_questions,
    recall,
    save_word_encoder,
    word_passages,
)
from tests.retrieval.late_parts import DIMENSION, FORMS, IDS, QUERY_LENGTH, by_hand, save_colbert
from tests.retrieval.running import Running


@pytest.fixture(scope="module")
def colbert(tmp_path_factory):
    return save_colbert(tmp_path_factory.mktemp("late") / "colbert")


def ids(*words):
    return [IDS[word] for word in words]


@pytest.mark.parametrize("form", FORMS)
def test_token_vectors_are_those_of_colbert(tmp_path, colbert, form):
    encoder = TokenEncoder(TokenEncoderSpec(str(save_colbert(tmp_path / "colbert", form))), "cpu")
    assert (encoder.spec.dimension, encoder.spec.max_tokens) == (DIMENSION, 32)
    short, long = encoder.encode_queries(["oslo river", "the hill of rome the hill of paris"])
    # Filled up with mask tokens, which nothing attends to and which count; what is longer is cut, its end kept.
    filled = ids("[CLS]", "[unused0]", "oslo", "river", "[SEP]", "[MASK]", "[MASK]", "[MASK]")
    np.testing.assert_allclose(short, by_hand(colbert, filled, attended=5), atol=1e-5)
    cut = ids("[CLS]", "[unused0]", "the", "hill", "of", "rome", "the", "[SEP]")
    np.testing.assert_allclose(long, by_hand(colbert, cut, attended=QUERY_LENGTH), atol=1e-5)
    # Punctuation is read and then left out.
    first, second = encoder.encode_passages(["Oslo: the hill.", "rome"])
    read = by_hand(colbert, ids("[CLS]", "[unused1]", "oslo", ":", "the", "hill", ".", "[SEP]"), attended=8)
    np.testing.assert_allclose(first, read[[0, 1, 2, 4, 5, 7]], atol=1e-5)
    np.testing.assert_allclose(second, by_hand(colbert, ids("[CLS]", "[unused1]", "rome", "[SEP]"), 4), atol=1e-5)


def test_a_spec_binds_and_what_does_not_fit_is_refused(tmp_path, colbert):
    encoder = TokenEncoder(TokenEncoderSpec(str(colbert), max_tokens=5), "cpu")
    assert [len(tokens) for tokens in encoder.encode_passages(["the hill of rome", "rome"])] == [5, 4]
    assert TokenEncoder(encoder.spec, "cpu").spec == encoder.spec
    assert encoder.encode_queries([]) == []
    for wrong, message in [
        ({"dimension": 128}, "dimension 4, not 128"),
        ({"max_tokens": 99}, "more than the 32 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"passage_format": "xml"}, "no passage format 'xml'"),
        ({"revision": "sha256:0"}, "not sha256:0"),
    ]:
        with pytest.raises(RetrievalError, match=message):
            TokenEncoder(TokenEncoderSpec(**{"name": str(colbert)} | wrong), "cpu")
    with pytest.raises(RetrievalError, match="build with kind late_interaction"):
        Encoder(EncoderSpec(str(colbert), pooling="cls", normalize=True), ["cpu"])
    with pytest.raises(RetrievalError, match="a StaticEmbedding has no token vectors"):
        TokenEncoder(TokenEncoderSpec(str(save_word_encoder(tmp_path / "words"))), "cpu")


def test_a_checkpoint_of_one_vector_a_text_gives_its_token_vectors_as_they_are(caplog):
    from sentence_transformers import SentenceTransformer

    folder = minilm_folder()
    encoder = TokenEncoder(TokenEncoderSpec(folder), "cpu")
    assert "trained for one vector a text" in caplog.text
    assert (encoder.dimension, encoder.spec.max_tokens) == (384, SentenceTransformer(folder).max_seq_length)
    [found] = encoder.encode_queries(["Who wrote Hamlet?"])
    tokens = SentenceTransformer(folder, device="cpu").encode("Who wrote Hamlet?", output_value="token_embeddings")
    np.testing.assert_allclose(found, tokens / tokens.norm(dim=1, keepdim=True), atol=1e-5)
    np.testing.assert_array_equal(found, encoder.encode_passages(["Who wrote Hamlet?"])[0])


# Passages of 1, 3, 1 and 2 tokens; the third is the first again.
TOKENS = np.array([[1, 0], [0, 1], [3, 4], [-1, 0], [1, 0], [-2, 0], [0, -1]], dtype=np.float16)
OFFSETS = np.array([0, 1, 4, 5, 7])


@pytest.mark.parametrize("block_tokens", [1, 2, 4, 100])
@pytest.mark.parametrize("group_tokens", [1, 3, 100])
def test_maxsim_by_hand_ties_by_row(block_tokens, group_tokens):
    index = MaxSimIndex(TOKENS, OFFSETS, block_tokens=block_tokens, group_tokens=group_tokens)
    queries = [np.array([[1, 0], [0, -1]]), np.array([[0, 1]]), np.array([[1, 1], [1, 1], [2, 0]])]
    # (1, 0): 1, 3, 1, 0; (0, -1): 0, 0, 0, 1. (0, 1): 0, 4, 0, 0. (1, 1) twice: 1, 7, 1, -1; (2, 0): 2, 6, 2, 0.
    scores, rows = index.search(queries, 3)
    assert scores.tolist() == [[3, 1, 1], [4, 0, 0], [20, 4, 4]]
    assert rows.tolist() == [[1, 0, 2], [1, 0, 2], [1, 0, 2]]
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert index.search(queries[:1], 9)[1].tolist() == [[1, 0, 2, 3]]
    assert (len(index), index.dimension) == (4, 2)


def test_maxsim_of_many_is_that_of_each_pair():
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 9, 60)
    tokens = draws.standard_normal((lengths.sum(), 8)).astype(np.float16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    queries = [draws.standard_normal((n, 8)).astype(np.float32) for n in draws.integers(1, 6, 20)]
    passages = [tokens[a:b].astype(np.float32) for a, b in pairwise(offsets)]
    expected = np.array([[(query @ one.T).max(axis=1).sum() for one in passages] for query in queries])
    scores, rows = MaxSimIndex(tokens, offsets, block_tokens=50, group_tokens=7).search(queries, 60)
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1, kind="stable"))
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, 1), atol=1e-5)


def test_queries_that_do_not_fit_are_refused():
    index = MaxSimIndex(TOKENS, OFFSETS)
    for query in (np.zeros((1, 3)), np.zeros(2), np.zeros((0, 2))):
        with pytest.raises(RetrievalError, match="the index has 2 dimensions"):
            index.search([np.ones((1, 2)), query], 1)


@pytest.fixture
def built(tmp_path, colbert):
    """Makes an index of forty passages; returns its directory."""

    def build(name="index", **options):
        if not (tmp_path / "corpus.jsonl").is_file():
            write_corpus(word_passages(40), tmp_path / "corpus.jsonl")
        chosen = {"kind": "late_interaction", "model": str(colbert)} | options
        corpus, output = str(tmp_path / "corpus.jsonl"), str(tmp_path / name)
        build_index(IndexArguments(corpus=[corpus], output=output, **chosen), say=lambda _: None)
        return tmp_path / name

    return build


def test_an_index_finds_what_maxsim_over_its_passages_finds(built, colbert):
    directory = built()
    retriever = open_index(directory)
    queries = ["the river of oslo", "paris"]
    encoder = TokenEncoder(TokenEncoderSpec(str(colbert)), "cpu")
    texts = encoder.encode_passages([passage.text for passage in word_passages(40)])
    expected = [
        [(query @ tokens.astype(np.float16).astype(np.float32).T).max(axis=1).sum() for tokens in texts]
        for query in encoder.encode_queries(queries)
    ]
    for ranking, scores in zip(retriever.search(queries, 40), expected, strict=True):
        found = {passage.id: passage.score for passage in ranking}
        np.testing.assert_allclose([found[str(row)] for row in range(40)], scores, atol=1e-5)
        assert [passage.score for passage in ranking] == sorted(found.values(), reverse=True)
    [alone], [_, beside] = retriever.search(queries[1:], 3), retriever.search(queries, 3)
    assert [passage.id for passage in alone] == [passage.id for passage in beside]
    retriever.check()
    assert "MaxSim" in retriever.description and str(directory.parent) not in retriever.description


def test_a_server_merges_queries_of_unlike_numbers_of_tokens(built):
    pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
    retriever = open_index(built())
    server = Running(lambda: retriever).ready()
    try:
        queries = ["the river of oslo", "paris", ""]
        served = [[hit["document"]["id"] for hit in ranking] for ranking in server.search(queries).json()["result"]]
        assert served == [[passage.id for passage in ranking] for ranking in retriever.search(queries, 3)]
    finally:
        server.stop()


def test_two_builds_are_equal_and_a_killed_one_goes_on(built, tmp_path, monkeypatch):
    monkeypatch.setattr(token_vectors, "SHARD_ROWS", 16)
    monkeypatch.setattr(token_vectors.encode_tokens, "__defaults__", (16,))
    whole = built()
    encode, calls = TokenEncoder.encode_passages, []

    def dying(self, texts):
        calls.append(len(texts))
        if len(texts) == 16 and calls.count(16) == 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(TokenEncoder, "encode_passages", dying)
        with pytest.raises(KeyboardInterrupt):
            built("again")
    assert len(list((tmp_path / "again.building" / "work" / "tokens").glob("*.npz"))) == 1
    again = built("again")
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files
    assert Manifest.read(again).fingerprint == Manifest.read(whole).fingerprint
    # Twelve words a passage, of which colons are left out, and three tokens around them.
    vectors = 40 * (12 + 3) - sum(passage.text.count(":") for passage in word_passages(40))
    assert verify(again).index == {"type": "maxsim", "dtype": "float16", "vectors": vectors}


def test_another_encoder_is_refused(built, tmp_path, colbert):
    directory = built()
    other = save_colbert(tmp_path / "other", seed=1)
    with pytest.raises(RetrievalError, match="give the original checkpoint"):
        open_index(directory, SearchOptions(encoder=str(other)))
    moved = tmp_path / "moved"
    shutil.copytree(colbert, moved)
    assert open_index(directory, SearchOptions(encoder=str(moved))).search(["oslo"], 1)
    with pytest.raises(RetrievalError, match="does not take retriever_nprobe=3"):
        open_index(directory, SearchOptions(nprobe=3))
    # The same weights, but vectors that are others: the file is named, whatever vouches for it.
    tokens = np.fromfile(directory / "tokens.f16", dtype="<f2")
    tokens[:DIMENSION] = -tokens[:DIMENSION]
    tokens.tofile(directory / "tokens.f16")
    with pytest.raises(RetrievalError, match=r"tokens\.f16"):
        open_index(directory)


def test_arguments_of_other_kinds_and_corpora_too_large_are_refused(built, monkeypatch):
    for wrong, message in [
        ({"pooling": "cls"}, "pooling='cls' is for kind='dense'"),
        ({"index": "ivf"}, "has an exact scan alone"),
        ({"devices": ["cpu", "cpu"]}, "encodes on one device"),
        ({"model": None}, "needs an encoder"),
        ({"kind": "bm25"}, "model=.* is for kind='dense'"),
    ]:
        with pytest.raises(ValueError, match=message):
            built("refused", **wrong)
    monkeypatch.setattr(kind, "MOST_VECTORS", 100)
    with pytest.raises(RetrievalError, match="so that 100 are the most; build a dense index"):
        built("large")


@pytest.mark.slow
def test_recall_of_maxsim_over_the_token_vectors_of_minilm(tmp_path):
    questions = real_questions()
    corpus, output = [str(REAL_DATA / "corpus.jsonl")], str(tmp_path / "index")
    arguments = IndexArguments(corpus=corpus, output=output, kind="late_interaction", model=minilm_folder())
    build_index(arguments, say=lambda _: None)
    measured = recall(questions, open_index(tmp_path / "index"))
    assert measured == pytest.approx((0.630, 0.730, 0.775, 0.900), abs=0.005), measured
