"""BM25 over small corpora with scores worked out by hand, and over real passages where they are present."""

import json
import logging
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rex_rag.data.corpus import CorpusError, read_corpus, write_corpus
from rex_rag.retrieval.base import RetrievalError, Retriever, checked_search
from rex_rag.retrieval.bm25.free_parameters import BM25sRetriever
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter
from rex_rag.types import Passage

REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "hotpotqa_sample"


def _passages(*texts):
    return [Passage(id=str(n), title="", text=text) for n, text in enumerate(texts)]


def _ids(ranking):
    return [passage.id for passage in ranking]


def test_score_is_the_lucene_formula():
    # Lengths 2, 4, 3: mean 3. "oslo" is once in 2 of 3 passages: idf = ln(1 + (3 - 2 + .5) / (2 + .5)) = ln 1.6.
    # k1 = 1.2, b = .75: tf part = 2.2 / (1 + 1.2 (.25 + .75 length / 3)): length 2: 2.2/1.9, length 3: 1.
    retriever = BM25Retriever(_passages("oslo harbour", "rome madrid lisbon prague", "oslo winter sun"))
    [ranking] = retriever.search(["Oslo"], top_k=3)
    assert _ids(ranking) == ["0", "2", "1"]
    expected = [math.log(1.6) * 2.2 / 1.9, math.log(1.6), 0.0]
    assert [passage.score for passage in ranking] == pytest.approx(expected, rel=1e-5)


def test_title_is_searched_and_words_are_stemmed():
    passages = [Passage("a", "Rivers of Norway", "They flow."), Passage("b", "Lakes", "They rest.")]
    assert _ids(BM25Retriever(passages).search(["river"], 1)[0]) == ["a"]
    # Without a stemmer "river" is not "rivers": nothing matches.
    assert BM25Retriever(passages, stemmer=None).search(["river"], 1)[0][0].score == 0.0


def test_stop_words_are_left_out_unless_asked_for():
    passages = _passages("oslo", "the the the")
    assert BM25Retriever(passages).search(["the"], 1)[0][0].id == "0"
    assert BM25Retriever(passages, stopwords=None).search(["the"], 1)[0][0].id == "1"
    assert BM25Retriever(passages, stopwords=["oslo"]).search(["the oslo"], 1)[0][0].id == "1"


@pytest.mark.parametrize(
    ("other", "right", "query"),
    [
        ("Vitamin A deficiency", "Vitamin K deficiency", "Vitamin K"),
        ("Apollo 1 fire", "Apollo 8 flight", "Apollo 8"),
        ("Adele sang", "Beyonc\u00e9 sang", "Beyonce\u0301"),
        ("Adele sang", "Beyonce\u0301 sang", "Beyonc\u00e9"),
        ("疑是地上霜", "低头思故乡", "故乡"),
        ("パリはフランスの首都", "東京は日本の首都", "東京"),
        ("เชียงใหม่อยู่เหนือ", "กรุงเทพเป็นเมืองหลวงของไทย", "เมืองหลวง"),
        ("ភ្នំពេញ", "សៀមរាប", "សៀមរាប"),
        ("Oslo 東京都 Rome", "Oslo 京都府 Rome", "京都府"),
        ("小狗是动物", "小猫是动物", "猫"),
        ("부산은 도시", "서울은 도시", "서울"),
        ("日本のＫｙｏｔｏ", "日本のＴｏｋｙｏ", "Tokyo"),
        ("ｵｵｻｶ", "ﾄｳｷｮｳ", "トウキョウ"),
    ],
)
def test_words_of_one_character_accents_and_scripts_without_spaces_are_found(other, right, query):
    first, second = BM25Retriever(_passages(other, right)).search([query], 2)[0]
    assert first.id == "1" and first.score > second.score


def test_characters_of_a_script_without_spaces_are_terms_in_pairs_and_ideographs_alone():
    splitter = TermSplitter(BM25Options())
    assert splitter.terms(["中 and 日本語 x"]) == [["中", "日本", "本語", "日", "本", "語", "x"]]
    assert splitter.terms(["タワー", "서울은"]) == [["タワ", "ワー"], ["서울", "울은", "서", "울", "은"]]


