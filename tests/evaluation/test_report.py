"""Tables over runs: figures by hand, marks on everything that does not belong together."""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rex_rag.commands.evaluate import score_table
from rex_rag.commands.report import add_report
from rex_rag.evaluation.benchmarks import Benchmark
from rex_rag.evaluation.published import BENCHMARKS
from rex_rag.evaluation.records import Question
from rex_rag.evaluation.report import build_report, load_runs
from rex_rag.evaluation.report_formats import as_csv, as_latex, as_markdown
from rex_rag.evaluation.run import score_run
from rex_rag.rollout.script import RolloutBudget
from tests.evaluation.run_parts import open_questions, sample, write_run


def lines_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, padding removed."""
    table = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_the_markdown_table_by_hand(tmp_path: Path):
    # All right and all wrong have intervals without width, whatever is drawn.
    write_run(tmp_path / "a", {"own": [1, 1, 1, 1], "two": [0, 0]})
    write_run(tmp_path / "b", {"own": [0, 0, 0, 0], "two": [1, 1]}, method="rag", model="base")
    text = as_markdown(build_report(load_runs([tmp_path])))
    head, rule, first, second = lines_of(text)
    assert head == ["method", "model", "own (n=4)", "two (n=2)", "mean"]
    assert [cell.strip("-") for cell in rule] == ["", "", ":", ":", ":"]
    assert first == ["REX-RAG", "me/model-3B", "100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]", "50.0 [50.0, 50.0]"]
    assert second == ["RAG", "base", "0.0 [0.0, 0.0]", "100.0 [100.0, 100.0]", "50.0 [50.0, 50.0]"]
    assert "scorer rex_rag.answers" in text and "BM25 over c.jsonl, top 3" in text and "greedy" in text
    assert "published" not in text  # the runs share no set with the paper


def test_the_interval_is_the_bootstraps(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1] * 40 + [0] * 60})
    [run] = load_runs([tmp_path / "a"])
    cell = build_report([run]).rows[0].cells["own"].estimate
    # Normal approximation: 0.40 +- 1.96 x sqrt(0.4 x 0.6 / 100) = 0.304 to 0.496.
    assert cell.mean == 0.4
    assert cell.low == pytest.approx(0.304, abs=0.012)
    assert cell.high == pytest.approx(0.496, abs=0.012)


def test_an_interval_without_width_is_explained(tmp_path: Path):
    for name, answers in (("some", [1, 0]), ("none", [0, 0]), ("all", [1, 1])):
        write_run(tmp_path / name, {"own": answers})
        text = as_markdown(build_report(load_runs([tmp_path / name])))
        assert ("rule of three" in text) is (name != "some")


def seven(value: int) -> dict[str, list[int]]:
    return {name: [value, value] for name in BENCHMARKS}


def test_published_rows_stand_below_marked_and_of_the_models_size(tmp_path: Path):
    write_run(tmp_path / "a", seven(1), model="Qwen/Qwen2.5-3B-Instruct")
    report = build_report(load_runs([tmp_path / "a"]))
    assert [row.published for row in report.rows] == [False] + [True] * 13
    assert {row.model for row in report.rows[1:]} == {"Qwen2.5-3B"}
    text = as_markdown(report)
    head, _, ours, *theirs = lines_of(text)
    assert head[-2:] == ["mean", "mean without Bamboogle"]
    assert ours[-2:] == ["100.0 [100.0, 100.0]"] * 2
    # (43.9 + 60.4 + 44.2 + 37.4 + 39.7 + 14.5) / 6 = 40.02
    assert theirs[7] == [
        "REX-RAG (published) (a)",
        "Qwen2.5-3B",
        *(f"*{value:.1f}*" for value in (43.9, 60.4, 44.2, 37.4, 39.7, 14.5, 31.2, 38.7, 40.0)),
    ]
    assert theirs[10] == ["GiGPO (published) (d)", "Qwen2.5-3B", *["–"] * 7, "*42.1*", "–"]
    assert (
        "- (a) as published in arXiv:2508.08149v2, table 1; not produced under the protocol of the runs\n"
        "- (b) as printed; the cells of this row have the mean 25.9\n"
        "- (c) as published in arXiv:2509.21240, README of github.com/AMAP-ML/Tree-GRPO; not produced under the "
        "protocol of the runs; of another protocol than the published rows without this footnote: two models,"
    ) in text


def test_the_mean_without_the_small_set_needs_two_others(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1, 0], "nq": [0, 0], "bamboogle": [1, 1]})
    write_run(tmp_path / "b", {"nq": [0, 1], "bamboogle": [1, 1]})
    [row] = build_report(load_runs([tmp_path / "a"]), published=[]).rows
    assert (row.mean.estimate.mean, row.mean_of_large.estimate.mean) == (0.5, 0.25)
    report = build_report(load_runs([tmp_path / "b"]), published=[])
    assert report.rows[0].mean_of_large is None and list(report.means) == ["mean"]
    assert "Bamboogle" not in report.remarks[1]


def test_a_printed_mean_that_does_not_follow_is_marked(tmp_path: Path):
    write_run(tmp_path / "a", seven(1))
    report = build_report(load_runs([tmp_path / "a"]), published=["3B"])
    assert lines_of(as_markdown(report))[3][-2:] == ["*27.0 (b)*", "*30.1*"]
    assert report.notes["b"] == "as printed; the cells of this row have the mean 25.9"


def test_published_rows_of_other_sets_than_the_papers_have_no_mean(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1], "bamboogle": [1, 0], "nq": [0]}, model="me/model")
    report = build_report(load_runs([tmp_path / "a"]))
    assert [column.name for column in report.columns] == ["nq", "bamboogle", "own"]
    assert {row.model for row in report.rows if row.published} == {"Qwen2.5-3B", "Qwen2.5-7B"}
    assert all(row.mean is None for row in report.rows if row.published)
    [last] = [line for line in lines_of(as_markdown(report)) if line[:2] == ["REX-RAG (published) (a)", "Qwen2.5-7B"]]
    assert last[2:] == ["*45.5*", "*44.8*", "–", "–", "–"]


def test_published_rows_can_be_chosen_or_left_out(tmp_path: Path):
    write_run(tmp_path / "a", {"nq": [1]}, model="x-3B")
    runs = load_runs([tmp_path / "a"])
    assert len(build_report(runs, published=[]).rows) == 1
    assert {row.model for row in build_report(runs, published=["7B"]).rows[1:]} == {"Qwen2.5-7B"}
    with pytest.raises(ValueError, match="no rows for '72B'"):
        build_report(runs, published=["72B"])


@pytest.fixture
def unlike(tmp_path: Path) -> list[Path]:
    """Two searches with unlike retrievers, and a method that never searches between them."""
    return [
        write_run(tmp_path / "three", {"own": [1, 0]}),
        write_run(tmp_path / "direct", {"own": [1, 1]}, method="direct"),
        write_run(tmp_path / "five", {"own": [0, 0]}, method="rag", budget=RolloutBudget(top_k=5), corpus="b"),
    ]


def test_rows_of_different_protocols_are_refused_naming_what_differs(unlike: list[Path]):
    with pytest.raises(ValueError, match=r"five is not comparable with \S+three: top_k: 3 against 5; retriever"):
        build_report(load_runs(unlike))
    # Neither differs from the method that never searches: all pairs have to be looked at.
    with pytest.raises(ValueError, match="cannot stand in one table"):
        build_report(load_runs([unlike[1], unlike[0], unlike[2]]))
    assert len(build_report(load_runs(unlike[:2])).rows) == 2


def test_each_run_that_differs_is_named_once(tmp_path: Path):
    """The third is like the first: it is not held against the second, which differs."""
    wide = RolloutBudget(top_k=5)
    runs = [
        write_run(tmp_path / "a", {"own": [1, 0]}),
        write_run(tmp_path / "b", {"own": [1, 1]}, method="rag", budget=wide),
        write_run(tmp_path / "c", {"own": [0, 0]}, method="ircot"),
        write_run(tmp_path / "d", {"own": [0, 0]}, method="search_r1", budget=wide),
    ]
    with pytest.raises(ValueError) as refused:
        build_report(load_runs(runs))
    named = [line.split(":")[0] for line in str(refused.value).splitlines()[1:-1]]
    assert named == [f"  {tmp_path}/{name} is not comparable with {tmp_path}/a" for name in "bd"]


def test_rows_of_different_protocols_get_a_footnote_when_asked(unlike: list[Path]):
    text = as_markdown(build_report(load_runs(unlike), mark=True))
    assert [line[0] for line in lines_of(text)[2:]] == ["REX-RAG", "Direct answer", "RAG (a)"]
    assert "- (a) not comparable with row 1: top_k: 3 against 5; retriever (fingerprint): a against b" in text


def test_footnotes_compare_with_the_first_row(tmp_path: Path):
    """The second row's difference is its own: a third row that is like the first has no mark."""
    runs = [
        write_run(tmp_path / "a", {"own": [1, 0]}),
        write_run(tmp_path / "b", {"own": [1, 1]}, method="rag", budget=RolloutBudget(top_k=5)),
        write_run(tmp_path / "c", {"own": [0, 0]}, method="ircot"),
    ]
    report = build_report(load_runs(runs), mark=True)
    assert [row.marks for row in report.rows] == [(), ("a",), ()]
    assert report.notes == {"a": "not comparable with row 1: top_k: 3 against 5"}


