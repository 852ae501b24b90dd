"""Re-ranking: hand-made scores with the expected order spelled out, and a real (tiny, untrained) cross-encoder."""

import json
import threading

import numpy as np
import pytest

from rex_rag.retrieval.base import RetrievalError, Retriever
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.indexed import NO_ROW, IndexedRetriever
from rex_rag.retrieval.passages import PassageList
from rex_rag.retrieval.rerank import (
    CrossEncoderScorer,
    RerankedRetriever,
    RerankedSearch,
    pair_text,
    rerank,
)
from rex_rag.types import Passage

PASSAGES = [Passage(f"p{row}", f"Title {row}", f"text {row}") for row in range(6)]


class FixedRanking(IndexedRetriever):
    """Ranks rows in an order written down for each query; -1 where the ranking could not be filled."""

    def __init__(self, orders):
        super().__init__(PassageList(PASSAGES), "fixed")
        self.orders = orders
        self.asked = []

    def encode(self, queries):
        return [self.orders[query] for query in queries]

    def rank(self, encoded, top_k):
        self.asked.append(top_k)
        width = min(top_k, len(self.passages))
        rows = np.array([(order + [NO_ROW] * width)[:width] for order in encoded], dtype=np.int64)
        return np.where(rows == NO_ROW, -np.inf, -np.arange(width)).astype(np.float32), rows


class WrittenScores:
    """Scores by (query, row of the passage), as written down; records what it was given."""

    description = "written scores"

    def __init__(self, scores):
        self.scores = scores
        self.calls = []

    def score(self, pairs):
        self.calls.append(list(pairs))
        return np.array([self.scores[query][int(text[-1])] for query, text in pairs], dtype=np.float32)


class PlainRetriever(Retriever):
    """Not an indexed one: what an online engine looks like from here."""

    description = "plain"
    max_top_k = 4

    def __init__(self):
        self.asked = []

    def check(self):
        self.search(["q"], 1)

    def search(self, queries, top_k):
        self.asked.append(top_k)
        return [PASSAGES[:top_k] for _ in queries]


def test_the_order_is_the_scorers_and_ties_keep_the_first_ranking():
    inner = FixedRanking({"a": [3, 1, 0, 2, 4, 5], "b": [0, 1, 2, 3, 4, 5]})
    scorer = WrittenScores({"a": {3: 0.5, 1: 2.0, 0: 0.5, 2: 9.0}, "b": {0: -3.0, 1: -1.0, 2: -1.0, 3: -7.0}})
    retriever = RerankedRetriever(inner, scorer, candidates=4)
    scores, rows = retriever.rank(retriever.encode(["a", "b"]), 3)
    assert rows.tolist() == [[2, 1, 3], [1, 2, 0]]  # a: 3 before 0 at 0.5; b: 1 before 2 at -1
    assert scores.tolist() == [[9.0, 2.0, 0.5], [-1.0, -1.0, -3.0]]
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


def test_pairs_of_all_queries_are_scored_in_one_call_with_titles_and_texts():
    scorer = WrittenScores({"a": dict.fromkeys(range(6), 0.0), "b": dict.fromkeys(range(6), 0.0)})
    retriever = RerankedRetriever(FixedRanking({"a": [3, 1], "b": [0]}), scorer, candidates=2)
    assert [[passage.id for passage in found] for found in retriever.search(["a", "b"], 2)] == [["p3", "p1"], ["p0"]]
    assert scorer.calls == [[("a", "Title 3\ntext 3"), ("a", "Title 1\ntext 1"), ("b", "Title 0\ntext 0")]]


def test_found_passages_carry_the_scorers_scores():
    scorer = WrittenScores({"a": {0: 1.0, 1: 4.0}})
    found = RerankedRetriever(FixedRanking({"a": [0, 1]}), scorer, candidates=2).search(["a"], 2)
    assert found == [[Passage("p1", "Title 1", "text 1", 4.0), Passage("p0", "Title 0", "text 0", 1.0)]]


def test_what_the_first_ranking_could_not_fill_stays_last_whatever_the_scores():
    scorer = WrittenScores({"a": {0: -1e30, 4: -2e30}})
    retriever = RerankedRetriever(FixedRanking({"a": [4, 0]}), scorer, candidates=5)
    scores, rows = retriever.rank(retriever.encode(["a"]), 4)
    assert rows.tolist() == [[0, 4, NO_ROW, NO_ROW]]
    assert scores[0, 2:].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize(("top_k", "asked", "width"), [(2, 4, 2), (5, 5, 5), (100, 100, 6)])
