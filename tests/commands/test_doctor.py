"""`rex-rag doctor` finds what would stop a run, all of it, and lets two steps of a stand-in run."""

import json

import pytest
import yaml
from parts import make_bpe_tokenizer, make_tiny_model

from rex_rag.cli import main
from rex_rag.commands import doctor


@pytest.fixture
def recipe(tmp_path):
    """A recipe as a function of changes to it, all of whose files are there."""
    tokenizer = make_bpe_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("Question: {question}")
    rows = [{"question": f"where is the {word}", "golden_answers": ["oak"]} for word in ("owl", "fox")]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "contents": "\\"Owl\\"\\nthe owl is in the oak"}\n')

    def write(**changes):
        settings = {
            "model_name_or_path": str(tmp_path / "model"),
            "datasets": [{"path": str(tmp_path / "questions.jsonl")}],
            "retriever": "bm25",
            "corpus": str(tmp_path / "corpus.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "prompt_template": str(tmp_path / "prompt.txt"),
            **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
            **{"num_probe_slots": 2, "num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 20},
            **{"max_turns": 1, "max_prompt_length": 64, "max_turn_tokens": 8, "max_observation_tokens": 48},
            **{"max_sequence_length": 256, "save_steps": 10, "dtype": "float32", "keep_ratio": 0.4},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return str(path)

    return write


def examined(capsys, *words):
    code = main(["doctor", *words])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return code, {(mark, name): text for mark, name, text in lines}


def test_a_well_recipe_is_well(recipe, capsys):
    code, found = examined(capsys, recipe(), "--no_dry_run")
    assert code == 0, found
    assert {name for mark, name in found if mark == "ok"} == {
        *("versions", "settings", "disk", "tokenizer", "questions", "retriever")
    }
    assert found["ok", "disk"].startswith("2 checkpoints of ")


def test_every_problem_is_told_at_once(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("eos_token", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    code, found = examined(capsys, recipe(use_cpu=False, question_column="ask"), "--no_dry_run")
    assert code == 1
    assert "set save_total_limit" in found["PROBLEM", "disk"]
    assert "no column 'ask'" in found["PROBLEM", "questions"]
    assert {name for mark, name in found if mark == "PROBLEM"} >= {"machine", "disk", "questions"}


def test_wrong_settings_and_a_server_that_is_down(recipe, capsys):
    code, found = examined(capsys, recipe(max_stps=3), "--no_dry_run")
    assert code == 1 and "did you mean max_steps" in found["PROBLEM", "settings"]
    down = {"retriever": "http://127.0.0.1:9", "corpus": []}
    code, found = examined(capsys, recipe(**down))
    assert code == 1 and "does not answer" in found["PROBLEM", "retriever"]
    assert "first mend retriever" in found["left", "out"]


@pytest.mark.slow
def test_two_steps_of_a_stand_in_are_trained(recipe, capsys):
    code, found = examined(capsys, recipe())
    assert code == 0, found
    assert found["ok", "dry"].startswith("run") and "2 steps of a stand-in" in found["ok", "dry"]
