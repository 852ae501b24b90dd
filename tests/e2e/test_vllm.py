"""Real vLLM, colocated on CPU, trains the quickstart's recipe with probes on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_vllm_trains_the_quickstart_recipe(warm_start, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "tests/e2e/vllm_worker.py", str(tmp_path / "out.json")),
            *("--config", "recipes/quickstart/rex_rag.yaml"),
            *("--model_name_or_path", str(warm_start / "warm_start")),
            *("--datasets", str(warm_start / "world" / "train.jsonl")),
            *("--corpus", str(warm_start / "world" / "corpus.jsonl")),
            *("--output_dir", str(tmp_path / "run"), "--max_steps", "5", "--save_strategy", "no"),
            *("--per_device_train_batch_size", "80", "--probe_probability", "0.6", "--keep_ratio", "0.15"),
            *("--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.1"),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_SGL_KERNEL": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
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
