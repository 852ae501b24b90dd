"""Runs as reports read them: scored, checked against their card, and honest about what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rex_rag.evaluation.finished import ReportError, read_run, run_directories
from rex_rag.evaluation.run_card import comparable, scorer_sha256
from rex_rag.rollout.script import RolloutBudget
from tests.evaluation.run_parts import open_questions, write_run


def test_a_run_is_scored(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", {"nq": [1, 0, 0, 0], "own": [1, 1]}))
    assert (run.method, run.model) == ("REX-RAG", "me/model-3B")
    assert run.scores["nq"].main.mean == 0.25
    assert run.scores["own"].main.mean == 1.0
    assert run.scores["nq"].seconds == 1.5
    assert run.missing == {}
    assert run.mean(["nq", "own"]).mean == pytest.approx(0.625)  # over questions it would be 3/6


def test_a_set_under_way_says_how_many_questions_are_missing(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", {"nq": [1] * 5, "own": [1, 0]}, unfinished={"nq": 3}))
    assert run.missing == {"nq": 2}
    assert run.missing_text == "nq: 2 of 5 questions missing"
    assert list(run.scores) == ["own"]
    assert run.mean(["nq", "own"]) is None
    assert run.mean(["own"]).mean == 0.5


def test_a_set_not_begun_is_missing_whole(tmp_path: Path):
    path = write_run(tmp_path / "a", {"nq": [1] * 5}, unfinished={"nq": 0})
    assert read_run(path).missing == {"nq": 5}


def test_predictions_of_other_questions_than_the_cards_are_refused(tmp_path: Path):
    path = write_run(tmp_path / "a", {"nq": [1, 0, 1]})
    file = path / "nq" / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    with pytest.raises(ReportError, match=r"holds 2 predictions that are not those of the 3 questions"):
        read_run(path)
    file.write_text("".join(lines).replace('["Lisbon"]', '["Oporto"]'))
    with pytest.raises(ReportError, match=r"holds 3 predictions that are not those of the 3 questions"):
        read_run(path)


def test_the_protocol_is_named_by_what_rows_must_share(tmp_path: Path):
    first = read_run(write_run(tmp_path / "a", {"nq": [1]}))
    same = read_run(write_run(tmp_path / "b", {"own": [1]}, method="rag", model="other"))
    other = read_run(write_run(tmp_path / "c", {"nq": [1]}, budget=RolloutBudget(top_k=5)))
    assert first.protocol == same.protocol != other.protocol
    assert len(first.protocol) == 12


def test_the_protocol_does_not_change_with_what_does_not_count(tmp_path: Path):
    """Where the corpus lies, and limits on searches for a method that makes none."""
    first = read_run(write_run(tmp_path / "a", {"nq": [1]}))
    moved = write_run(tmp_path / "b", {"nq": [1]})
    card = json.loads((moved / "run.json").read_text())
    card["retriever"]["description"] = "BM25 over copies/c.jsonl"
    (moved / "run.json").write_text(json.dumps(card))
    assert comparable(first.card, read_run(moved).card) == []
    assert read_run(moved).protocol == first.protocol
    direct, wider = (
        read_run(write_run(tmp_path / str(top_k), {"nq": [1]}, method="direct", budget=RolloutBudget(top_k=top_k)))
        for top_k in (3, 5)
    )
    assert comparable(direct.card, wider.card) == []
    assert direct.protocol == wider.protocol


def test_the_scorer_is_the_one_that_scored(tmp_path: Path):
    """Scores are worked out anew by every report, whatever scored when the run was made."""
    path = write_run(tmp_path / "a", {"nq": [1, 0]})
    card = json.loads((path / "run.json").read_text())
    card["scorer"]["sha256"] = "0" * 64
    (path / "run.json").write_text(json.dumps(card))
    assert read_run(path).card["scorer"]["sha256"] == scorer_sha256()


def test_a_directory_of_runs_names_them_all(tmp_path: Path):
    for name in ("b", "a"):
        write_run(tmp_path / "all" / name, {"nq": [1]})
    (tmp_path / "all" / "notes").mkdir()
    assert run_directories([tmp_path / "all"]) == [tmp_path / "all" / "a", tmp_path / "all" / "b"]
    with pytest.raises(ReportError, match="is named twice"):
        run_directories([tmp_path / "all", tmp_path / "all" / "a"])


def test_what_else_a_pattern_finds_is_left_out_with_a_note_as_long_as_one_run_is_there(tmp_path: Path):
    run = write_run(tmp_path / "a", {"nq": [1]})
    (tmp_path / "pictures").mkdir()
    (tmp_path / "table.csv").write_text("")
    said: list[str] = []
    assert run_directories(sorted(tmp_path.iterdir()), said.append) == [run]
    assert said == [f"left out, since no run is there (no run.json): {tmp_path}/pictures, {tmp_path}/table.csv"]
    assert run_directories([run], said.append) == [run] and len(said) == 1
    with pytest.raises(ReportError, match=r"pictures holds no run\.json"):
        run_directories([run, tmp_path / "pictures"])
    with pytest.raises(ReportError, match=r"pictures, \S+table\.csv hold no run\.json; name at least one"):
        run_directories([tmp_path / "pictures", tmp_path / "table.csv"], said.append)
    with pytest.raises(ReportError, match=r"nowhere holds no run\.json"):  # mistyped: no pattern finds it
        run_directories([run, tmp_path / "nowhere"], said.append)


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ReportError, match=r"holds no run\.json; name the directory that an evaluation wrote"):
        run_directories([tmp_path])
    with pytest.raises(ReportError, match=r"holds no run\.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ReportError, match="is not readable JSON"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ReportError, match="format 99"):
        read_run(tmp_path)


def test_ids_may_repeat_between_sets_but_questions_are_each_sets_own(tmp_path: Path):
    benchmarks = {"nq": open_questions("nq", 2), "own": open_questions("own", 2)}
    run = read_run(write_run(tmp_path / "a", {"nq": [1, 0], "own": [0, 0]}, benchmarks=benchmarks))
    assert run.scores["nq"].ids == run.scores["own"].ids == ("q0", "q1")
