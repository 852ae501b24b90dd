"""Where records come from: completion tables of training, predictions of an evaluation."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from rex_rag.evaluation.judge import read_judge
from rex_rag.evaluation.records import Prediction, Sample
from rex_rag.visualization.predictions import read_predictions
from rex_rag.visualization.records import (
    facts,
    first_of_each,
    headline,
    outcomes,
    read_completion_tables,
    read_records,
    searches_behind,
)

SEARCH = {"kind": "POLICY", "text": "<search> isle </search>"}
FOUND = {"kind": "INFORMATION", "text": "<information>Doc 1(Title: Isle) sea</information>"}


def policy(text: str) -> dict[str, str]:
    return {"kind": "POLICY", "text": text}


def write_table(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def row(
    segments: list[dict],
    answer: str | None,
    reward: float,
    probe: bool = False,
    question: str = "Q?",
    name="0.0",
    parent=None,
) -> dict:
    return {
        "step": 1,
        "question": question,
        "golden_answers": ["Man"],
        "predicted_answer": answer,
        "is_probe": probe,
        "exact_match_reward": reward,
        "segments": json.dumps(segments),
        "rollout": name,
        "parent": parent,
        "cut": None,
        "tool_uses": "[]",
    }


def write_predictions(folder: Path, *predictions: Prediction) -> None:
    folder.mkdir(parents=True)
    lines = (json.dumps(prediction.as_row()) + "\n" for prediction in predictions)
    (folder / "predictions.jsonl").write_text("".join(lines))


def sample(answer: str | None) -> Sample:
    return Sample(
        answer=answer,
        segments=[SEARCH, FOUND, policy(f"<answer>{answer}</answer>")],
        searches=[{"query": "isle", "passages": ["12"]}],
        tokens=7,
        invalid_actions=0,
        truncations={"turn": 2},
    )


def test_a_probe_names_the_original_it_was_cut_from(tmp_path):
    probe = {"kind": "PROBE", "text": "<think> Hm"}
    rows = [
        row([policy("<answer>Rum</answer>")], "Rum", 0.0, name="0.0"),
        row([policy("<answer>Skye</answer>")], "Skye", 1.0, name="1.0"),
        row([probe, policy("<answer>Man</answer>")], "Man", 1.0, probe=True, name="0.1", parent="0.0") | {"cut": 0},
        # Of another step, where nothing has that name.
        row([probe], None, 0.0, probe=True, name="0.1", parent="1.0") | {"step": 2},
    ]
    write_table(tmp_path / "completions_00001.parquet", rows)
    records = read_completion_tables(tmp_path)
    assert [record["parent"] for record in records] == [None, None, 0, None]
    assert not records[2]["rescue"]  # one original was right


def test_predictions_become_a_record_a_sample(tmp_path):
    write_predictions(
        tmp_path / "nq",
        Prediction("q1", "Which isle?", ("Man", "Isle of Man"), (sample("the Man."), sample("Wight"))),
        Prediction("q2", "Which letter?", ("B",), (sample(None),), choices={"A": "Skye", "B": "Man"}),
    )
    records = list(read_predictions(tmp_path))
    assert [(record["id"], record["answer"], record["reward"]) for record in records] == [
        ("q1", "the Man.", 1.0),
        ("q1", "Wight", 0.0),
        ("q2", None, 0.0),
    ]
    assert [record["sample"] for record in records] == ["1 of 2", "2 of 2", None]
    assert records[0]["benchmark"] == "nq"
    assert records[0]["notes"] == {"tokens written": "7", "cut (turn)": "2"}
    assert records[2]["choices"] == {"A": "Skye", "B": "Man"}
    assert [outcomes(record) for record in records] == [{"right"}, {"wrong"}, {"unanswered"}]


def test_a_letter_is_compared_as_a_letter(tmp_path):
    # As an open answer "A" would be an article, and normalised to nothing.
    choices = {"A": "Skye", "B": "Man"}
    write_predictions(
        tmp_path / "med",
        Prediction("1", "?", ("A",), (sample("A"),), choices=choices),
        Prediction("2", "?", ("A",), (sample("the"),), choices=choices),
    )
    assert [record["reward"] for record in read_predictions(tmp_path)] == [1.0, 0.0]


def test_an_evaluations_records_speak_of_right_and_wrong_and_of_letters(tmp_path):
    choices = {"A": "Skye", "B": "Man"}
    write_predictions(
        tmp_path / "med", Prediction("1", "?", ("B",), tuple(map(sample, ("(b)", "A or B", None))), choices)
    )
    write_predictions(tmp_path / "nq", Prediction("1", "?", ("Man",), tuple(map(sample, ("Man", "Skye", " ")))))
    records = list(read_predictions(tmp_path))
    assert [headline(record) for record in records] == ["right", "wrong", "no answer"] * 2
    shown = [dict(facts(record)) for record in records]
    assert [known.get("letter read") for known in shown] == [
        "B",
        "(none: the answer does not name one choice)",
        *[None] * 4,
    ]
    assert [known.get("accuracy") for known in shown] == ["1", "0", "0", None, None, None]
    assert [known.get("exact match") for known in shown] == [None, None, None, "1", "0", "0"]
    assert shown[0]["choices"] == "A) Skye\nB) Man" and "choices" not in shown[3]
    assert not any("reward" in known for known in shown)


def test_a_judges_verdicts_stand_beside_the_metric_as_far_as_there_are_any(tmp_path):
    answers = ("Man", "Isle of Man", "Skye", "Mull", None)
    write_predictions(tmp_path / "nq", Prediction("1", "?", ("Man",), tuple(map(sample, answers))))
    verdicts = (
        {"id": "1", "answer": answer, "score": score} for answer, score in zip(answers, (0, 1, 0), strict=False)
    )
    (tmp_path / "nq" / "judged.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    unnamed = read_predictions(tmp_path, read_judge=read_judge)
    assert {record["judged"] for record in unnamed} == {None}  # nobody knows whose they are
    (tmp_path / "judge.json").write_text(json.dumps({"model": "j", "prompt_sha256": "0", "settings": {}}))
    records, _ = read_records(tmp_path, read_judge=read_judge)
    assert [record["judged"] for record in records] == [False, True, False, None, None]
    assert [dict(facts(record)).get("judge") for record in records] == [
        "incorrect",
        "correct",
        "incorrect",
        None,
        None,
    ]
    assert [outcomes(record) for record in records] == [
        {"right", "disputed"},
        {"wrong", "disputed"},
        {"wrong"},
        {"wrong"},
        {"unanswered"},
    ]


def test_of_a_benchmark_under_way_the_finished_chunks_are_read_in_order(tmp_path):
    for number in (10, 2):
        write_predictions(tmp_path / "nq" / "chunks" / "x", Prediction(str(number), "?", ("Man",), (sample("Man"),)))
        (tmp_path / "nq" / "chunks" / "x" / "predictions.jsonl").rename(
            tmp_path / "nq" / "chunks" / f"{number:06d}.jsonl"
        )
        (tmp_path / "nq" / "chunks" / "x").rmdir()
    (tmp_path / "nq" / "chunks" / "000002.timing.json").write_text("{}")
    assert [(record["benchmark"], record["id"]) for record in read_predictions(tmp_path)] == [
        ("nq", "2"),
        ("nq", "10"),
    ]
    # Merged, but killed before the chunks were removed.
    write_line = (tmp_path / "nq" / "chunks" / "000002.jsonl").read_text()
    (tmp_path / "nq" / "predictions.jsonl").write_text(write_line)
    assert [record["id"] for record in read_predictions(tmp_path)] == ["2"]


def test_one_folder_may_hold_training_and_evaluation(tmp_path):
    write_table(tmp_path / "completions" / "completions_00001.parquet", [row([SEARCH], "x", 0.0)])
    write_predictions(tmp_path / "nq", *(Prediction(str(i), "?", ("Man",), (sample("Man"),)) for i in range(3)))
    write_predictions(tmp_path / "popqa", *(Prediction(str(i), "?", ("Man",), (sample("x"),)) for i in range(3)))

    def shown(**chosen):
        records, total = read_records(tmp_path, **chosen)
        return [(record.get("benchmark"), record.get("id")) for record in records], total

    assert shown()[1] == 7
    assert shown(step=1) == ([(None, None)], 1)
    assert shown(benchmark="popqa") == ([("popqa", "0"), ("popqa", "1"), ("popqa", "2")], 3)
    # Each part gives its first ones.
    assert shown(limit=4) == ([(None, None), ("nq", "0"), ("nq", "1"), ("popqa", "0")], 7)
    one_file, total = read_records(tmp_path / "nq" / "predictions.jsonl")
    assert (len(one_file), total) == (3, 3)
    with pytest.raises(ValueError, match="no benchmark 'triviaqa'; it has nq, popqa"):
        read_records(tmp_path, benchmark="triviaqa")
    with pytest.raises(ValueError, match="give one of them"):
        read_records(tmp_path, step=1, benchmark="nq")


def test_no_more_tables_are_read_than_can_be_shown(tmp_path):
    for step in range(1, 41):
        rows = [row([policy("x" * 50_000)], "x", 0.0) | {"step": step}] * 5
        write_table(tmp_path / f"completions_{step:05}.parquet", rows)
    read_records(tmp_path, step=1)  # what importing takes is not counted
    tracemalloc.start()
    try:
        records, total = read_records(tmp_path, limit=7)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ([record["step"] for record in records], total) == ([1] * 5 + [2] * 2, 200)
    assert peak < 2_000_000  # two tables hold 500,000 characters, all of them ten million
    assert [record["step"] for record in read_records(tmp_path, step=39, limit=7)[0]] == [39] * 5
    with pytest.raises(ValueError, match="no completions of step 41; it has those of steps 1 to 40"):
        read_records(tmp_path, step=41)


def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither completion tables nor predictions\.jsonl at"):
        read_records(tmp_path)
    good = Prediction("1", "?", ("Man",), (sample("Man"),))
    write_predictions(tmp_path / "nq", good)
    with (tmp_path / "nq" / "predictions.jsonl").open("a") as file:
        file.write('{"id": "2", "question": "?"}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2: not a prediction \(KeyError: 'samples'\)"):
        read_records(tmp_path)


def test_a_cut_list_keeps_parents_that_are_in_it():
    records = [{"parent": None}, {"parent": 3}, {"parent": None}, {"parent": None}, {"parent": 2}]
    assert [record["parent"] for record in first_of_each(records, 3)] == [None, None, None]
    mixed = [{"parent": None, "benchmark": "a"}] * 2 + [
        {"parent": None, "benchmark": "b"},
        {"parent": 2, "benchmark": "b"},
    ]
    assert first_of_each(mixed, 3) == [mixed[0], mixed[1], mixed[2]]
    assert first_of_each(mixed, 4)[3]["parent"] == 2
    # Taken are numbers 0, 1 and 3, so number 3 has moved to place 2.
    moved = [
        {"parent": 3, "benchmark": "a"},
        *[{"parent": None, "benchmark": "b"}] * 2,
        {"parent": None, "benchmark": "c"},
    ]
    assert [record["parent"] for record in first_of_each(moved, 3)] == [2, None, None]


def test_a_call_stands_behind_the_text_that_it_brought():
    # As IRCoT leaves it whose second search found nothing new: the third's text must not pass for the second's.
    segments = [FOUND, policy("Hm."), policy("So."), FOUND]
    asked = [
        {"query": query, "passages": [name], "segment": place}
        for query, name, place in (("q", "a", 0), ("Hm.", "a", 2), ("So.", "c", 3))
    ]
    record = {"question": "q", "segments": segments, "searches": asked}
    assert searches_behind(record) == {0: [asked[0]], 3: [asked[2]]}
    assert dict(facts(record))["searches"] == "1. q (passage ids a)\n2. Hm. (passage ids a)\n3. So. (passage ids c)"
    assert "searches" not in dict(facts({**record, "searches": [asked[0], asked[2]]}))
    asked[1]["passages"] = []
    assert "2. Hm. (no passages)" in dict(facts(record))["searches"]
    assert searches_behind({"segments": segments}) == {}