def test_candidates_are_asked_for_or_more_where_more_are_wanted(top_k, asked, width):
    inner = FixedRanking({"a": [0, 1, 2, 3, 4, 5]})
    scorer = WrittenScores({"a": {row: float(row) for row in range(6)}})
    retriever = RerankedRetriever(inner, scorer, candidates=4)
    _, rows = retriever.rank(retriever.encode(["a"]), top_k)
    assert inner.asked == [asked]
    assert rows.shape == (1, width) and rows[0, 0] == min(asked, 6) - 1


def test_more_pairs_than_a_call_takes_are_scored_in_several(monkeypatch):
    monkeypatch.setattr("rex_rag.retrieval.rerank.PAIRS_PER_CALL", 4)
    scorer = WrittenScores({"a": {row: float(row) for row in range(6)}, "b": {row: -float(row) for row in range(6)}})
    inner = FixedRanking({"a": [0, 1, 2, 3, 4, 5], "b": [5, 4, 3, 2, 1, 0]})
    retriever = RerankedRetriever(inner, scorer, candidates=6)
    _, rows = retriever.rank(retriever.encode(["a", "b"]), 6)
    assert rows.tolist() == [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert [len(call) for call in scorer.calls] == [4, 4, 4]


@pytest.mark.parametrize("bad", [np.array([np.nan], dtype=np.float32), np.zeros(2, dtype=np.float32)])
def test_scores_that_order_nothing_are_an_error(bad):
    scorer = WrittenScores({})
    scorer.score = lambda pairs: bad
    with pytest.raises(RetrievalError, match="written scores gave scores of shape"):
        RerankedRetriever(FixedRanking({"a": [0]}), scorer, candidates=1).search(["a"], 1)


@pytest.mark.parametrize("candidates", [0, -1, True, 2.5])
def test_candidates_that_make_no_sense_are_refused(candidates):
    with pytest.raises(RetrievalError, match=rf"candidates={candidates!r}; re-ranking needs"):
        RerankedRetriever(FixedRanking({}), WrittenScores({}), candidates)
    with pytest.raises(RetrievalError, match=rf"candidates={candidates!r}; re-ranking needs"):
        RerankedSearch(PlainRetriever(), WrittenScores({}), candidates)


def test_a_retriever_without_an_index_is_reranked_too():
    inner = PlainRetriever()
    scorer = WrittenScores({"a": {0: 1.0, 1: 5.0, 2: 5.0, 3: 0.0}, "b": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}})
    retriever = RerankedSearch(inner, scorer, candidates=4)
    assert isinstance(retriever, Retriever)
    rankings = retriever.search(["a", "b"], 2)
    assert [[passage.id for passage in ranking] for ranking in rankings] == [["p1", "p2"], ["p3", "p2"]]
    assert [passage.score for passage in rankings[1]] == [4.0, 3.0]
    assert inner.asked == [4] and len(scorer.calls) == 1
    assert retriever.search([], 2) == []
    assert retriever.description == "plain, the first 4 re-ranked by written scores"


def test_an_empty_first_ranking_is_refused_and_not_passed_on():
    inner = PlainRetriever()
    inner.search = lambda queries, top_k: [[] for _ in queries]
    with pytest.raises(RetrievalError, match="plain returned no passage for the query 'a'"):
        RerankedSearch(inner, WrittenScores({}), 3).search(["a"], 1)


def test_a_passage_without_a_title_is_its_text():
    assert pair_text(Passage("1", " ", "text")) == "text"


# The real cross-encoder, tiny and with random weights: what it prefers is arbitrary, that its order is kept is not.

WORDS = [
    "chad",
    "faust",
    "river",
    "poet",
    "capital",
    "wrote",
    "flows",
    "through",
    "city",
    "of",
    "the",
    "in",
    *"0123456789",
]
CORPUS = [
    Passage(f"c{row}", f"{WORDS[row % 5]} {row % 10}", f"{WORDS[(3 * row) % 12]} the city of {WORDS[(7 * row) % 12]}")
    for row in range(30)
]