def test_rows_without_a_footnote_can_be_compared_with_each_other(tmp_path: Path):
    """A first row that never searches is comparable with both searches below it, which are not with each other."""
    runs = [
        write_run(tmp_path / "a", {"own": [1, 0]}, method="direct"),
        write_run(tmp_path / "b", {"own": [1, 1]}),
        write_run(tmp_path / "c", {"own": [0, 0]}, method="rag", corpus="b"),
        write_run(tmp_path / "d", {"own": [0, 0]}, method="ircot"),
    ]
    report = build_report(load_runs(runs), mark=True)
    assert [row.marks for row in report.rows] == [(), (), ("a",), ()]
    assert report.notes == {"a": "not comparable with row 2: retriever (fingerprint): a against b"}
    [protocol] = [remark for remark in report.remarks if remark.startswith("Protocol")]
    assert "BM25 over c.jsonl, top 3" in protocol


def test_other_questions_of_the_same_set_are_another_protocol(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1, 0]})
    write_run(tmp_path / "b", {"own": [1, 0]}, benchmarks={"own": open_questions("own", 2, "Other question")})
    with pytest.raises(ValueError, match=r"benchmarks\.own\.sha256"):
        build_report(load_runs([tmp_path]))


def test_runs_that_are_not_whole_are_refused_or_marked(tmp_path: Path):
    write_run(tmp_path / "a", {"nq": [1] * 5, "own": [1, 1]}, unfinished={"nq": 2})
    runs = load_runs([tmp_path / "a"])
    with pytest.raises(ValueError, match="a is not whole: nq: 3 of 5 questions missing\nfinish them"):
        build_report(runs)
    report = build_report(runs, mark=True, published=[])
    text = as_markdown(report)
    assert lines_of(text)[2] == ["REX-RAG (a)", "me/model-3B", "–", "100.0 [100.0, 100.0]", "–"]
    assert "- (a) not whole, so without a mean: nq: 3 of 5 questions missing" in text


