"""A training command that cannot work says so in a second or two, everything at once, before torch is there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_stand_in import hub_stand_in
from parts import make_tiny_model, make_word_tokenizer
from trl import TrlParser

from rex_rag.training import preflight
from rex_rag.training.preflight import examine, read_settings, recipe_keys
from rex_rag.training.recipe import RECIPE_PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Settings that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = make_word_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "questions.jsonl").write_text('{"question": "q", "golden_answers": ["a"]}\n')
    (folder / "corpus.jsonl").write_text('{"id": "1", "contents": "\\"Owl\\"\\nthe owl"}\n')
    return {
        "model_name_or_path": str(folder / "model"),
        "datasets": [str(folder / "questions.jsonl")],
        "retriever": "bm25",
        "corpus": [str(folder / "corpus.jsonl")],
        "use_cpu": True,
    }


def test_keys_are_those_of_the_parser():
    assert recipe_keys() == {action.dest for action in TrlParser(RECIPE_PARTS)._actions} - {"help"} | {"config"}


def test_a_good_recipe_has_nothing_amiss(good):
    found = examine(good)
    assert found.settings == found.here == found.waiting == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("[Qqgh]*/*.yaml")), ids=lambda path: path.stem)
def test_settings_of_the_recipes_are_right(recipe):
    assert examine(read_settings(["--config", str(recipe)])).settings == []


@pytest.mark.parametrize(
    ("change", "where", "named"),
    [
        ({"max_stps": 3}, "settings", "did you mean max_steps?"),
        ({"datasets": []}, "settings", "datasets names no question set"),
        ({"retriever": "bm52"}, "settings", "bm52"),
        ({"model_name_or_path": None}, "here", "model_name_or_path is not set"),
        ({"model_name_or_path": "outputs/no/model"}, "here", "no such folder here"),
        ({"model_name_or_path": "tests/model"}, "here", "no such folder here"),
        ({"datasets": ["none.jsonl"]}, "here", "none.jsonl: no such file"),
        ({"question_column": "ask"}, "here", "no column 'ask'"),
        ({"corpus": ["none.jsonl"]}, "here", "corpus none.jsonl is no file"),
        ({"prompt_template": "none.txt"}, "settings", "prompt_template is 'none.txt'"),
        ({"eval_benchmarks": ["mine=none.jsonl"]}, "here", "none.jsonl, which is no file"),
        ({"retriever": "./none", "corpus": None}, "here", "no such directory"),
        ({"report_to": "wanbd"}, "settings", "name trackio, wandb, tensorboard, mlflow, none"),
        ({"report_to": ["trackio", "all"]}, "settings", "whatever happens to be installed"),
        ({"use_cpu": False}, "here", "no GPU"),
        ({"retriever": "http://127.0.0.1:9", "corpus": None}, "waiting", "a run waits for it, for 362 s at most"),
    ],
)
def test_what_is_amiss_is_named(good, change, where, named, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = examine({name: value for name, value in (good | change).items() if value is not None})
    said = {name: " ".join(getattr(found, name)) for name in ("settings", "here", "waiting")}
    assert named in said.pop(where) and not any(said.values())


def test_a_tracker_that_is_not_installed_is_told_with_the_way_out(good, monkeypatch):
    monkeypatch.setitem(preflight._TRACKERS, "wandb", ("wandb_that_is_not_here",))
    found = examine(good | {"report_to": ["trackio", "wandb"]})
    assert found.settings == [] and len(found.here) == 1
    assert "pip install 'rex-rag[wandb]'" in found.here[0]
    for without in ("none", ["none"], [], None, "clearml"):  # the last one is transformers' to refuse
        assert examine(good | {"report_to": without}).here == []


@pytest.mark.parametrize(
    ("token", "said"), [("hf_TOKEN", None), ("hf_OTHER", "the Hub knows no login"), (None, "no login")]
)
def test_a_push_needs_a_login(token, said):
    """In a process of its own, since the Hub's library reads its address once."""
    code = f"from rex_rag.training.preflight import _login_problem; print(_login_problem({token!r}))"
    with hub_stand_in() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": "/nonexistent"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None" if said is None else said in done.stdout


def test_command_lines_are_read_as_recipes_are(tmp_path):
    (tmp_path / "r.yaml").write_text("max_steps: 3\nretriever: bm25\ncorpus: [a.jsonl]\n")
    words = ["--config", str(tmp_path / "r.yaml"), "--max_steps", "5", "--use_cpu", "--seed=7", "--bf16", "false"]
    words += ["--corpus", "none", "--datasets", "a.jsonl", "2024", "--learning_rate", "-1e-6"]
    assert read_settings(words) == {
        **{"max_steps": 5, "retriever": "bm25", "corpus": None, "use_cpu": True, "seed": 7, "bf16": False},
        **{"datasets": ["a.jsonl", 2024], "learning_rate": "-1e-6"},
    }


def test_everything_is_said_at_once_in_seconds_and_without_torch(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps({"retriever": "bm25", "corpus": ["none.jsonl"], "output_dir": "out"}))
    code = (
        "import sys; from rex_rag.train import main; code = main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(tmp_path / "r.yaml"), "--max_stps", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and time.monotonic() - started < 10  # under one on a quiet machine
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: unknown keys: 'max_stps'") and len(lines) == 5
    assert all(word in done.stderr for word in ("datasets", "model_name_or_path", "none.jsonl", "GPU"))
