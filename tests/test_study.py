"""The figures of a study's tables, from lines written by hand, and what makes a run another one."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
from trl import TrlParser

from rex_rag.training.recipe import RECIPE_PARTS

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("study", ROOT / "scripts" / "study.py")
study = importlib.util.module_from_spec(spec)
sys.modules["study"] = study  # dataclasses look their module up
spec.loader.exec_module(study)

LINE = {
    "columns": ["step", *study.LOGGED],
    "steps": [[1, 0.1, 1.0, None, 1.0, 0.0, 200.0], [2, 0.2, 0.9, 0.5, 1.1, 0.1, 300.0]],
    "evaluated": [[0, 0.95, 0.0], [1, 0.9, 0.5], [2, 0.92, 0.4]],
}


def test_a_runs_figures():
    assert study.summary(LINE) == {
        "two_hop_last": 0.4,
        "two_hop_mean": pytest.approx(0.3),
        "one_hop_lowest": 0.9,
        "left_at": 1,
        "step": 2,
        "tokens": 500.0,
    }
    # 200 tokens at the first step, 500 at the second
    assert study.spent(LINE) == {0: 0.0, 1: 200.0, 2: 500.0}
    assert study.summary(LINE, budget=499)["two_hop_last"] == 0.5
    stuck = {**LINE, "evaluated": [[0, 0.95, 0.0], [1, 0.9, 0.49]]}
    assert study.summary(stuck)["left_at"] == math.inf
    # The second update of a batch that one step generated has no tokens of its own
    replayed = {**LINE, "steps": [[1, 0.1, 1.0, None, 1.0, 0.0, 200.0], [2, None, None, None, None, 0.1, None]]}
    assert study.spent(replayed) == {0: 0.0, 1: 200.0, 2: 200.0}


def test_studies_share_the_runs_that_they_have_in_common(tmp_path, capsys):
    """One study ran it, the other shows it under the names that it gives it itself."""
    for name, cell in (("one", "token"), ("two", "paper")):
        (tmp_path / f"{name}.yaml").write_text(
            f"title: T\nseeds: 1\nstart_seeds: 1\nstarts: {{a: {{wrong-rate: 1.0}}}}\ncells: {{{cell}: {{}}}}\n"
        )
    one, two = (study.Study(tmp_path / f"{name}.yaml") for name in ("one", "two"))
    one.results.parent.mkdir()
    (run,) = one.runs(None, None, None)
    line = {**LINE, "hash": run.hash, "start": "a", "cell": "token", "seed": 0}
    one.results.write_text(study.json.dumps(line) + "\n")
    study.show_study(two)
    assert "| paper | 1 | 1 of 1, median step 1 |" in capsys.readouterr().out


def test_an_interval_is_students():
    assert study.interval([0.4]) == "0.40"
    # t(0.975, 2) = 4.303, standard deviation 0.1
    assert study.interval([0.3, 0.4, 0.5]) == "0.40 ± 0.25"


def test_a_column_counts_those_that_left_and_pairs_by_seed():
    base = {"two_hop_mean": 0.2, "one_hop_lowest": 0.9, "tokens": 1000, "step": 50}
    first = {0: {**base, "two_hop_last": 0.1, "left_at": math.inf}, 1: {**base, "two_hop_last": 0.2, "left_at": 30}}
    own = {0: {**base, "two_hop_last": 0.6, "left_at": 10}, 1: {**base, "two_hop_last": 0.7, "left_at": 20}}
    found = study.columns(own, first)
    assert found[:2] == ["2", "2 of 2, median step 15"] and found[4:] == ["0.90 to 0.90", "0.50, 0.50", "50", "1,000"]
    assert study.columns(first, {})[1] == "1 of 2, median step 30"


def test_runs_come_seed_by_seed_and_any_setting_makes_another(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "title: T\nseeds: 3\nstart_seeds: 2\nstarts: {a: {wrong-rate: 1.0}, b: {wrong-rate: 0.9}}\n"
        "settings: {max_steps: 4}\ncells: {grpo: {recipe: quickstart/grpo}, token: {starts: [a]}}\n"
    )
    runs = study.Study(path).runs(None, None, None)
    assert [(run.seed, run.start, run.cell) for run in runs[:3]] == [
        (0, "a", "grpo"),
        (0, "a", "token"),
        (0, "b", "grpo"),
    ]
    assert len({run.hash for run in runs}) == len(runs) == 9
    assert [run.config["start"]["seed"] for run in runs if run.cell == "token"] == [0, 1, 0]
    path.write_text(path.read_text().replace("max_steps: 4", "max_steps: 5"))
    assert not {run.hash for run in runs} & {run.hash for run in study.Study(path).runs(None, None, None)}


def test_options_become_words():
    assert study.words({"log_completions": False, "datasets": ["a", "b"]}) == [
        *("--log_completions", "false", "--datasets", "a", "b")
    ]
    assert study.words({"wrong-rate": 1.0, "max_steps": 2}, "-") == ["--wrong-rate", "1.0", "--max-steps", "2"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "reproduction").glob("*.yaml")), ids=lambda path: path.stem
)
def test_studies_are_parsed_as_training_parses_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = study.Study(path)
    for run in own.runs(None, None, [0]):
        options = study.words({"config": f"recipes/{run.config['recipe']}.yaml", **run.config["overrides"]})
        TrlParser(RECIPE_PARTS).parse_args_and_config(options)