def test_sets_that_only_one_run_has_leave_the_others_without_a_mean(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1], "two": [1]})
    write_run(tmp_path / "b", {"own": [0]}, method="rag")
    first, second = build_report(load_runs([tmp_path])).rows
    assert first.mean.estimate.mean == 1.0
    assert second.mean is None


def test_a_subset_says_so_at_the_head_of_its_column(tmp_path: Path):
    part = replace(open_questions("own", 2), size=1200, subset="2 of 1200 questions, seed 0")
    write_run(tmp_path / "a", {"own": [1, 0]}, benchmarks={"own": part})
    assert lines_of(as_markdown(build_report(load_runs([tmp_path / "a"]))))[0][2] == "own (n=2 of 1,200)"


def test_n_stands_in_the_cells_where_runs_differ(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1, 1]})
    write_run(tmp_path / "b", {"own": [0, 0, 0]}, method="rag")
    head, _, first, second = lines_of(as_markdown(build_report(load_runs([tmp_path]), mark=True)))
    assert head[2] == "own"
    assert (first[2], second[2]) == ("100.0 [100.0, 100.0] (n=2)", "0.0 [0.0, 0.0] (n=3)")


def test_extra_columns_by_hand(tmp_path: Path):
    search = {"query": "q", "passages": ["1"]}
    one = sample("Lisbon, Portugal", searches=[search, search], tokens=30, truncations={"turn": 1})
    two = sample(None, tokens=10, invalid_actions=3, truncations={"turn": 1, "sequence": 1})
    write_run(tmp_path / "a", {"own": [one, two], "two": [1, 1, 1, 1]})
    names = ["f1", "sub_match", "searches", "tokens", "seconds", "invalid", "truncations", "unanswered"]
    [row] = build_report(load_runs([tmp_path / "a"]), extras=[*names, "pass_at_k", "majority"]).rows
    values = {name: extra.value for name, extra in row.extras.items()}
    assert values["f1"] == pytest.approx(100 * ((2 / 3 + 0) / 2 + 1) / 2)  # own: precision 1/2, recall 1 on one of two
    assert values["sub_match"] == pytest.approx(100 * (0.5 + 1) / 2)
    assert values["searches"] == pytest.approx(2 / 6)
    assert values["tokens"] == pytest.approx((30 + 10 + 4 * 10) / 6)
    assert values["seconds"] == 3.0
    assert values["invalid"] == pytest.approx(3 / 6)
    assert values["truncations"] == "sequence 1, turn 2"
    assert values["unanswered"] == pytest.approx(100 / 6)
    assert "pass_at_k" not in values and "majority" not in values  # one sample a question


