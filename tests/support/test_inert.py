"""Text of others shows as text: at the terminal, in logs, in tables; and what is started tells nobody."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from rex_rag.cli import main
from rex_rag.models.files import ModelFileError, load_causal_lm
from rex_rag.models.language_model import ModelError, ModelOptions, load_tokenizer, open_model
from rex_rag.support.errors import UserError, one_line, refuse
from rex_rag.support.logs import _Visible
from rex_rag.support.tables import csv_table, latex_text, markdown_text
from rex_rag.support.wording import shorten, visible

ROOT = Path(__file__).resolve().parents[2]
# Clears the screen, sets the window's title, turns the reading order around, hides a character.
NASTY = "a\x1b[2J\x1b]0;title\x07b\x9b1mc\u202ed\u200be"


def is_inert(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


def test_control_characters_are_spelled_out_and_other_text_stays():
    assert visible(NASTY) == r"a\x1b[2J\x1b]0;title\x07b\x9b1mc\u202ed\u200be"
    assert visible("naïve “quotes” 漢字\tand\nlines") == "naïve “quotes” 漢字\tand\nlines"


def test_errors_and_log_lines_are_inert(capsys):
    assert refuse(UserError(NASTY)) == 2
    assert is_inert(capsys.readouterr().err)
    assert is_inert(one_line(OSError(2, NASTY, NASTY)))
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s said", (NASTY,), None)
    assert is_inert(_Visible("%(message)s").format(record)) and "title" in _Visible().format(record)


def test_rollouts_are_printed_as_text(capsys):
    from trl.trainer import grpo_trainer

    from rex_rag.training import grpo_seams

    assert grpo_seams.GRPOSeams
    messages = [[{"role": "user", "content": NASTY}]]
    extra = {name: [NASTY] for name in ("question", "predicted_answer", "trajectory")} | {"golden_answers": [[NASTY]]}
    grpo_trainer.print_prompt_completions_sample(messages, [NASTY], {"em": [1.0]}, [0.5], 3, None, extra=extra)
    printed = capsys.readouterr().out
    assert "step 3" in printed and printed.count("title") == 4
    assert not {"\x07", "\x9b", "\u202e"} & set(printed) and "\x1b]" not in printed and "\x1b[2J" not in printed


@pytest.mark.parametrize("name", [NASTY, "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", " =1", '"=1"', "a\n=1"])
def test_names_are_inert_in_every_table(name):
    [[_, cell]] = list(csv.reader(io.StringIO(csv_table(["run", name], []))))
    assert is_inert(cell) and cell[:1] not in "=+-@\t\r"
    assert is_inert(markdown_text(name)) and "\n" not in markdown_text(name)
    assert is_inert(latex_text(name)) and "\n" not in latex_text(name)


def test_figures_stay_figures_in_a_table():
    assert csv_table(["a"], [[-0.5], [None], ["x"]]) == "a\n-0.5\n\nx\n" or '""' in csv_table(["a"], [[None]])


def test_what_is_nested_too_deeply_can_still_be_named():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert "nested too deeply" in shorten(nested)


@pytest.mark.parametrize(
    "words",
    [
        "index --corpus {corpus} --output {loop}",
        "hopworld --output {loop}",
        "search --corpus {loop} red",
        "curves {loop} --output {folder}/curves.png",
        "recipe quickstart/rex_rag --output {loop}",
        "report {loop}",
        "view {loop} --output {folder}/page.html",
    ],
)
def test_a_link_to_itself_is_one_line(words, tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "1", "contents": "red fox"}) + "\n")
    assert main([word.format(loop=loop, corpus=corpus, folder=tmp_path) for word in words.split()]) == 2
    assert str(loop) in capsys.readouterr().err


def test_no_network_is_one_line():
    with pytest.raises(httpx.ConnectError) as raised:
        httpx.get("http://127.0.0.1:9", trust_env=False)
    assert "no connection" in one_line(raised.value)


# Nothing is told, and nobody's code is run.


@pytest.mark.parametrize("entry", ["rex_rag.cli", "rex_rag.train", "rex_rag.evaluate", "rex_rag"])
def test_telemetry_is_off_whatever_is_started(entry):
    kept = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name and "TRACK" not in name}
    code = f"import {entry}, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_turn_it_off_before_a_library_looks(script):
    names = {"transformers", "huggingface_hub", "datasets", "trl", "peft", "sentence_transformers", "accelerate"}
    off = False
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        off = off or any(name.split(".")[0] == "rex_rag" for name in modules) or "TELEMETRY" in ast.dump(node)
        assert off or not names & {name.split(".")[0] for name in modules}, f"{script.name} imports it too early"


@pytest.fixture
def model_with_code(tmp_path):
    """A model folder whose configuration, weights and tokenizer want code of their own, which leaves a mark."""
    mark = tmp_path / "mark"
    folder = tmp_path / "model"
    folder.mkdir()
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "Own"}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\nclass Own:\n    pass\n")
    return folder, mark


def test_a_models_own_code_is_refused_and_nobody_is_asked(model_with_code, monkeypatch):
    folder, mark = model_with_code

    def asked(*args):
        raise AssertionError("somebody was asked whether to run remote code")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ModelFileError, match="code of its own"):
        load_causal_lm(str(folder))
    with pytest.raises(ModelError):
        load_tokenizer(ModelOptions(str(folder)))
    with pytest.raises((ModelError, ModelFileError)):
        open_model(ModelOptions(str(folder), device="cpu"))
    assert main(["reliability", "--model", str(folder), "--question", "who?", "--output", str(folder / "x.png")]) == 2
    assert not mark.exists()


def test_every_load_says_that_no_code_is_run():
    loads = []
    for path in (ROOT / "rex_rag").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_load = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_load and node.func.attr == "from_pretrained" and ast.unparse(node.func.value).startswith("Auto"):
                loads.append(path.name)
                assert "trust_remote_code" in ast.unparse(node), f"{path}, line {node.lineno}"
    assert len(loads) > 5
