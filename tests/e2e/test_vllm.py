"""Real vLLM, colocated on CPU, trains the quickstart's recipe with probes on, and an adapter."""

import copy
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
from tiny_training import write_lora_recipe
from transformers import Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def run_worker(*words: str) -> None:
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_SGL_KERNEL": "0", "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | vllm,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def test_vllm_trains_the_quickstart_recipe(warm_start, tmp_path):
    run_worker(
        *("tests/e2e/vllm_worker.py", str(tmp_path / "out.json")),
        *("--config", "recipes/quickstart/rex_rag.yaml"),
        *("--model_name_or_path", str(warm_start / "warm_start")),
        *("--datasets", str(warm_start / "world" / "train.jsonl")),
        *("--corpus", str(warm_start / "world" / "corpus.jsonl")),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "5", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "80", "--probe_probability", "0.6", "--keep_ratio", "0.15"),
        *("--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.1"),
    )
    output = json.loads((tmp_path / "out.json").read_text())
    log, comparisons = output["log"], output["comparisons"]
    assert len(log) == len(comparisons) == 5
    rows = [row for step in comparisons for row in step]
    assert len(rows) >= 5 * 40 and sum(row["is_probe"] for row in rows) > 0
    # vLLM computes in bfloat16 what the trainer computes in float32; ids or masks off by one would differ by nats
    assert sum(row["mean"] for row in rows) / len(rows) < 0.02
    assert sum(row["shifted"] for row in rows) / len(rows) > 1.0
    assert sum(row["inserted"] for row in rows) > 0
    for row in log:
        assert row["sampling/sampling_logp_difference/mean"] < 0.02
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    assert sum(row["probes/kept"] for row in log) > 0
    assert all(row["grad_norm"] > 0 for row in log)


def test_the_engine_has_the_merged_adapter_and_the_frozen_weights_stay(tmp_path):
    # The smallest heads that vLLM's attention on CPU takes are of 32.
    write_lora_recipe(tmp_path, hidden=128, learning_rate=1e-2, logging_steps=1)
    run_worker("tests/e2e/vllm_adapter_worker.py", str(tmp_path))
    base = Qwen2ForCausalLM.from_pretrained(tmp_path / "model")
    frozen = load_file(tmp_path / "frozen.safetensors")
    for name, value in base.named_parameters():
        kept = [held for path, held in frozen.items() if path.replace(".base_layer", "") == f"base_model.model.{name}"]
        assert len(kept) == 1 and torch.equal(kept[0], value), name

    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run").merge_and_unload()
    given, wanted = load_file(tmp_path / "given.safetensors"), dict(merged.named_parameters())
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], value) for name, value in wanted.items())

    output = json.loads((tmp_path / "out.json").read_text())
    assert len(output["log"]) == 2 and all(row["grad_norm"] > 0 for row in output["log"])
    for row in output["sampled"]:
        # The engine computes in bfloat16; the base model alone is far from what it says.
        assert mean_difference(merged, row) < 0.05 < 0.5 < mean_difference(base, row)


@torch.no_grad()
def mean_difference(model: Qwen2ForCausalLM, row: dict) -> float:
    """Of the engine's log-probabilities of what it sampled, against a model's."""
    logps = model(torch.tensor([row["prompt"] + row["ids"]])).logits[0].log_softmax(-1)
    places = torch.arange(len(row["ids"])) + len(row["prompt"]) - 1
    return (logps[places, row["ids"]] - torch.tensor(row["logprobs"])).abs().mean().item()