def test_several_samples_are_means_with_pass_at_k_and_majority(tmp_path: Path):
    answers = {"own": [[1, 1, 0, 1], [0, 0, 0, 1]]}
    write_run(tmp_path / "a", answers, temperature=1.0)
    report = build_report(load_runs([tmp_path / "a"]), extras=["pass_at_k", "majority"])
    [row] = report.rows
    assert row.cells["own"].estimate.mean == 0.5
    assert row.extras["pass_at_k"].text == "100.0 (k=4)"
    assert row.extras["majority"].value == 50.0
    assert "Samples a question: 4; scores are means over them." in report.remarks


def test_multiple_choice_is_accuracy_and_has_no_f1(tmp_path: Path):
    question = Question("m0", "Which?", ("B",), {"A": "one", "B": "two"})
    benchmark = Benchmark("choice", "multiple_choice", (question,), "choice.jsonl", 1)
    write_run(tmp_path / "a", {"choice": [sample("(b)")]}, benchmarks={"choice": benchmark})
    report = build_report(load_runs([tmp_path / "a"]), extras=["f1"])
    assert report.rows[0].cells["choice"].estimate.mean == 1.0
    assert report.rows[0].extras == {}
    assert "Exact match in per cent (choice: accuracy of the letter)" in report.remarks[0]
    assert next(csv.reader(io.StringIO(as_csv(report))))[4:6] == ["choice_n", "choice_accuracy"]


def test_answers_that_name_no_choice_are_counted_over_the_multiple_choice_sets(tmp_path: Path):
    questions = tuple(Question(f"m{n}", f"Which {n}?", ("B",), {"A": "one", "B": "two"}) for n in range(4))
    benchmark = Benchmark("choice", "multiple_choice", questions, "choice.jsonl", 4)
    answers = [sample("B"), sample("A or B"), sample(None), sample("A")]
    path = write_run(tmp_path / "a", {"choice": answers, "nq": [0, 0]}, benchmarks={"choice": benchmark})
    [run] = load_runs([path])
    report = build_report([run], extras=["unreadable", "unanswered"])
    assert report.rows[0].extras["unreadable"].text == "25.0"  # one of four; the two open questions do not count
    assert report.rows[0].extras["unanswered"].text == "16.7"  # one of six
    table = score_table(score_run(path))
    assert table.splitlines()[0].split()[-3:] == ["unanswered", "unreadable", "seconds"]
    assert "25.0 %" in table


