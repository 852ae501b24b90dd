"""Trackers: what a run tells trackio, read back; and that one that fails does not end a run."""

import logging

import pandas
import pytest
import trackio
from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer
from trackio.sqlite_storage import SQLiteStorage

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.trackers import shown_rows


@pytest.fixture
def make(tmp_path, request):
    """A trainer that reports to trackio, in a project of the test's own."""
    folder = save_tiny_policy(tmp_path / "tiny")
    shared = {"report_to": "trackio", "project": request.node.name, "log_completions": True}
    shared |= {"num_completions_to_print": 0, "per_device_train_batch_size": 12, "save_strategy": "no"}

    def make_trainer(**settings):
        return tiny_trainer(folder, tmp_path / "my-run", BM25Retriever(PASSAGES), **shared | settings)

    return make_trainer


def test_a_run_can_be_read_back_and_goes_on_as_one(make, tmp_path, request, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: asked.append(address))
    first = make(max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    make(max_steps=3).train(resume_from_checkpoint=str(tmp_path / "my-run" / "checkpoint-2"))
    assert not asked  # no server; the Hub neither, with HF_HUB_OFFLINE=1
    [run] = trackio.Api().runs(request.node.name)
    assert run.name == "my-run"
    logs = SQLiteStorage.get_logs(request.node.name, "my-run")
    by_step = {log["step"]: log for log in logs if "train/loss" in log}
    assert list(by_step) == [1, 2, 3]
    for row in first.state.log_history[:2]:
        told = {name.removeprefix("train/"): value for name, value in by_step[row["step"]].items()}
        assert all(told[name] == pytest.approx(value) for name, value in row.items() if name != "step")
        assert None not in told.values()
    tables = {log["step"]: log["completions"]["_value"] for log in logs if "completions" in log}
    assert sorted(tables) == [1, 2, 3]
    assert {"question", "golden_answers", "predicted_answer", "is_probe", "trajectory", "advantage"} <= set(
        tables[3][0]
    )
    assert tables[3][0]["golden_answers"] == "oak" and "exact_match_reward" in tables[3][0]


def test_starting_anew_under_the_same_name_is_another_run(make, request):
    for _ in range(2):
        make(max_steps=1).train()
    assert [run.name for run in trackio.Api().runs(request.node.name)] == ["my-run", "my-run"]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_a_run(make, monkeypatch, caplog, failing):
    calls = []

    def fail(*_, **__):
        calls.append(failing)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackio, failing, fail)
    trainer = make(max_steps=4)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4 and 1 <= len(calls) <= 3
    said = [record.message for record in caplog.records if "No space left on device" in record.message]
    assert len(said) == 1 and "trackio" in said[0] and "test_trackers.py" in said[0]


def test_a_table_is_small_and_shows_probes_and_text_alone():
    rows = 500
    table = pandas.DataFrame(
        {
            "step": [3] * rows,
            "prompt": ["p"] * rows,
            "exact_match_reward": [float("nan")] * rows,
            "question": [f"q{row}" for row in range(rows)],
            "golden_answers": [["a", "\x1b[31mb"]] * rows,
            "predicted_answer": ["x\u202ey", None] * (rows // 2),
            "is_probe": [row % 5 == 4 for row in range(rows)],
            "trajectory": ["t\x00"] * rows,
            "advantage": [0.5] * rows,
        }
    )
    shown = shown_rows(table)
    assert len(shown) == 16 and shown["is_probe"].sum() == 8
    assert int(shown["question"].iloc[-1][1:]) > 400  # from all of the table
    assert set(shown["predicted_answer"]) == {"x\\u202ey", None}
    assert set(shown["golden_answers"]) == {"a; \\x1b[31mb"} and set(shown["trajectory"]) == {"t\\x00"}
    assert shown["exact_match_reward"].tolist() == [None] * 16 and "prompt" not in shown
    assert len(shown_rows(table[~table["is_probe"]])) == 16 and len(shown_rows(table[:3])) == 3
