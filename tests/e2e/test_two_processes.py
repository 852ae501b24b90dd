"""Two real processes on CPU: DDP and DeepSpeed ZeRO-3 train without a hang, agree on the filter and replace groups.

Where one keeps the other waiting, the watchdog of both says so.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from parts import make_bpe_tokenizer, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_bpe_tokenizer(320)
    make_tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompt.txt").write_text("Question: {question}")
    return folder


def run_ranks(name: str, model: Path, folder: Path, *arguments: str) -> list[dict]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", f"recipes/accelerate_configs/{name}.yaml"]
    result = subprocess.run(
        [*launch, "tests/e2e/rank_worker.py", str(model), str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    (folder / "stderr.txt").write_text(result.stderr)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    checksums = [rank["checksum"] for rank in ranks if rank["checksum"] is not None]
    assert checksums and len(set(checksums)) == 1
    return ranks


@pytest.mark.parametrize("name", ["ddp_cpu", "zero3_cpu"])
def test_one_ranks_rescues_are_imitated_on_both(name, model, tmp_path):
    ranks = run_ranks(name, model, tmp_path, "rescue_replay")
    log = ranks[0]["log"]
    assert len(log) == 3 and log[-1]["replay/rescue"] > 0 and log[-1]["grad_norm"] > 0
    nll = [row["replay/rescue_nll"] for row in log if "replay/rescue_nll" in row]
    assert nll[-1] < nll[0]
    said = (tmp_path / "stderr.txt").read_text()
    stage = r"stage 'generation batch > rewards' for \d s \("
    assert re.search(f"watchdog: step 1, process 1 of 2 is in {stage}.*slow_brevity", said)
    assert re.search(f"watchdog: step 1, process 0 of 2 waits for the other processes in {stage}", said)


@pytest.mark.parametrize("name", ["ddp_cpu", "zero3_cpu"])
def test_ranks_finish_together_and_agree(name, model, tmp_path):
    ranks = run_ranks(name, model, tmp_path)
    first, second = (rank["records"] for rank in ranks)
    assert len(first) == len(second) == 3 * 2  # every step asks once more for groups without signal
    for call, (one, two) in enumerate(zip(first, second, strict=True)):
        assert one["generate_calls"] == two["generate_calls"] > 0
        assert one["global"] == two["global"]
        originals, _, made, kept = one["global"]
        assert made == len(one["scores"]) + len(two["scores"])
        if call % 2 == 0:  # two groups of three originals each
            assert two["own_turns"] == 1 < one["own_turns"]
            assert (originals, one["originals"], two["originals"]) == (12, 6, 6)
            room = math.floor(0.25 * originals)
        else:  # rank 1's groups hold right and wrong answers, and stay with their probes
            assert (originals, one["originals"], two["originals"]) == (6, 6, 0)
            room = math.floor(0.25 * 12) - len(second[call - 1]["kept"])
        assert kept == min(made, room) == len(one["kept"]) + len(two["kept"])
        scores = [
            (-score, rank, parent) for rank, record in ((0, one), (1, two)) for parent, score in record["scores"]
        ]
        best = sorted((rank, parent) for _, rank, parent in sorted(scores)[:kept])
        assert best == sorted([(0, parent) for parent in one["kept"]] + [(1, parent) for parent in two["kept"]])
    assert any(record["global"][3] for record in first)
    # Rank 0 has the questions 0, 1 and 4, then the first again; rank 1 has 2 and 3, then two more again: 4 of 8 rows.
    assert [rank["evaluated"] for rank in ranks] == [2 / 5, 2 / 5]
    log = ranks[0]["log"]
    assert len(log) == 3 and all(row["grad_norm"] > 0 for row in log)
    assert [(row["dynamic_sampling/rounds"], row["dynamic_sampling/replaced"]) for row in log] == [(1, 2)] * 3