HOSTILE = "a|b_<script>&$x\\input{y}"


def test_names_are_escaped_in_every_form(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1]}, model=HOSTILE)
    report = build_report(load_runs([tmp_path / "a"]))
    assert lines_of(as_markdown(report))[2][1] == r"a\|b\_&lt;script&gt;&amp;\$x\\input{y}"
    assert r"a\textbar{}b\_\textless{}script\textgreater{}\&\$x\textbackslash{}input\{y\}" in as_latex(report)
    assert list(csv.reader(io.StringIO(as_csv(report))))[1][1] == HOSTILE


def test_published_rows_that_share_no_column_are_left_out(tmp_path: Path):
    runs = load_runs([write_run(tmp_path / "a", {"own": [1]})])
    assert len(build_report(runs, published=["3B", "7B"]).rows) == 1


def test_every_line_of_the_markdown_table_has_as_many_cells_as_its_head(tmp_path: Path):
    write_run(tmp_path / "a", seven(1), model=HOSTILE)
    text = as_markdown(build_report(load_runs([tmp_path / "a"]), extras=["f1", "truncations"]))
    assert {len(line) for line in lines_of(text)} == {13}
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1  # padded to one width


def test_the_csv_holds_numbers(tmp_path: Path):
    path = write_run(tmp_path / "a", {"nq": [1, 1], "own": [0]})
    report = build_report(load_runs([path]), extras=["tokens", "truncations"], published=["3B"])
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert len(rows) == 11  # rows of a mean alone need all seven sets
    ours, theirs = rows[0], rows[8]
    assert (ours["method"], ours["source"], ours["nq_n"], ours["nq_em"], ours["nq_low"]) == (
        "REX-RAG",
        str(path),
        "2",
        "100.0",
        "100.0",
    )
    assert (ours["own_em"], ours["mean"], ours["tokens"], ours["truncations"]) == ("0.0", "50.0", "10.0", "none")
    assert (theirs["source"], theirs["nq_n"], theirs["nq_em"], theirs["nq_low"]) == ("published", "", "43.9", "")
    assert theirs["notes"] == (
        "as published in arXiv:2508.08149v2, table 1; not produced under the protocol of the runs"
    )
    assert report.remarks[-1].startswith("Published rows: Qwen2.5 of the size named, E5-base-v2"), "said once, below"


def test_the_csv_holds_the_intervals_that_markdown_shows(tmp_path: Path):
    report = build_report(load_runs([write_run(tmp_path / "a", {"own": [1, 1, 0, 0]})]), extras=["f1", "tokens"])
    head, row = csv.reader(io.StringIO(as_csv(report)))
    assert head[-5:] == ["f1", "f1_low", "f1_high", "tokens", "notes"]
    shown = "{:.1f} [{:.1f}, {:.1f}]".format(*map(float, row[-5:-2]))
    assert shown == lines_of(as_markdown(report))[2][3] == "50.0 [0.0, 100.0]"
    # Where a run has no such figure, the columns stay.
    question = Question("m0", "Which?", ("B",), {"A": "one", "B": "two"})
    choice = Benchmark("choice", "multiple_choice", (question,), "choice.jsonl", 1)
    path = write_run(tmp_path / "b", {"choice": [sample("B")]}, benchmarks={"choice": choice})
    head, row = csv.reader(io.StringIO(as_csv(build_report(load_runs([path]), extras=["f1"]))))
    assert len(head) == len(row) and row[-4:-1] == ["", "", ""]


def test_document_recall_of_a_set_that_names_documents(tmp_path: Path):
    questions = tuple(Question(f"q{n}", f"Which {n}?", ("Lisbon",), documents=("d1", "d2")) for n in range(2))
    own = Benchmark("own", "open", questions, "own.jsonl", 2)
    found = sample("Oporto", searches=[{"query": "q", "passages": ["d2", "x"], "segment": 0}])
    path = write_run(tmp_path / "a", {"own": [found, found]}, benchmarks={"own": own})
    [run] = load_runs([path])
    [row] = build_report([run], extras=["document_recall"]).rows
    assert (row.cells["own"].estimate.mean, row.extras["document_recall"].text) == (0.0, "50.0 [50.0, 50.0]")
    assert "documents  searches" in score_table(run.scores)
    plain = write_run(tmp_path / "b", {"own": [1]})
    [row] = build_report(load_runs([plain]), extras=["document_recall"]).rows
    assert "document_recall" not in row.extras


