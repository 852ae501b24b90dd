"""DDP, ZeRO-2 and ZeRO-3 in two processes, full and with an adapter: they do what one does, and resume.

Beside them engines that generate for all processes at once, a vLLM server and tensor parallelism, with stand-ins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import timeless, write_lora_recipe
from transformers import Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

POLICIES = ("full", "lora")
SHARED = {
    "ddp": [("server", "full"), ("server", "lora"), ("tensor_parallel", "full")],
    "zero3": [("server", "full"), ("server", "lora")],
}
SUMS = ("loss", "grad_norm")  # over the tokens of the global batch
COUNTS = ("em/originals", "probes/made", "probes/kept", "probes/failure_rate", "probes/mixing_share", "num_tokens")
ENGINES = {
    "ddp": ["--config_file", "recipes/accelerate_configs/ddp_cpu.yaml"],
    "zero2": ["--config_file", "recipes/accelerate_configs/zero3_cpu.yaml", "--zero_stage", "2"],
    "zero3": ["--config_file", "recipes/accelerate_configs/zero3_cpu.yaml"],
}
ENGINES["zero2"] += ["--zero3_init_flag", "false", "--zero3_save_16bit_model", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Recipes of a full policy and of an adapter, and a run of each in one process."""
    folder = tmp_path_factory.mktemp("engines")
    recipe = write_lora_recipe(
        folder,
        **{"num_generations": 4, "num_probe_slots": 1, "probe_probability": 1.0, "keep_ratio": 0.2, "beta": 0.05},
        **{"exploration_prompts": str(folder / "pool.txt"), "max_turn_tokens": 24, "max_turns": 2},
        **{"gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "steps", "learning_rate": 1e-3},
        # Adam divides by the root of squared gradients: where these are rounding errors, so is the update.
        **{"adam_epsilon": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0},
    )
    questions = [{"question": f"where is the {word}", "golden_answers": ["oak"]} for word in "abcdefghijkl"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "pool.txt").write_text("<think> I may be wrong.\n<think> Is it so?\n<think> Wait.\n")
    recipe.rename(folder / "full.yaml")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, tuple[list[dict], dict[str, torch.Tensor]]]:
    """What one process comes to, by policy."""
    run([], "engine_worker.py", folder, "one", 8)
    return {policy: outcome(folder, f"one_{policy}") for policy in POLICIES}


def run(launch: list[str], worker: str, *arguments: object, deadline: float = 300) -> None:
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", *launch] if launch else []
    done = subprocess.run(
        [sys.executable, *launch, f"tests/e2e/{worker}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=deadline,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def outcome(folder: Path, name: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run logged of its steps, and its weights."""
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    weights = folder / name / ("adapter_model.safetensors" if "lora" in name else "model.safetensors")
    return timeless(log), load_file(weights)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_do_what_one_does_and_resume(engine: str, folder: Path, one):
    run(ENGINES[engine], "engine_worker.py", folder, engine, 4)
    for policy in POLICIES:
        log, weights = outcome(folder, f"{engine}_{policy}")
        resumed_log, resumed = outcome(folder, f"{engine}_{policy}_resumed")
        assert resumed_log == log and len(log) == 3
        assert weights.keys() == resumed.keys()
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)

        expected_log, expected = one[policy]
        for ours, theirs in zip(log, expected_log, strict=True):
            # Sums over tokens in another order: float32's rounding, far below any token or row that is left out.
            assert {key: ours[key] for key in SUMS} == pytest.approx({key: theirs[key] for key in SUMS}, rel=1e-5)
            assert {key: ours[key] for key in COUNTS} == {key: theirs[key] for key in COUNTS}
            assert ours["probes/kept"] == 2
        moved = max((expected[name] - start).abs().max() for name, start in begun(folder, policy).items())
        assert moved > 1e-4 and expected.keys() <= weights.keys()
        for name, value in expected.items():
            assert (weights[name] - value).abs().max() < 1e-3 * moved, name


def begun(folder: Path, policy: str) -> dict[str, torch.Tensor]:
    """The weights that a policy begins with."""
    name = "model/model.safetensors" if policy == "full" else "adapter/adapter_model.safetensors"
    return load_file(folder / name)


@needs_vllm
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_an_engine_of_all_processes_gets_equal_calls_and_each_gets_its_own_back(engine, folder, tmp_path):
    modes = SHARED[engine]
    run(ENGINES[engine], "shared_engine_worker.py", folder, tmp_path, *(word for one in modes for word in one))
    for mode, policy in modes:
        ranks = [json.loads((tmp_path / f"{mode}_{policy}_{rank}.json").read_text()) for rank in range(2)]
        calls = [rank["calls"] for rank in ranks]
        assert len(calls[0]) == len(calls[1]) == len(ranks[0]["written"])
        for ours, theirs, written in zip(*calls, ranks[0]["written"], strict=True):
            assert ours["sent"] == theirs["sent"]
            assert ours["given"] + theirs["given"] == written
        assert [rank["turns"][0] for rank in ranks] == [1, 3]
        assert len(ranks[0]["log"]) == 2 and all(row["grad_norm"] > 0 for row in ranks[0]["log"])
        assert all(rank["moved"] == [] for rank in ranks), "frozen weights changed"
        assert ranks[0]["syncs"] == 4  # before each step, before the evaluation, and the last, to compare

        base = Qwen2ForCausalLM.from_pretrained(folder / "model")
        trained = tmp_path / f"{mode}_{policy}"
        if policy == "lora":
            merged = PeftModel.from_pretrained(base, trained).merge_and_unload()
        else:
            merged = Qwen2ForCausalLM.from_pretrained(trained)
        given = load_file(tmp_path / f"{mode}_{policy}_given_0.safetensors")
        wanted = dict(merged.named_parameters())
        assert given.keys() == wanted.keys()
        assert [name for name, value in wanted.items() if not torch.equal(given[name], value)] == []
