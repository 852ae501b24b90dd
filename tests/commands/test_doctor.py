"""`rex-rag doctor` finds what would stop a run, all of it, and lets two steps of a stand-in run."""

import pytest
from tiny_training import write_tiny_recipe

from rex_rag.cli import main
from rex_rag.commands import doctor


@pytest.fixture
def recipe(tmp_path):
    """A recipe as a function of changes to it, all of whose files are there."""
    shared = {"num_probe_slots": 2, "num_generations": 4, "max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    shared |= {"max_sequence_length": 256, "keep_ratio": 0.4}
    return lambda **changes: str(write_tiny_recipe(tmp_path, **shared | changes))


def examined(capsys, *words):
    code = main(["doctor", *words])
    found: dict[tuple[str, str], str] = {}
    for mark, name, text in (line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()):
        found[mark, name] = f"{found.get((mark, name), '')} {text}".strip()
    return code, found


def test_a_well_recipe_is_well(recipe, capsys):
    code, found = examined(capsys, recipe(), "--no_dry_run")
    assert code == 0, found
    assert {name for mark, name in found if mark == "ok"} == {
        *("versions", "settings", "disk", "tokenizer", "questions", "retriever")
    }
    assert found["ok", "disk"].startswith("2 checkpoints of ")


def test_every_problem_is_told_at_once(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    path = recipe(use_cpu=False, question_column="ask")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    code, found = examined(capsys, path, "--no_dry_run")
    assert code == 1
    assert "set save_total_limit" in found["PROBLEM", "disk"]
    assert "no column 'ask'" in found["PROBLEM", "questions"]
    assert "has no chat_template; take" in found["PROBLEM", "tokenizer"]
    assert "no GPU" in found["PROBLEM", "machine"]


def test_wrong_settings_and_a_server_that_is_down(recipe, capsys):
    code, found = examined(capsys, recipe(max_stps=3), "--no_dry_run")
    assert code == 1 and "did you mean max_steps" in found["PROBLEM", "settings"]
    down = {"retriever": "http://127.0.0.1:9", "corpus": []}
    code, found = examined(capsys, recipe(**down))
    assert code == 1 and "does not answer" in found["PROBLEM", "retriever"]
    assert "first mend retriever" in found["left", "out"]


@pytest.mark.parametrize(("gibibytes", "mark"), [(1, "PROBLEM"), (8, "ok")])
def test_the_plan_is_held_against_the_gpus_that_are_here(recipe, capsys, monkeypatch, gibibytes, mark):
    monkeypatch.setattr(doctor, "_gpu_sizes", lambda: [gibibytes * 2**30])
    _, found = examined(capsys, recipe(use_cpu=False), "--no_dry_run")
    assert f"of {gibibytes} GiB planned on each of 1 GPU" in found[mark, "memory"]


@pytest.mark.slow
def test_two_steps_of_a_stand_in_are_trained(recipe, capsys):
    code, found = examined(capsys, recipe())
    assert code == 0, found
    assert found["ok", "dry"].startswith("run") and "2 steps of a stand-in" in found["ok", "dry"]