@pytest.mark.parametrize("query", ["zzz", "the of", "!?", "\u4e2d", "a", "", " \n", "\0"])
def test_a_query_that_matches_nothing_gets_corpus_order(query):
    retriever = BM25Retriever(_passages("oslo", "rome", "paris"))
    [ranking] = retriever.search([query], top_k=2)
    assert [(p.id, p.score) for p in ranking] == [("0", 0.0), ("1", 0.0)]


def test_equal_scores_keep_corpus_order_for_any_top_k():
    retriever = BM25Retriever(_passages(*["oslo harbour"] * 40, "rome"))
    for top_k in (1, 7, 40):
        assert _ids(retriever.search(["oslo"], top_k)[0]) == [str(n) for n in range(top_k)]


def test_top_k_is_capped_at_the_corpus():
    assert _ids(BM25Retriever(_passages("oslo", "rome")).search(["rome"], 50)[0]) == ["1", "0"]
    assert _ids(BM25Retriever(_passages("oslo")).search(["oslo"], 3)[0]) == ["0"]


def _random_corpus(draws, size, words, longest):
    # Zipf's law: common words make long lists, which a search may leave unread.
    weights = [1 / (rank + 1) for rank in range(words)]
    names = [f"w{rank}" for rank in range(words)]
    lengths = [draws.randint(0, longest) for _ in range(size)]
    return [Passage(str(n), "", " ".join(draws.choices(names, weights, k=k)) or "-") for n, k in enumerate(lengths)]


@pytest.mark.parametrize(("size", "words", "longest"), [(30, 8, 6), (400, 60, 12), (6000, 3000, 40)])
def test_rankings_are_those_of_scoring_every_passage(size, words, longest):
    draws = random.Random(size)
    passages = _random_corpus(draws, size, words, longest)
    retriever = BM25Retriever(passages, stemmer=None)
    # Another library, which adds up every list to its end; without the factor k1 + 1.
    exhaustive = BM25sRetriever(passages, 1.2, 0.75, BM25Options(stemmer=None))
    for _ in range(150):
        # Repeated words and words that no passage has are in there too.
        query = " ".join(f"w{min(int(draws.paretovariate(0.5)) - 1, words)}" for _ in range(draws.randint(1, 12)))
        top_k = draws.choice([1, 3, 10, size, size + 5])
        scores, rows = (found[0] for found in retriever.rank(retriever.encode([query]), top_k))
        every = exhaustive.rank(exhaustive.encode([query]), size)
        expected = np.empty(size)
        expected[every[1][0]] = every[0][0] * 2.2
        assert scores == pytest.approx(np.sort(expected)[::-1][:top_k], rel=1e-5, abs=1e-6)
        assert scores == pytest.approx(expected[rows], rel=1e-5, abs=1e-6)
        assert len(set(rows.tolist())) == min(top_k, size)
        ties = scores[1:] == scores[:-1]
        assert (np.diff(rows)[ties] > 0).all()


def test_other_parameters_take_bm25s_with_the_same_terms_and_order_of_equal_scores():
    passages = _passages("oslo harbour", "rome madrid lisbon prague", "oslo winter sun", "oslo harbour")
    retriever = BM25sRetriever(passages, k1=0.9, b=0.4)
    assert retriever.description == "BM25 over 4 passages (k1=0.9, b=0.4)"
    [ranking, blank] = retriever.search(["Oslo harbours", ""], 9)
    assert (_ids(ranking), _ids(blank)) == (["0", "3", "2", "1"], ["0", "1", "2", "3"])
    # Lengths 2, 4, 3, 2: mean 2.75. "oslo" is in 3 of 4 passages, "harbour" in 2.
    saturation = 1 / (1 + 0.9 * (0.6 + 0.4 * 2 / 2.75))
    assert ranking[0].score == pytest.approx((math.log(1 + 1.5 / 3.5) + math.log(2)) * saturation, rel=1e-5)
    with pytest.raises(RetrievalError, match="k1=-1"):
        BM25sRetriever(passages, k1=-1, b=0)
    with pytest.raises(RetrievalError, match="b=nan"):
        BM25sRetriever(passages, k1=1, b=float("nan"))
    with pytest.raises(RetrievalError, match="none of the 1 passages"):
        BM25sRetriever(_passages("the"), k1=1, b=0)


