"""scripts/train.slurm: two nodes of one process each, stand-ins of Slurm's two commands, all else real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_training import write_tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# Both nodes are this machine; the process of each task is written down for the signal.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    echo $! >> "$TASKS"
done
wait -n; first=$?
wait -n; exit $((first | $?))
"""


def test_two_nodes_train_together_and_save_before_their_time_is_up(tmp_path: Path):
    recipe = write_tiny_recipe(
        tmp_path, max_steps=500, save_strategy="steps", save_steps=500, per_device_train_batch_size=2
    )
    commands = {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {
        **{"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        **{"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "here[1-2]", "SLURM_GPUS_ON_NODE": "1"},
        **{"SLURM_JOB_ID": str(os.getpid()), "TASKS": str(tmp_path / "tasks"), "OMP_NUM_THREADS": "1"},
        "ACCELERATE_CONFIG": "recipes/accelerate_configs/ddp_cpu.yaml",
    }
    job = subprocess.Popen(
        ["bash", "scripts/train.slurm", str(recipe), "--seed", "7"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 240
    while job.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert job.poll() is None, job.stdout.read()[:3000]
    for task in (tmp_path / "tasks").read_text().split():  # Slurm signals every process of a step
        for process in [psutil.Process(int(task)), *psutil.Process(int(task)).children(recursive=True)]:
            process.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    [saved] = (tmp_path / "run").glob("checkpoint-*")
    assert job.returncode and "SIGUSR1: stopped and saved" in said, said[-3000:]
    state = json.loads((saved / "trainer_state.json").read_text())
    assert 2 <= state["global_step"] < 500
    assert (saved / "rng_state_0.pth").exists() and (saved / "rng_state_1.pth").exists()
