"""`rex_rag.train` says without a traceback what a user can mend, and keeps that of everything else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from parts import make_bpe_tokenizer, make_tiny_model
from peft import LoraConfig, get_peft_model
from tiny_training import write_tiny_recipe
from transformers import Qwen2ForCausalLM

from rex_rag.retrieval.base import RetrievalError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    from rex_rag.training import launch

    return launch


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def start(script: ModuleType, monkeypatch: pytest.MonkeyPatch, recipe: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(recipe), *words])
    return script.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep_ratio", "7"], "keep_ratio"),
        (["--retriever", "indexes/absent", "--corpus", "none"], "indexes/absent: no such directory; build one with"),
        (["--corpus", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--model_name_or_path", "./absent"], "./absent"),
        (["--resume_from_checkpoint", "run/checkpoint-9"], "resume_from_checkpoint=run/checkpoint-9 is no directory"),
        (["--resume_from_checkpoint", "true"], "holds no checkpoint; leave it out to begin anew"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(
    script: ModuleType, recipe: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert start(script, monkeypatch, recipe, *words) == 2
    before, error, said = capsys.readouterr().err.partition("error: ")
    assert error and message in said
    assert "Traceback" not in before + said


def test_a_value_of_another_type_is_told_without_the_list_of_all_options(
    script: ModuleType, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    with pytest.raises(SystemExit) as stopped:
        start(script, monkeypatch, recipe, "--rest_after", "often")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "--rest_after" in said and "'often'" in said and len(said.splitlines()) == 1


def test_a_used_folder_and_what_does_not_go_together_are_refused_before_training(
    script: ModuleType, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def refused(*words: str) -> str:
        assert start(script, monkeypatch, recipe, *words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    run, model = tmp_path / "run", tmp_path / "model"
    (run / "checkpoint-2").mkdir(parents=True)
    assert refused().startswith(f"error: {run} holds a run already (checkpoint-2)")
    said = refused("--resume_from_checkpoint", str(run / "checkpoint-2"))
    assert said.startswith(f"error: {run}/checkpoint-2 is not a whole checkpoint: it is empty")
    assert "overwrite_output_dir would remove" in refused("--output_dir", str(model), "--overwrite_output_dir")
    assert (model / "model.safetensors").is_file() and (run / "checkpoint-2").is_dir()

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(Qwen2ForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path / "adapter")
    words = ["--model_name_or_path", str(tmp_path / "adapter"), "--overwrite_output_dir"]
    assert f"{tmp_path}/adapter is an adapter of '{model}' already" in refused(*words, "--use_peft")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refused(*words).startswith(f"error: {model}/model.safetensors is a Git LFS pointer")
    settings = json.loads((model / "config.json").read_text())
    make_tiny_model(make_bpe_tokenizer()).save_pretrained(model)
    (model / "config.json").write_text(json.dumps(settings | {"intermediate_size": 48}))
    assert f"the weights in {model} do not fit {model}/config.json" in refused("--overwrite_output_dir")
    assert (run / "checkpoint-2").is_dir()  # nothing is removed before training begins


def test_a_best_model_by_a_metric_that_no_evaluation_set_has_is_refused_before_training(
    script: ModuleType, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    words = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--eval_benchmarks", f"own={tmp_path / 'questions.jsonl'}", "--load_best_model_at_end", "true"]
    assert start(script, monkeypatch, recipe, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: metric_for_best_model is 'loss'") and "eval_own_em/originals" in said
    assert not (tmp_path / "run" / "checkpoint-1").exists()


def test_a_missing_recipe_missing_questions_and_an_unknown_key_are_said_too(
    script: ModuleType, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert start(script, monkeypatch, tmp_path / "absent.yaml") == 2
    assert capsys.readouterr().err.startswith(f"error: there is no recipe at {tmp_path}/absent.yaml")
    settings = yaml.safe_load(recipe.read_text())
    for change, message in (
        ({"datasets": [{"path": "absent.jsonl"}]}, "absent.jsonl"),
        ({"keep_ration": 0.1}, "keep_ration"),
    ):
        recipe.write_text(yaml.safe_dump(settings | change))
        assert start(script, monkeypatch, recipe) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_bug_keeps_its_traceback_and_a_server_that_dies_in_training_does_not(
    script: ModuleType, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def broken(*_: object) -> None:
        raise TypeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(script, "load_questions", broken)
        with pytest.raises(TypeError, match="a bug"):
            start(script, monkeypatch, recipe)

    def away(*_: object, **__: object) -> None:
        raise RetrievalError("search at http://x failed")

    def wrong(*_: object, **__: object) -> None:
        raise ValueError("a bug in the middle of training")

    with monkeypatch.context() as patched:
        patched.setattr(script.REXRAGTrainer, "train", away)
        assert start(script, monkeypatch, recipe) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "error: search at http://x failed"
        patched.setattr(script.REXRAGTrainer, "train", wrong)
        with pytest.raises(ValueError, match="a bug in the middle"):
            start(script, monkeypatch, recipe)


@pytest.mark.slow
def test_as_a_command_it_ends_with_a_line_and_a_code_and_trains_otherwise(recipe: Path, tmp_path: Path):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "rex_rag.train", "--config", str(recipe), *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=300,
        )

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = run("--retriever", url, "--corpus", "none", "--retriever_max_attempts", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: search at {url}/retrieve failed after 1 attempt")
    assert "Traceback" not in done.stderr
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").is_file() and (tmp_path / "run" / "README.md").is_file()