def test_the_latex_table(tmp_path: Path):
    write_run(tmp_path / "a", {"nq": [1, 1], "own_set": [0]})
    text = as_latex(build_report(load_runs([tmp_path / "a"]), published=["3B"]))
    assert r"method & model & NQ (n=2) & own\_set (n=1) & mean \\" in text
    ours = r"REX-RAG & me/model-3B & 100.0 {\scriptsize [100.0, 100.0]} & 0.0 {\scriptsize [0.0, 0.0]} & 50.0"
    assert ours in text
    assert r"REX-RAG (published)$^{a}$ & Qwen2.5-3B & 43.9 & -- & -- \\" in text
    assert text.count(r"\midrule") == 2
    assert text.count("{") == text.count("}")
    caption, label = (
        r"\caption{Exact match in per cent, in brackets the 95 \% bootstrap interval over questions.}",
        "\\label",
    )
    assert f"{caption}\n{label}{{tab:results}}\n\\begin{{tabular}}" in text
    [note] = [line for line in text.splitlines() if line.startswith(r"\parbox")]
    assert r"$^{a}$as published in arXiv:2508.08149v2" in note and "Protocol (" in note


def test_two_runs_of_one_method_and_model_are_told_apart(tmp_path: Path):
    for name in ("greedy", "again"):
        write_run(tmp_path / name, {"own": [1]})
    rows = lines_of(as_markdown(build_report(load_runs([tmp_path]))))[2:]
    assert [row[1] for row in rows] == ["me/model-3B, run again", "me/model-3B, run greedy"]


def test_an_unknown_column_and_no_run_are_refused(tmp_path: Path):
    write_run(tmp_path / "a", {"own": [1]})
    with pytest.raises(ValueError, match="there is no column 'bleu'; choose from f1, sub_match"):
        build_report(load_runs([tmp_path / "a"]), extras=["bleu"])
    with pytest.raises(ValueError, match="no run to report"):
        build_report([])


def run_command(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_report(parser.add_subparsers())
    options = parser.parse_args(["report", *words])
    options.run(options)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = str(write_run(tmp_path / "a", {"nq": [1, 1]}))
    run_command(path, "--published", "none", "--columns", "tokens,seconds")
    head, _, row = lines_of(capsys.readouterr().out)
    assert head == ["method", "model", "NQ (n=2)", "tokens", "seconds"]
    assert row == ["REX-RAG", "me/model-3B", "100.0 [100.0, 100.0]", "10", "1.5"]
    run_command(path, "--format", "csv", "--output", str(tmp_path / "t.csv"), "--resamples", "200")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "t.csv").read_text().startswith("method,model,source,protocol,nq_n,")


def test_the_command_leaves_out_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "a", {"nq": [1, 1]})
    (tmp_path / "notes\x1b[2J").mkdir()
    run_command(*map(str, sorted(tmp_path.iterdir())), "--published", "none")
    printed = capsys.readouterr()
    assert len(lines_of(printed.out)) == 3
    assert printed.err == f"note: left out, since no run is there (no run.json): {tmp_path}/notes [2J\n"


def test_the_command_writes_the_model_card(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = str(write_run(tmp_path / "a", {"nq": [1, 1]}))
    run_command(path, "--model-card", str(tmp_path / "README.md"))
    result = ModelCard.load(tmp_path / "README.md").data.eval_results[0]
    assert (result.dataset_config, result.metric_type, result.metric_value) == ("nq", "exact_match", 100.0)


def test_the_card_is_not_touched_where_the_table_is_refused(unlike: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match="cannot stand in one table"):
        run_command(*map(str, unlike), "--model-card", str(tmp_path / "README.md"))
    assert not (tmp_path / "README.md").exists()