def save_cross_encoder(directory, num_labels=1, safe=True):
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    directory.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "text", "title"]
    (directory / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=num_labels,
        initializer_range=0.5,  # far from one another, so that scores differ visibly
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if not safe:
        (directory / "model.safetensors").unlink()
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: install the retrieval extra")
    return save_cross_encoder(tmp_path_factory.mktemp("cross-encoder") / "tiny")


def test_the_order_equals_the_cross_encoders_own(model):
    from sentence_transformers import CrossEncoder

    inner = BM25Retriever(CORPUS)
    retriever = rerank(inner, model, candidates=12, devices=["cpu"])
    assert isinstance(retriever, RerankedRetriever)
    queries = ["capital of chad", "poet wrote faust", "river flows through the city"]
    found = retriever.search(queries, 5)
    own = CrossEncoder(model, device="cpu")  # its predict puts a sigmoid on the score, which keeps the order
    for query, first, passages in zip(queries, inner.search(queries, 12), found, strict=True):
        scores = own.predict([(query, f"{passage.title}\n{passage.text}") for passage in first])
        order = np.argsort(-scores, kind="stable")[:5]
        assert [passage.id for passage in passages] == [first[place].id for place in order]
        sigmoid = 1 / (1 + np.exp(-np.array([passage.score for passage in passages])))
        assert sigmoid == pytest.approx(scores[order], abs=1e-5)
    assert [passage.id for passage in found[0]] != [passage.id for passage in inner.search(queries, 5)[0]]
    assert retriever.description.startswith(f"{inner.description}, the first 12 re-ranked by cross-encoder tiny (")
    retriever.check()


def test_batches_of_queries_and_pairs_change_no_order(model):
    inner = BM25Retriever(CORPUS)
    queries = [f"{first} {second}" for first in WORDS[:5] for second in WORDS[5:8]]
    together = RerankedRetriever(inner, CrossEncoderScorer(model, device="cpu"), 10).search(queries, 4)
    small = RerankedRetriever(inner, CrossEncoderScorer(model, device="cpu", batch_size=3), 10)
    for query, expected in zip(queries, together, strict=True):
        (alone,) = small.search([query], 4)
        assert [passage.score for passage in alone] == pytest.approx([passage.score for passage in expected], abs=1e-4)


def test_threads_share_a_cross_encoder(model):
    scorer = CrossEncoderScorer(model, device="cpu")
    pairs = [[("capital of chad", pair_text(passage))] * 3 for passage in CORPUS[:6]]
    expected = [scorer.score(part) for part in pairs]
    found = [None] * len(pairs)

    def work(place):
        found[place] = scorer.score(pairs[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == pytest.approx(own) for mine, own in zip(found, expected, strict=True))


def test_an_engine_with_a_limit_is_asked_for_no_more(model):
    inner = PlainRetriever()
    retriever = rerank(inner, model, candidates=50, devices=["cpu"])
    retriever.check()
    assert len(retriever.search(["capital of chad"], 3)[0]) == 3
    assert inner.asked == [1, 4]


def test_weights_that_would_be_unpickled_are_refused(model, tmp_path):
    directory = save_cross_encoder(tmp_path / "pickled", safe=False)
    with pytest.raises(
        RetrievalError, match=r"cannot be loaded \(.*has no weights as safetensors, and pickled ones are never"
    ):
        CrossEncoderScorer(directory, device="cpu")


@pytest.mark.parametrize("place", ["config.json", "modules.json"])
def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(model, tmp_path, place):
    directory = tmp_path / "code"
    save_cross_encoder(directory)
    if place == "config.json":
        config = json.loads((directory / place).read_text())
        config["auto_map"] = {"AutoModelForSequenceClassification": "modeling.Model", "AutoConfig": "modeling.Config"}
        content = {**config, "model_type": "of-its-own"}
    else:
        content = [{"idx": 0, "name": "0", "path": "", "type": "modeling.Model"}]
    (directory / place).write_text(json.dumps(content))
    (directory / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        RetrievalError, match=r"cannot be loaded \(.*(contains custom code|code of its own \(modeling)"
    ):
        CrossEncoderScorer(str(directory), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_with_several_outputs_and_one_that_is_not_there_are_refused(model, tmp_path):
    with pytest.raises(RetrievalError, match="has 3 outputs, and nothing says which one is relevance"):
        CrossEncoderScorer(save_cross_encoder(tmp_path / "three", num_labels=3), device="cpu")
    with pytest.raises(RetrievalError, match=r"cross-encoder '.*absent' cannot be loaded"):
        CrossEncoderScorer(str(tmp_path / "absent"), device="cpu")
    with pytest.raises(RetrievalError, match="batch_size=0"):
        CrossEncoderScorer(model, device="cpu", batch_size=0)
