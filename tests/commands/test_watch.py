"""`rex-rag watch` tells of a run from its folder: under way, finished, copied, broken, with escape sequences in it."""

import json
import shutil

import pytest
from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer
from transformers import TrainerCallback

from rex_rag.cli import main
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.support.run_log import LOG_FILE, read_log
from rex_rag.visualization.curves import read_log_history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    settings = {"per_device_train_batch_size": 18, "max_turns": 1, "retrieval_top_k": 1, "max_steps": 3}
    settings |= {"save_steps": 2, "log_completions": True, "num_completions_to_print": 0}
    trainer = tiny_trainer(save_tiny_policy(root / "tiny"), root / "out", BM25Retriever(PASSAGES), **settings)
    trainer.train()
    return root / "out", trainer


def test_the_log_holds_every_row_as_it_came(run):
    folder, trainer = run
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [row["step"] for row in trainer.state.log_history]
    assert all({**written, **row} == written for written, row in zip(rows, trainer.state.log_history, strict=True))
    assert rows[0]["max_steps"] == 3 and rows[0]["time"] <= rows[1]["time"]


def test_a_resumed_run_goes_on_with_the_rows_of_its_checkpoint(run, tmp_path):
    folder, trainer = run
    shutil.copytree(folder, tmp_path / "out")
    trainer.args.output_dir = str(tmp_path / "out")
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    trained = [row["step"] for row in read_log(tmp_path / "out") if "loss" in row]
    assert trained == [1, 2, 3]


def test_steps_health_and_trajectories_are_shown(run, tmp_path, capsys):
    folder, _ = run
    copied = shutil.copytree(folder, tmp_path / "copied")
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(copied / name, ignore_errors=True)
    assert main(["watch", str(copied), "--steps", "2", "--trajectories", "1"]) == 0
    said = capsys.readouterr().out
    assert "step 3 of 3, done" in said and "health: all figures within bounds" in said
    table = said.split("\n\n")[1].splitlines()
    assert len(table) == 3 and table[0].split()[0] == "step" and [line.split()[0] for line in table[1:]] == ["2", "3"]
    assert said.count("=== #") == 1 and "[POLICY]" in said


def test_a_run_under_way_and_a_broken_one(run, tmp_path, capsys):
    rows = read_log(run[0])[:3]
    broken = rows + [{**rows[-1], "step": step, "kl/policy": 2.5} for step in (4, 5)]
    lines = [json.dumps(row) for row in broken]
    (tmp_path / LOG_FILE).write_text("\n".join(lines) + '\n{"loss": 0.')  # the last is being written
    assert main(["watch", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "step 5 of 3" in said and "health: OUT OF BOUNDS since step 4: kl/policy 2.5 (was " in said
    assert len(read_log_history(tmp_path)) == 5


class Looking(TrainerCallback):
    """Looks at a run from outside before its first step and behind it, while it holds no checkpoint."""

    def __init__(self, folder, capsys) -> None:
        self.folder, self.capsys, self.seen = folder, capsys, []

    def look(self) -> None:
        said = []
        for words in (["watch"], ["curves", "--output", str(self.folder / "c.png")], ["view"]):
            self.capsys.readouterr()
            code = main([words[0], str(self.folder), *words[1:]])
            said.append((code, "".join(self.capsys.readouterr())))
        self.seen.append(said)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step < 2:
            self.look()


def test_a_run_is_looked_at_before_its_first_checkpoint(tmp_path, capsys):
    settings = {"per_device_train_batch_size": 18, "max_turns": 1, "max_steps": 2, "log_completions": True}
    policy, retriever = save_tiny_policy(tmp_path / "tiny"), BM25Retriever(PASSAGES)
    trainer = tiny_trainer(policy, tmp_path / "out", retriever, save_strategy="no", **settings)
    looking = Looking(tmp_path / "out", capsys)
    trainer.add_callback(looking)
    trainer.train()
    (watch, curves, view), (watch_later, curves_later, view_later) = looking.seen
    assert watch == (0, f"{tmp_path / 'out'}: no step is logged yet\n\n")
    assert curves[0] == 2 and "no step is logged yet" in curves[1]
    assert view[0] == 2 and "the first after logging_steps steps" in view[1]
    assert watch_later[0] == curves_later[0] == view_later[0] == 0
    assert "step 1 of 2" in watch_later[1] and "rows logged: out 1" in curves_later[1]
    shown = view_later[1].partition(": ")[2].split()
    assert shown[0] == shown[2] and int(shown[0]) > 6


def test_a_table_that_is_being_written_is_left_out(run, tmp_path, capsys):
    copied = shutil.copytree(run[0], tmp_path / "copied")
    newest = max((copied / "completions").glob("*.parquet"))
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main(["view", str(copied)]) == 0 and "trajectories" in capsys.readouterr().out
    assert main(["watch", str(copied)]) == 0 and "[POLICY]" in capsys.readouterr().out


def test_no_run_and_a_changed_log_are_said(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "name a training run's output directory" in capsys.readouterr().err
    (tmp_path / LOG_FILE).write_text("nonsense\n")
    assert main(["watch", str(tmp_path)]) == 2
    assert f"{LOG_FILE}, line 1: no JSON object" in capsys.readouterr().err
