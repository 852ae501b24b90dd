"""One of each kind from outside the package, at most 30 lines, used end to end: trained, evaluated, shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from fastapi import FastAPI
from trl import TrlParser

from rex_rag.cli import main
from rex_rag.training.recipe import RECIPE_PARTS
from tests.evaluation.tiny_run import make_tiny_world
from tests.retrieval.running import AppServer

HERE = Path(__file__).parent
NAMES = ("own_tool", "own_protocol", "own_form", "own_retriever", "own_method", "own_explorer")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy that writes whole actions at random, those of the parts below among them."""
    forms = ("<measure> w{}</measure>", "[find] w{}[/find]", "[done] w{}[/done]")
    return make_tiny_world(tmp_path_factory.mktemp("world"), [form.format(n) for form in forms for n in range(60)])


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def trained(world, folder: Path, **settings) -> Path:
    """Two steps through the verb that `accelerate launch -m rex_rag.train` calls."""
    from rex_rag.training import train

    recipe = {
        "model_name_or_path": str(world.model),
        "dtype": "float32",
        "datasets": [{"path": str(world.questions)}],
        "retriever": "bm25",
        "corpus": [str(world.corpus)],
        "output_dir": str(folder / "run"),
        "prompt_template": str(world.model / "prompt.txt"),
        **{"max_turns": 2, "max_prompt_length": 64, "max_turn_tokens": 12, "max_observation_tokens": 96},
        **{"max_sequence_length": 320, "retrieval_top_k": 1, "num_generations": 6, "num_probe_slots": 3},
        **{"probe_probability": 1.0, "probe_filter": "none", "per_device_train_batch_size": 24, "max_steps": 2},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1},
        **{"log_completions": True, "num_completions_to_print": 0, "save_strategy": "no", "disable_tqdm": True},
        **settings,
    }
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    train(folder / "recipe.yaml")
    return folder / "run"


def table(run: Path) -> list[dict]:
    files = sorted((run / "completions").glob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def evaluated(world, run: Path, folder: Path, *words: str) -> list[dict]:
    """Predictions of the trained folder, which brings its protocol and budgets in agent.json."""
    output = folder / "evaluation"
    command = ["evaluate", "--model", str(run), "--dtype", "float32", "--device", "cpu", "--output", str(output)]
    command += ["--benchmarks", f"world={world.questions}", "--temperature", "1"]
    assert main([*command, *(words or ("--corpus", str(world.corpus)))]) == 0
    return [json.loads(line) for line in (output / "world" / "predictions.jsonl").read_text().splitlines()]


def shown(source: Path, folder: Path) -> str:
    page = folder / f"{source.name}.html"
    assert main(["view", str(source), "--output", str(page)]) == 0
    return page.read_text()


def texts(predictions: list[dict]) -> str:
    return "".join(
        segment["text"] for row in predictions for sample in row["samples"] for segment in sample["segments"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_thirty_lines_are_enough(name):
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= 30


def test_a_tool(world, tmp_path):
    run = trained(world, tmp_path, agent_tools=["search", "own_tool:measure"])
    used = [use for row in table(run) for use in json.loads(row["tool_uses"])]
    assert {use.get("tool", "search") for use in used} == {"search", "measure"}
    assert json.loads((run / "agent.json").read_text())["tools"] == ["search", "own_tool:measure"]
    predictions = evaluated(world, run, tmp_path)
    assert any(use.get("tool") == "measure" for row in predictions for use in row["samples"][0]["searches"])
    assert "measure w" in shown(run, tmp_path) and "INFORMATION" in shown(tmp_path / "evaluation", tmp_path)


def test_a_protocol(world, tmp_path):
    pool = tmp_path / "pool.txt"
    pool.write_text("<think> Hm .\n")
    settings = {"prompt_template": None, "exploration_prompts": str(pool)}
    run = trained(world, tmp_path, protocol="own_protocol:Brackets", max_prompt_length=200, **settings)
    rows = table(run)
    assert any("[found]Doc 1(Title:" in row["segments"] for row in rows)
    assert any(row["is_probe"] for row in rows)
    assert "[found]Doc 1(Title:" in texts(evaluated(world, run, tmp_path))
    assert "[found]" in shown(run, tmp_path)


def test_a_correction_form(world, tmp_path):
    run = trained(world, tmp_path, correction="own_form:Half")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--correction", "own_form:Half"]
    *_, config, _ = TrlParser(RECIPE_PARTS).parse_args_and_config(words)
    assert config.correction == "own_form:Half"  # as on a command line
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    weights = [row["importance_weight/mean"] for row in history if "importance_weight/mean" in row]
    assert weights and all(0.5 < weight < 1.0 for weight in weights)
    evaluated(world, run, tmp_path)
    assert "PROBE" in shown(run, tmp_path)


def test_a_retriever(world, tmp_path):
    run = trained(world, tmp_path, retriever="own_retriever:Echo", corpus=None)
    assert any("Doc 1(Title: Echo)" in row["segments"] for row in table(run))
    predictions = evaluated(world, run, tmp_path, "--retriever", "own_retriever:Echo")
    assert "Doc 1(Title: Echo)" in texts(predictions)
    card = json.loads((tmp_path / "evaluation" / "run.json").read_text())
    assert (card["retriever"]["kind"], card["retriever"]["description"]) == ("own", "an echo of the query")
    assert "passage ids echo 0" in shown(tmp_path / "evaluation", tmp_path)


def test_an_explorer(world, tmp_path):
    run = trained(world, tmp_path, explorer="own_explorer:Same")
    probes = [row for row in table(run) if row["is_probe"]]
    assert probes and all("<think> Hm</think>" in row["segments"] for row in probes)
    assert all(row["parent"] and row["cut"] is not None for row in probes)
    evaluated(world, run, tmp_path)
    assert "pale: copied from it" in shown(run, tmp_path)


def test_doubts_that_an_endpoint_writes(world, tmp_path):
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def answer():
        return {"choices": [{"message": {"role": "assistant", "content": "Wait, look again."}}]}

    server = AppServer(app)
    try:
        settings = {"explorer": "endpoint", "explorer_url": server.url, "explorer_model": "m", "correction": "none"}
        run = trained(world, tmp_path, **settings)
    finally:
        server.stop()
    probes = [row for row in table(run) if row["is_probe"]]
    assert probes and all("<think> Wait, look again." in row["segments"] for row in probes)


def test_an_evaluation_method(world, tmp_path):
    words = ["--method", "own_method:FirstTitle", "--corpus", str(world.corpus), "--max_sequence_length", "512"]
    predictions = evaluated(world, world.model, tmp_path, *words)
    assert all(row["samples"][0]["answer"] for row in predictions)
    card = json.loads((tmp_path / "evaluation" / "run.json").read_text())
    assert card["method"]["name"] == "own_method:FirstTitle"
    assert re.fullmatch("1, source [0-9a-f]{12}", card["method"]["revision"])  # a changed module is another method
    assert predictions[0]["samples"][0]["answer"] in shown(tmp_path / "evaluation", tmp_path)