@pytest.mark.parametrize(
    ("queries", "top_k", "message"),
    [
        (["oslo"], 0, "top_k=0"),
        (["oslo"], -1, "top_k=-1"),
        (["oslo"], 1.5, "top_k=1.5"),
        ([None], 1, "query 0 is None"),
        ("oslo", 1, "single string"),
    ],
)
def test_requests_that_ask_nothing_are_refused(queries, top_k, message):
    with pytest.raises(RetrievalError, match=message):
        BM25Retriever(_passages("oslo")).search(queries, top_k)


@pytest.mark.parametrize(
    ("passages", "options", "message"),
    [
        ([], {}, "0 passages"),
        (_passages("the", "of a"), {}, "none of the 2 passages"),
        (
            _passages("oslo"),
            {"stemmer": "klingon"},
            "no such stemmer.*'klingon'.*Unsupported language: klingon",
        ),
        (_passages("oslo"), {"stopwords": "klingon"}, "stopwords='klingon'"),
    ],
)
def test_what_cannot_be_indexed_is_refused(passages, options, message):
    with pytest.raises(RetrievalError, match=message):
        BM25Retriever(passages, **options)


def test_contract_quietness_and_description(tmp_path, capfd, caplog):
    path = tmp_path / "world" / "corpus.jsonl"
    write_corpus(_passages("oslo", "rome"), path)
    with caplog.at_level(logging.INFO):
        retriever = BM25Retriever.from_corpus(path)
        retriever.check()
        rankings = checked_search(retriever, ["rome", "oslo", "rome"], 1)
    assert [_ids(ranking) for ranking in rankings] == [["1"], ["0"], ["1"]]
    assert retriever.search([], 1) == []
    assert isinstance(retriever, Retriever) and len(retriever) == 2
    assert retriever.description == "BM25 over 2 passages of world/corpus.jsonl"
    assert capfd.readouterr() == ("", "")
    assert {record.name for record in caplog.records} <= {"rex_rag.retrieval.bm25.retriever"}


def test_from_corpus_reports_a_bad_file(tmp_path):
    with pytest.raises(CorpusError, match="no such file"):
        BM25Retriever.from_corpus([tmp_path / "absent.jsonl"])


def test_threads_see_the_same_ranking():
    draws = random.Random(0)
    words = [f"word{n}" for n in range(50)]
    retriever = BM25Retriever(_passages(*[" ".join(draws.choices(words, k=20)) for _ in range(200)]))
    queries = [" ".join(draws.choices(words, k=4)) for _ in range(100)]
    alone = retriever.search(queries, 5)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda query: retriever.search([query], 5)[0], queries))
    assert together == alone


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the HotpotQA sample is not at ../shared/data/hotpotqa_sample")
@pytest.mark.parametrize(("top_k", "expected"), [(2, 0.610), (3, 0.695), (5, 0.785), (10, 0.885)])
def test_recall_of_gold_passages_on_hotpotqa(top_k, expected):
    retriever = BM25Retriever(read_corpus(REAL_DATA / "corpus.jsonl"))
    with (REAL_DATA / "qa.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    rankings = retriever.search([question["question"] for question in questions], top_k)
    recalls = []
    for question, ranking in zip(questions, rankings, strict=True):
        gold = set(question["metadata"]["supporting_titles"])
        recalls.append(len(gold & {passage.title for passage in ranking}) / len(gold))
    assert len(recalls) == 100
    assert sum(recalls) / len(recalls) == pytest.approx(expected, abs=5e-4)
