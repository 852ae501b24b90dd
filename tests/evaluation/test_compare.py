"""Paired comparison of runs: figures by hand, and refusals of what cannot be paired."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from rex_rag.commands.report import add_compare
from rex_rag.evaluation.benchmarks import Benchmark
from rex_rag.evaluation.compare import as_markdown, changed_rows, compare_runs
from rex_rag.evaluation.finished import read_run
from rex_rag.evaluation.records import Question
from rex_rag.rollout.script import RolloutBudget
from tests.evaluation.run_parts import open_questions, sample, write_run

# A alone right on q0; B alone on q1 to q4; both on q5 to q7; neither on q8 and q9.
A = [1, 0, 0, 0, 0, 1, 1, 1, 0, None]
B = [0, 1, 1, 1, 1, 1, 1, 1, None, 0]


def pair(tmp_path: Path, a: dict, b: dict, **of_b: object):
    return read_run(write_run(tmp_path / "a", a)), read_run(write_run(tmp_path / "b", b, method="rag", **of_b))


def test_a_comparison_by_hand(tmp_path: Path):
    found = compare_runs(*pair(tmp_path, {"nq": A, "own": [1, 1]}, {"nq": B, "own": [1, 0]}))
    nq = found.sets["nq"]
    assert (nq.n, nq.a_only, nq.b_only, nq.both, nq.neither) == (10, 1, 4, 3, 2)
    assert (nq.mean_a, nq.mean_b, nq.difference.mean) == pytest.approx((0.4, 0.7, 0.3))
    assert nq.p == 2 * (1 + 5) / 32
    assert found.sets["own"].p == 1.0
    assert found.changed == {"nq": (("q0",), ("q1", "q2", "q3", "q4")), "own": (("q1",), ())}
    assert found.overall.difference.mean == pytest.approx((0.3 - 0.5) / 2)
    assert (found.overall.a_only, found.overall.b_only, found.overall.n) == (2, 4, 12)
    assert found.overall.p == 2 * (1 + 6 + 15) / 64


def test_swapping_the_runs_turns_the_sign(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": A}, {"nq": B})
    one, other = compare_runs(a, b).sets["nq"], compare_runs(b, a).sets["nq"]
    assert one.difference.mean == -other.difference.mean
    assert (one.difference.low, one.difference.high) == pytest.approx((-other.difference.high, -other.difference.low))
    assert one.p == other.p


def test_the_table_for_people(tmp_path: Path):
    found = compare_runs(*pair(tmp_path, {"nq": A, "own": [1, 1]}, {"nq": B, "own": [1, 1]}))
    text = as_markdown(found, ids_shown=2)
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[0:1] == "|"]
    assert table[0] == ["set", "n", "A", "B", "B − A", "p", "only A", "only B", "both", "neither"]
    assert table[2][:4] == ["NQ", "10", "40.0", "70.0"]
    assert table[2][4].startswith("+30.0 [") and table[2][5:] == ["0.375", "1", "4", "3", "2"]
    assert table[3] == ["own", "2", "100.0", "100.0", "+0.0 [+0.0, +0.0]", "1.000", "0", "0", "2", "0"]
    assert table[4][:4] == ["all", "12", "70.0", "85.0"]
    assert "- NQ, only A: q0\n- NQ, only B: q1, q2 and 2 more\n" in text
    assert text.startswith("- A: REX-RAG, me/model-3B (")


def test_the_questions_that_changed_can_be_looked_at(tmp_path: Path):
    rows = list(changed_rows(compare_runs(*pair(tmp_path, {"nq": A}, {"nq": B}))))
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert rows[0] == {
        "benchmark": "nq",
        "id": "q0",
        "better": "a",
        "question": "Question 0 of nq?",
        "golden_answers": ["Lisbon"],
        "a": ["Lisbon"],
        "b": ["Oporto"],
    }


def test_samples_are_compared_by_their_mean(tmp_path: Path):
    a = write_run(tmp_path / "a", {"nq": [[1, 0], [1, 1], [0, 0]]}, temperature=1.0)
    b = write_run(tmp_path / "b", {"nq": [[1, 1], [1, 1], [0, 0]]}, method="rag", temperature=1.0)
    nq = compare_runs(read_run(a), read_run(b)).sets["nq"]
    assert (nq.a_only, nq.b_only, nq.both, nq.neither) == (0, 1, 1, 1)
    assert nq.difference.mean == pytest.approx(1 / 6)


def test_another_metric(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": [sample("Lisbon, Portugal"), 1]}, {"nq": [1, 1]})
    by_f1 = compare_runs(a, b, metric="f1").sets["nq"]
    assert by_f1.mean_a == pytest.approx((2 / 3 + 1) / 2)
    assert compare_runs(a, b, metric="sub_match").sets["nq"].difference.mean == 0.0
    assert "Per cent F1;" in as_markdown(compare_runs(a, b, metric="f1"))
    with pytest.raises(ValueError, match="there is no metric 'bleu'"):
        compare_runs(a, b, metric="bleu")


def test_what_a_metric_lacks_is_said_with_what_to_do(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": A}, {"nq": B})
    with pytest.raises(
        ValueError, match=r"nq in \S+a are not judged; .*rex-rag evaluate … --judge_endpoint URL --judge"
    ):
        compare_runs(a, b, metric="judge")
    question = Question("m0", "Which?", ("B",), {"A": "one", "B": "two"})
    choice = {"choice": Benchmark("choice", "multiple_choice", (question,), "choice.jsonl", 1)}
    paths = [write_run(tmp_path / name, {"choice": [sample("B")]}, benchmarks=choice) for name in ("c", "d")]
    for metric in ("f1", "judge"):
        with pytest.raises(ValueError, match=rf"choice has no {metric}, only main \(--metric\); leave it out"):
            compare_runs(*map(read_run, paths), metric=metric)


def test_unpaired_questions_are_refused_even_when_marked(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": [1, 0, 1]}, {"nq": [1, 0]})
    with pytest.raises(
        ValueError, match=r"nq: the runs answered different questions.*: 1 only in \S+a \(such as q2\)"
    ):
        compare_runs(a, b, mark=True)
    other = {"nq": open_questions("nq", 3, "Other question")}
    c = read_run(write_run(tmp_path / "c", {"nq": [1, 0, 1]}, benchmarks=other))
    with pytest.raises(ValueError, match="ids are the same, but not their order, text or gold answers"):
        compare_runs(a, c, mark=True)


def test_different_sets_are_refused_unless_chosen(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": A, "own": [1]}, {"nq": B, "two": [1]})
    with pytest.raises(ValueError, match=r"different sets: own \(only in \S+a\), two \(only in \S+b\)"):
        compare_runs(a, b)
    assert list(compare_runs(a, b, benchmarks=["nq"]).sets) == ["nq"]
    with pytest.raises(ValueError, match="b has no own; its sets are nq, two"):
        compare_runs(a, b, benchmarks=["own"])


def test_different_protocols_are_refused_or_said(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": A}, {"nq": B}, budget=RolloutBudget(top_k=5))
    with pytest.raises(ValueError, match=r"under different protocols: top_k: 3 against 5\. Evaluate one"):
        compare_runs(a, b)
    found = compare_runs(a, b, mark=True)
    assert "- Not comparable: top_k: 3 against 5\n" in as_markdown(found)


def test_runs_that_are_not_whole_are_refused(tmp_path: Path):
    a, b = pair(tmp_path, {"nq": A, "own": [1]}, {"nq": B, "own": [1]}, unfinished={"nq": 4})
    with pytest.raises(ValueError, match="b is not whole: nq: 6 of 10 questions missing; resume it first"):
        compare_runs(a, b, mark=True)
    assert list(compare_runs(a, b, benchmarks=["own"]).sets) == ["own"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "a", {"nq": A})
    write_run(tmp_path / "b", {"nq": B}, method="rag")
    parser = argparse.ArgumentParser()
    add_compare(parser.add_subparsers())
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--resamples", "500", "--ids", "0"]
    options = parser.parse_args([*words, "--json", str(tmp_path / "c.json"), "--changed", str(tmp_path / "c.jsonl")])
    options.run(options)
    first = capsys.readouterr().out
    assert "| NQ  |  10 | 40.0 | 70.0 |" in first and "only A: q0" not in first
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["sets"]["nq"]["difference"]["mean"] == pytest.approx(0.3)
    assert written["changed"]["nq"] == {"a_only": ["q0"], "b_only": ["q1", "q2", "q3", "q4"]}
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 5
    options = parser.parse_args([*words, "--output", str(tmp_path / "c.md")])
    options.run(options)
    assert (tmp_path / "c.md").read_text() == first  # the same seed, the same interval


def test_only_the_sets_that_are_compared_must_agree(tmp_path: Path):
    other = {"own": open_questions("own", 2, "Other question")}
    a = read_run(write_run(tmp_path / "a", {"nq": A, "own": [1, 0]}))
    b = read_run(write_run(tmp_path / "b", {"nq": B, "own": [1, 0]}, method="rag", benchmarks=other))
    with pytest.raises(ValueError, match="own: the runs answered different questions"):
        compare_runs(a, b)
    assert compare_runs(a, b, benchmarks=["nq"]).obstacles == ()
