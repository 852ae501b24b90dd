"""Coverage: whole words, titles and texts apart, ranks, and the command, against figures worked out by hand."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rex_rag.answers import sub_match
from rex_rag.commands.coverage import coverage
from rex_rag.data.corpus import CorpusError, write_corpus
from rex_rag.data.qa import QuestionArguments, load_questions
from rex_rag.evaluation.benchmarks import load_benchmark
from rex_rag.evaluation.bootstrap import Estimate
from rex_rag.evaluation.coverage import AnswerMatcher, coverage_table, measure_coverage, open_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.builder import build_index
from rex_rag.types import Passage

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

PASSAGES = [
    Passage("0", "Rome", "Rome is the capital of Italy, a country in Europe."),
    Passage("1", "Oslo", "Oslo is the capital of Norway. No other city there is larger."),
    Passage("2", "New", "York is a walled city in England."),
    Passage("3", "Jane Austen", "She wrote Emma, which appeared in December 1815."),
]

QUESTIONS = [
    {"question": "What is the capital of Italy?", "golden_answers": ["Roma", "Rome"]},  # passage 0, rank 1
    {"question": "Which country is Rome in?", "golden_answers": ["Norway"]},  # there, but behind another
    {"question": "Which city is in England?", "golden_answers": ["New York"]},  # only across title and text
    {"question": "Who wrote Emma?", "golden_answers": ["the Jane Austen"]},  # in a title; the article is nothing
    {"question": "Is Oslo in Italy?", "golden_answers": ["no"]},  # stands there, and says nothing
    {"question": "When did Emma appear?", "golden_answers": ["181"]},  # a part of a word is no match
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return load_benchmark(path)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    write_corpus(PASSAGES, path)
    return path


def test_answers_are_found_as_whole_words():
    matcher = AnswerMatcher(["New York", "new york city", "York", "the", "no"])
    assert matcher.find("I know New York, City of the North") == {"new york", "new york city", "york"}
    assert matcher.find("York? New?") == {"york"}
    assert matcher.find("A new, York.") == {"new york"} | {"york"}  # punctuation is nothing, as in scoring
    assert matcher.find("no.") == {"no"}
    assert matcher.find("the") == set()
    assert AnswerMatcher([]).find("anything") == set()


def test_a_forgotten_answer_takes_no_other_with_it():
    matcher = AnswerMatcher(["new york", "new york city", "york"])
    matcher.forget("new york")
    assert matcher.find("New York City") == {"new york city", "york"}
    matcher.forget("new york city")
    assert matcher.find("New York City, New York") == {"york"}
    matcher.forget("york")
    assert matcher.find("New York City") == set()


WORDS = st.lists(st.sampled_from(["new", "york", "city", "the", "new.", "A"]), max_size=12).map(" ".join)


@given(answers=st.lists(WORDS, max_size=6), text=WORDS)
def test_the_matcher_agrees_with_sub_match(answers, text):
    found = AnswerMatcher(answers).find(text)
    for answer in answers:
        normalised = AnswerMatcher([answer]).find(answer)
        assert bool(normalised & found) == bool(normalised and sub_match(text, [answer]))


def test_many_answers_cost_no_more_than_few():
    """A text takes as long whether ten or twenty thousand answers are looked for."""
    generator = random.Random(0)
    text = " ".join(f"w{generator.randrange(500)}" for _ in range(5_000))
    answers = [f"w{generator.randrange(500, 10**6)} w{number}" for number in range(20_000)]
    few, many = AnswerMatcher(answers[:10]), AnswerMatcher(answers)

    def seconds(matcher: AnswerMatcher) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            matcher.find(text)
            times.append(time.perf_counter() - start)
        return min(times)

    # 2,000 times the answers: a scan of each would take 2,000 times as long.
    assert seconds(many) < 20 * seconds(few)


def test_coverage_by_hand(questions):
    [measured] = measure_coverage([questions], iter(PASSAGES), BM25Retriever(PASSAGES), ks=(10, 1))
    assert measured.passages == 4
    assert measured.in_corpus == (True, True, False, True, True, False)
    assert measured.yes_no == (False, False, False, False, True, False)
    assert measured.ks == (1, 10)
    assert measured.ranks[0] == 1
    assert measured.ranks[1] > 1  # Rome's own passage comes first
    assert measured.ranks[2] is None
    assert measured.ranks[3] == 1
    assert measured.ranks[5] is None
    shares = {name: estimate.mean for name, estimate in measured.estimates(with_yes_no=False).items()}
    assert shares == {"corpus": pytest.approx(3 / 5), "top 1": pytest.approx(2 / 5), "top 10": pytest.approx(3 / 5)}
    assert measured.estimates()["corpus"].mean == pytest.approx(4 / 6)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_and_the_row_say_the_same(questions):
    measured = measure_coverage([questions], PASSAGES)
    head, _, everything, without, _, explained = map(cells, coverage_table(measured).splitlines())
    assert head == ["benchmark", "questions", "n", "in corpus"]
    assert everything[:3] == ["mine", "all", "6"] and everything[3].startswith("66.7 (")
    assert without[:3] == ["mine", "without yes/no", "5"] and without[3].startswith("60.0 (")
    assert explained == ["Per cent of the questions, in brackets the 95 % bootstrap interval."]
    row = json.loads(json.dumps(measured[0].as_row()))
    assert row["all"]["n"] == 6
    assert row["without_yes_no"]["corpus"]["mean"] == pytest.approx(0.6)
    assert row["retriever"] is row["searched_to"] is None
    assert row["questions"][2] == {"id": "2", "yes_no": False, "in_corpus": False, "rank": None}


def test_several_benchmarks_take_one_pass(questions, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"question": "Is it?", "golden_answers": ["yes"]}))
    other = load_benchmark(path)
    first, second = measure_coverage([questions, other], (passage for passage in PASSAGES))
    assert first.in_corpus == (True, True, False, True, True, False)
    assert second.in_corpus == (False,)
    assert second.estimates(with_yes_no=False) == {}
    assert second.estimates() == {"corpus": Estimate(0.0, 0.0, 0.0)}
    rows = [cells(line) for line in coverage_table([first, second]).splitlines()]
    assert ["other", "without yes/no", "0", "–"] in rows


def test_of_choices_the_right_ones_text_is_looked_for(tmp_path):
    path = tmp_path / "chosen.jsonl"
    rows = [
        {"question": "Capital?", "golden_answers": "A", "options": ["Oslo", "Paris"]},
        {"question": "Capital?", "golden_answers": "B", "options": ["Oslo", "Paris"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = load_benchmark({"path": str(path), "kind": "multiple_choice", "choices_column": "options"})
    [measured] = measure_coverage([chosen], PASSAGES)
    assert measured.in_corpus == (True, False)


def test_a_corpus_is_files_and_index_directories(corpus, tmp_path):
    index = tmp_path / "index"
    build_index(IndexArguments(corpus=[str(corpus)], output=str(index), kind="bm25"), say=lambda text: None)
    passages, total = open_corpus([index])
    assert ([passage.title for passage in passages], total) == (["Rome", "Oslo", "New", "Jane Austen"], 4)
    passages, total = open_corpus([index, corpus])
    assert (len(list(passages)), total) == (8, None)
    with pytest.raises(RetrievalError, match="missing or empty"):
        open_corpus([tmp_path])
    with pytest.raises(CorpusError, match="no such file"):
        list(open_corpus([tmp_path / "nothing.jsonl"])[0])


def test_nothing_to_look_through_is_refused(questions):
    with pytest.raises(ValueError, match="neither passages nor a retriever"):
        measure_coverage([questions])
    with pytest.raises(ValueError, match="no passage to look through"):
        measure_coverage([questions], [])
    for ks in ((), (0,), (1, True)):
        with pytest.raises(ValueError, match="top_k="):
            measure_coverage([questions], PASSAGES, ks=ks)


def test_the_command_prints_a_table_and_writes_json(corpus, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    out = tmp_path / "coverage.json"
    coverage(["--benchmarks", f"mine={path}", "--corpus", str(corpus), "--top_k", "1", "2", "--json", str(out)])
    printed = capsys.readouterr().out
    assert "4 passages" in printed
    assert "BM25" in printed
    assert ["benchmark", "questions", "n", "in corpus", "in top 1", "in top 2"] in map(cells, printed.splitlines())
    [row] = json.loads(out.read_text())
    assert row["benchmark"]["questions"] == row["all"]["n"] == 6
    assert row["all"]["corpus"]["mean"] == pytest.approx(4 / 6)
    coverage(["--benchmarks", f"mine={path}", "--corpus", str(corpus), "--no_search", "--subset", "2"])
    printed = capsys.readouterr().out
    assert "searched" not in printed
    assert ["mine", "all", "2"] in [cells(line)[:3] for line in printed.splitlines()]


def test_the_command_takes_a_recipe_with_a_described_set(corpus, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"q": "Where?", "a": "Oslo"}))
    recipe = tmp_path / "recipe.yaml"
    described = {"path": str(tmp_path / "mine.jsonl"), "question_column": "q", "answers_column": "a"}
    recipe.write_text(json.dumps({"coverage": {"benchmarks": [described], "corpus": [str(corpus)], "top_k": [1]}}))
    coverage(["--config", str(recipe)])
    rows = [cells(line) for line in capsys.readouterr().out.splitlines()]
    assert ["mine", "all", "1", "100.0 (100.0–100.0)"] in [row[:4] for row in rows]


def test_a_recipe_may_name_one_rank(corpus, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(json.dumps(QUESTIONS[0]))
    recipe = tmp_path / "recipe.yaml"
    section = {"benchmarks": str(tmp_path / "mine.jsonl"), "corpus": [str(corpus)], "top_k": 2}
    recipe.write_text(json.dumps({"coverage": section}))
    coverage(["--config", str(recipe)])
    assert any(cells(line)[3:] == ["in corpus", "in top 2"] for line in capsys.readouterr().out.splitlines())


def test_the_command_refuses_what_it_cannot_do(corpus, tmp_path):
    with pytest.raises(ValueError, match="no benchmark was given"):
        coverage(["--corpus", str(corpus)])
    with pytest.raises(ValueError, match=r"nowhere/out\.json'?: there is no such folder"):
        coverage(
            ["--benchmarks", "x.jsonl", "--corpus", str(corpus), "--json", str(tmp_path / "nowhere" / "out.json")]
        )
    (tmp_path / "mine.jsonl").write_text(json.dumps(QUESTIONS[0]))
    away = ["--benchmarks", str(tmp_path / "mine.jsonl"), "--retriever", "http://127.0.0.1:9"]
    with pytest.raises(ValueError, match="there is nothing to look through"):
        coverage([*away, "--no_search"])
    out = tmp_path / "coverage.json"
    with pytest.raises(RetrievalError, match=r"127\.0\.0\.1:9"):
        coverage([*away, "--retriever_max_attempts", "1", "--passages", str(corpus), "--json", str(out)])
    assert not out.exists()


def test_answerable_questions_become_a_training_set(corpus, tmp_path, capsys):
    """The four questions whose answers stand in the corpus, of six, as training reads them."""
    path, out = tmp_path / "mine.jsonl", tmp_path / "answerable.jsonl"
    rows = [{"id": f"train_{number}", **row, "metadata": {"level": number}} for number, row in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--benchmarks", f"mine={path}", "--corpus", str(corpus), "--no_search", "--write_answerable", str(out)]
    coverage(command)
    assert f"{out}: 4 of 6 questions have an answer in the corpus" in capsys.readouterr().out
    assert [json.loads(line) for line in out.read_text().splitlines()] == [rows[0], rows[1], rows[3], rows[4]]
    [source] = QuestionArguments(datasets=[str(out)]).datasets
    loaded = load_questions(QuestionArguments(datasets=[source]))
    assert loaded["id"][:] == ["train_0", "train_1", "train_3", "train_4"]
    with pytest.raises(ValueError, match="exists, and runs may have been trained on it"):
        coverage(command)


def test_answerable_questions_that_cannot_be_written(corpus, tmp_path, capsys):
    path, out = tmp_path / "mine.jsonl", tmp_path / "answerable.jsonl"
    path.write_text(json.dumps(QUESTIONS[5]))  # no passage holds its answer
    look = ["--benchmarks", f"mine={path}", "--no_search", "--corpus", str(corpus)]
    with pytest.raises(ValueError, match=r"of 1 questions of mine none has a gold answer"):
        coverage([*look, "--write_answerable", str(out)])
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match=r"let it end in \.jsonl"):
        coverage([*look, "--write_answerable", str(tmp_path / "answerable.txt")])
    with pytest.raises(ValueError, match="there is no such folder"):
        coverage([*look, "--write_answerable", str(tmp_path / "nowhere" / "answerable.jsonl")])
    with pytest.raises(ValueError, match="takes the questions of one set, but 3 were given"):
        coverage([*look, "--benchmarks", f"one={path}", f"two={path}", "--write_answerable", str(out)])
    server = ["--benchmarks", f"mine={path}", "--retriever", "http://127.0.0.1:9", "--write_answerable", str(out)]
    with pytest.raises(ValueError, match="needs a corpus to look through"):
        coverage(server)
    described = tmp_path / "chosen.yaml"
    (tmp_path / "chosen.jsonl").write_text(
        json.dumps({"question": "?", "golden_answers": "A", "options": ["Oslo", "x"]})
    )
    described.write_text("{path: chosen.jsonl, kind: multiple_choice, choices_column: options}")
    with pytest.raises(
        ValueError, match="writes open questions, as training reads them, but chosen is multiple_choice"
    ):
        coverage(["--benchmarks", str(described), *look[2:], "--write_answerable", str(out)])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real questions and passages are not at ../shared/data")
def test_the_real_corpus_holds_what_it_should():
    hotpotqa = load_benchmark(f"hotpotqa={REAL_DATA}/hotpotqa_dev/qa.jsonl")
    sample = load_benchmark(REAL_DATA / "hotpotqa_sample" / "qa.jsonl")
    files = [REAL_DATA / "hotpotqa_sample" / "corpus.jsonl", REAL_DATA / "2wiki_passages" / "corpus.jsonl"]
    passages, _ = open_corpus(files)
    of_hotpotqa, of_sample = measure_coverage([hotpotqa, sample], passages)
    assert of_hotpotqa.passages == 7_113
    # The sample's passages are those its answers were taken from.
    assert of_sample.estimates()["corpus"].mean == 1.0
    assert of_hotpotqa.estimates()["corpus"].mean == pytest.approx(0.356, abs=0.0005)
    assert of_hotpotqa.yes_no.count(True) == 458
