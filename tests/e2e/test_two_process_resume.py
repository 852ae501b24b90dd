"""Two real processes that are stopped and resumed in a later epoch do what an uninterrupted run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_training import timeless, write_tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_two_processes_resume_in_the_second_epoch_and_take_over_from_one(tmp_path: Path):
    recipe = write_tiny_recipe(
        tmp_path,
        **{"num_probe_slots": 2, "num_generations": 4, "keep_ratio": 0.4, "learning_rate": 1e-3, "max_steps": 6},
        **{"save_strategy": "steps", "save_steps": 1, "logging_steps": 1},
    )
    questions = [{"question": f"who is person {index}", "golden_answers": ["nobody"]} for index in range(7)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def train(accelerate: str, output: str, *words: str) -> tuple[list[dict], str]:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launch += ["--config_file", f"recipes/accelerate_configs/{accelerate}.yaml", "-m", "rex_rag.train"]
        done = subprocess.run(
            [*launch, "--config", str(recipe), "--output_dir", str(tmp_path / output), *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        state = json.loads((tmp_path / output / "trainer_state.json").read_text())
        return timeless(state["log_history"]), done.stderr

    # Two questions a step, seven in all: three steps an epoch, and one question that it leaves out.
    whole, _ = train("ddp_cpu", "whole")
    assert len(whole) == 6
    resumed, said = train("ddp_cpu", "resumed", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed == whole and "was written by" not in said
    weights = [load_file(tmp_path / output / "model.safetensors") for output in ("whole", "resumed")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])

    _, said = train("cpu", "resumed", "--resume_from_checkpoint", "true", "--max_steps", "7")
    assert "checkpoint-6 was written by 2 process(es) and is resumed by 1" in said
