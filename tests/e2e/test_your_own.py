"""docs/your_own.md, command by command, on HopWorld with a tiny model: the commands are read from the page itself."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from hub_stand_in import TOKEN, hub_stand_in

from rex_rag.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")
STUDENT, TEACHER, SERVED = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-72B-Instruct", "http://127.0.0.1:8001/v1"
# What the page leaves to a real model's machine, at the size of a tiny one.
ON_A_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
SUPERVISED = {**ON_A_CPU, "max_steps": 12, "num_train_epochs": 1, "learning_rate": 4e-3}
TRAINED = {
    **ON_A_CPU,
    **{"use_vllm": False, "max_turns": 3, "max_prompt_length": 512, "max_turn_tokens": 48},
    **{"max_observation_tokens": 96, "max_sequence_length": 1024, "retrieval_top_k": 1, "max_steps": 1},
    **{"per_device_train_batch_size": 20, "gradient_accumulation_steps": 1, "steps_per_generation": 1},
    **{"logging_steps": 1, "warmup_steps": 0, "num_completions_to_print": 0},
}
pytestmark = pytest.mark.slow


@contextmanager
def teacher(world: Path):
    """A server that speaks OpenAI's completions in text alone, and knows the way to every answer of the world."""
    ways = {row["question"]: row["metadata"]["chain"] for row in rows(world / "train.jsonl")}

    def turn(prompt: str) -> str:
        question = next((one for one in ways if one in prompt), None)
        if question is None:
            return "?"
        chain, done = ways[question], prompt.rpartition(question)[2].count("<information>")
        if done < len(chain) - 1:
            return f"<think> I look up {chain[done]}.</think><search> {chain[done]}"
        return f"<think> It is {chain[-1]}.</think><answer> {chain[-1]}"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, status, answer):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_GET(self):
            self.reply(200, {"data": [{"id": str(world.parent / "tiny")}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not isinstance(body["prompt"], str) or "return_token_ids" in body:
                return self.reply(422, {"error": {"message": "plain text only"}})
            choice = {"index": 0, "text": turn(body["prompt"]), "finish_reason": "stop"}
            self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 1}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def settings(name: str) -> dict:
    """The YAML that the page has the reader write."""
    [found] = re.findall(rf"```yaml\n(# my/{name}\n.*?)```", PAGE, re.DOTALL)
    return yaml.safe_load(found)


def save_tiny_model(folder: Path) -> None:
    from rex_rag.protocols import make_protocol
    from rex_rag.quickstart.warm_start import begin_by_copying, build_model, build_tokenizer, save

    tokenizer = build_tokenizer(make_protocol("search_r1"))
    model = build_model(tokenizer, hidden_size=64, layers=2)
    begin_by_copying(model)
    save(model, tokenizer, {}, folder)


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    my, tiny = tmp_path / "my", tmp_path / "tiny"
    save_tiny_model(tiny)
    my.mkdir()
    (my / "sft.yaml").write_text(
        yaml.safe_dump({**settings("sft.yaml"), **SUPERVISED, "model_name_or_path": str(tiny)})
    )

    monkeypatch.chdir(tmp_path)

    def run(command: str, **environment: str) -> str:
        if command.startswith("rex-rag "):  # in this process, which spares a dozen imports of torch
            assert main(shlex.split(command)[1:]) == 0, f"{command}\n{capsys.readouterr().err[-4000:]}"
            return capsys.readouterr().out
        given = {
            **os.environ,
            **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            **environment,
        }
        done = subprocess.run(["bash", "-c", command], env=given, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    said, sources = {}, []
    waiting = commands()
    # The page's own data, as many questions as a tiny model needs.
    assert waiting.pop(0) == "rex-rag hopworld --output my"
    run("rex-rag hopworld --output my --train-questions 30 30 0 --test-questions 6 6 0")
    question = rows(my / "test.jsonl")[0]["question"]
    with teacher(my) as served, hub_stand_in() as hub:
        for command in waiting:
            here = command.replace("a question of yours", question).replace(
                "accelerate_configs/single_gpu", "accelerate_configs/cpu"
            )
            here = here.replace(STUDENT, str(tiny)).replace(TEACHER, str(tiny)).replace(SERVED, served)
            online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
            out = run(here, **(online if command.startswith("hf ") else {}))
            said[command.split(" ")[1]] = out
            if command.startswith("rex-rag recipe Qwen"):
                recipe = yaml.safe_load((my / "recipe.yaml").read_text(encoding="utf-8"))
                (my / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **settings("recipe.yaml"), **TRAINED}))
            if command.startswith("rex-rag demonstrations"):
                sources.append(rows(my / "demonstrations" / "rows.jsonl"))
        pushed = {path for _, paths in hub.commits for path in paths}
    looked_up, taught = sources
    # One search finds the answers of one-hop questions alone; the teacher knows all.
    assert len(looked_up) == 30 and len(taught) == 60
    masks = [row["labels"].count(-100) / len(row["labels"]) for row in taught]
    assert all(0 < share < 1 for share in masks)
    assert {"model.safetensors", "agent.json", "README.md"} <= pushed
    assert not any(path.startswith("checkpoint-") for path in pushed)
    assert len(rows(my / "evaluation" / "agent" / "mine" / "predictions.jsonl")) == 12
    assert "Exact match" in (my / "agent" / "README.md").read_text(encoding="utf-8")
    assert said["compare"].strip() and said["ask"].strip() and said["coverage"].strip()
