"""BM25 over small corpora with scores worked out by hand, and over real passages where they are present."""

import json
import logging
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bm25s
import numpy as np
import pytest

from rex_rag.data.corpus import CorpusError, read_corpus, write_corpus
from rex_rag.retrieval.base import RetrievalError, Retriever, checked_search
from rex_rag.retrieval.bm25 import postings as bm25_postings
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
    # k1 = 1.5, b = .75: tf part = 1 / (1 + 1.5 (.25 + .75 length / 3)): length 2: 1/2.125, length 3: 1/2.5.
    retriever = BM25Retriever(_passages("oslo harbour", "rome madrid lisbon prague", "oslo winter sun"))
    [ranking] = retriever.search(["Oslo"], top_k=3)
    assert _ids(ranking) == ["0", "2", "1"]
    expected = [math.log(1.6) / 2.125, math.log(1.6) / 2.5, 0.0]
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
def test_rankings_are_those_of_scoring_every_passage_with_bm25s(size, words, longest):
    draws = random.Random(size)
    passages = _random_corpus(draws, size, words, longest)
    retriever = BM25Retriever(passages, stemmer=None)
    index = bm25s.BM25()
    terms = bm25s.tokenize([p.text for p in passages], return_ids=False, show_progress=False)
    index.index(terms, create_empty_token=False, show_progress=False)
    for _ in range(150):
        # Repeated words and words that no passage has are in there too.
        query = [f"w{min(int(draws.paretovariate(0.5)) - 1, words)}" for _ in range(draws.randint(1, 12))]
        top_k = draws.choice([1, 3, 10, size, size + 5])
        known = [word for word in query if word in index.vocab_dict]
        scores = index.get_scores(known) if known else np.zeros(size, np.float32)
        expected = sorted(range(size), key=lambda row: (-scores[row], row))[:top_k]
        found, [rows] = retriever.rank(retriever.encode([" ".join(query)]), top_k)
        assert rows.tolist() == expected
        assert found[0].tolist() == scores[expected].tolist()  # not approximately: the same sums in the same order


def test_lists_of_common_words_are_not_added_up_when_they_cannot_matter(monkeypatch):
    # "rare" is in 20 of 50,000 passages, "common" in all: it adds at most ln(1 + .5 / 50000.5) = 1e-5.
    passages = _passages(*["common rare" if n % 2500 == 0 else "common word" for n in range(50_000)])
    retriever = BM25Retriever(passages)
    [rare, common] = retriever.encode(["rare common"])[0]
    looked_up = []
    look_up = bm25_postings._List.look_up

    def watched(self, candidates):
        looked_up.append((len(self.rows), len(candidates)))
        return look_up(self, candidates)

    monkeypatch.setattr(bm25_postings._List, "look_up", watched)
    _, [rows] = retriever.rank([[common, rare]], 5)
    assert rows.tolist() == [0, 2500, 5000, 7500, 10000]
    # First to find what may win, then for the exact scores: 20 candidates in a list of 50,000.
    assert looked_up[0] == (50_000, 20)
    assert max(count for _, count in looked_up) == 20


@pytest.mark.parametrize("rows_per_range", [1, 7, 64, 1000])
def test_ranges_of_rows_leave_the_ranking_as_it_is(rows_per_range, monkeypatch):
    draws = random.Random(rows_per_range)
    passages = _random_corpus(draws, 400, 60, 12)
    queries = [" ".join(f"w{int(draws.paretovariate(0.5))}" for _ in range(draws.randint(1, 8))) for _ in range(60)]
    whole = BM25Retriever(passages)
    expected = {top_k: whole.search(queries, top_k) for top_k in (1, 5, 400)}
    monkeypatch.setattr(bm25_postings, "ROWS_PER_RANGE", rows_per_range)
    ranged = BM25Retriever(passages)
    assert {top_k: ranged.search(queries, top_k) for top_k in (1, 5, 400)} == expected
    assert all(len(sums) == min(400, rows_per_range) for sums in ranged._searcher._free)


def test_what_a_search_adds_up_does_not_leak_into_the_next():
    retriever = BM25Retriever(_passages("oslo rome", "rome paris", "paris oslo"))
    alone = [retriever.search([query], 3) for query in ("oslo paris", "rome", "paris")]
    again = [retriever.search([query], 3) for query in ("oslo paris", "rome", "paris")]
    assert alone == again
    assert not any(sums.any() for sums in retriever._searcher._free)


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
        (_passages("oslo"), {"k1": -1}, "k1=-1"),
        (_passages("oslo"), {"b": 1.5}, "b=1.5"),
        (_passages("oslo"), {"stemmer": "klingon"}, "no stemmer 'klingon'"),
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
@pytest.mark.parametrize(("top_k", "expected"), [(2, 0.595), (3, 0.695), (5, 0.785), (10, 0.890)])
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
