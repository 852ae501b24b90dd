"""Does it still work? Rescue replay leaves an all-wrong start, as docs/reproduction.md says it does.

The start is the warm start of `--wrong-rate 1.0 --seed 0`, in bfloat16: making it would double the time of this test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from rex_rag.quickstart.hopworld import HopWorldConfig, build_hopworld, write_hopworld
from rex_rag.quickstart.run import KEEP_MEMORY

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "tests" / "data" / "all_wrong_start"


@pytest.mark.slow
def test_probes_rescue_and_rescue_replay_learns_from_them(tmp_path):
    world = HopWorldConfig(seed=0, train_questions=(400, 800, 0), test_questions=(100, 100, 100))
    write_hopworld(build_hopworld(world), tmp_path / "world")
    command = [
        *(sys.executable, "-m", "rex_rag.train", "--config", "recipes/quickstart/rescue_replay.yaml"),
        *("--model_name_or_path", str(START), "--datasets", str(tmp_path / "world" / "train.jsonl")),
        *("--corpus", str(tmp_path / "world" / "corpus.jsonl"), "--output_dir", str(tmp_path / "run")),
        *("--max_steps", "30", "--seed", "0", "--save_strategy", "no", "--log_completions", "false"),
        *("--eval_benchmarks", *(f"hop{hops}={tmp_path}/world/test_{hops}_hop.jsonl" for hops in (1, 2))),
        *("--eval_strategy", "steps", "--eval_steps", "30", "--per_device_eval_batch_size", "100"),
    ]
    env = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [row for row in history if "loss" in row]
    # Nearly every original of a two-hop question fails at first, and the probes of most such questions find the way.
    assert mean(row["dead_end/rate"] for row in steps[:5]) > 0.5
    assert mean(row["dead_end/rescue_rate"] for row in steps[:5]) > 0.6
    assert steps[-1]["replay/rescue_nll"] < steps[0]["replay/rescue_nll"] / 3
    (two_hops,) = [row["eval_hop2_em/originals"] for row in history if "eval_hop2_em/originals" in row]
    (one_hop,) = [row["eval_hop1_em/originals"] for row in history if "eval_hop1_em/originals" in row]
    assert two_hops >= 0.5 and one_hop >= 0.9, (one_hop, two_hops)
