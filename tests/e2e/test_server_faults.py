"""Training goes on where a retrieval server dies: the same steps, trajectories and weights, only later."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tiny_training import save_tiny_policy, timeless, tiny_trainer
from transformers import TrainerCallback

from rex_rag.data.corpus import write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.types import Passage
from rex_rag.visualization.records import read_completion_tables
from tests.retrieval.servers import free_port

pytest.importorskip("fastapi", reason="the server needs fastapi: install the dev extra")

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from rex_rag.cli import main; sys.exit(main(sys.argv[1:]))"
STEPS = 5
CLIENT = "rex_rag.retrieval.remote"
pytestmark = pytest.mark.slow
logger = logging.getLogger(__name__)


def rex_rag(*words):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


class Served:
    """`rex-rag serve` in a process of its own, on a port that it keeps through its lives."""

    def __init__(self, index):
        self.index, self.port, self.process, self.lives = index, free_port(), None, 0
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = rex_rag("serve", "--index", self.index, "--port", self.port)
        self.lives += 1

    def wait_until_ready(self):
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.process.stderr.read()[-3000:]
            assert time.monotonic() < deadline, "the server did not become ready"
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stderr.close()
            self.process = None


class Accident(TrainerCallback):
    """Calls `happen` when a step begins, and what that returns in a thread of its own, beside the training."""

    def __init__(self, happen, steps):
        self.happen, self.steps, self.threads = happen, steps, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.steps:
            thread = threading.Thread(target=self.happen())
            thread.start()
            self.threads.append(thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that writes tags at random, and an index of passages in its words."""
    path = save_tiny_policy(tmp_path_factory.mktemp("faults"))
    words = ["red", "blue", "green", "gold", "oak", "elm", "fox", "owl", "river", "hill", "tree"]
    pairs = itertools.permutations(words, 2)
    passages = [Passage(str(row), one, f"the {one} is in the {two}") for row, (one, two) in enumerate(pairs)]
    write_corpus(passages, path / "corpus.jsonl")
    build = rex_rag("index", "--corpus", path / "corpus.jsonl", "--output", path / "index", "--kind", "bm25")
    _, said = build.communicate(timeout=120)
    assert build.returncode == 0, said[-3000:]
    return path


@pytest.fixture
def servers(folder):
    started = [Served(folder / "index"), Served(folder / "index")]
    yield started
    for server in started:
        server.kill()


def train(folder, output, retriever, *callbacks):
    """Train for a few steps; returns everything that time has no part in, and the seconds that searches took."""
    trainer = tiny_trainer(
        folder,
        output,
        retriever,
        rounds=STEPS,
        save_strategy="no",
        max_steps=STEPS,
        per_device_train_batch_size=24,
        max_turns=3,
        retrieval_top_k=2,
        log_completions=True,
        num_completions_to_print=0,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    seconds = sum(row["seconds/retrieval"] for row in trainer.state.log_history if "loss" in row)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return (timeless(trainer.state.log_history), read_completion_tables(output), weights), seconds


def assert_same_run(one, other):
    (history, records, weights), (other_history, other_records, other_weights) = one, other
    assert len(history) == len(other_history) == STEPS
    assert json.dumps(history) == json.dumps(other_history)  # NaN equals NaN here
    assert json.dumps(records, default=str) == json.dumps(other_records, default=str)
    assert weights.keys() == other_weights.keys()
    assert all(weights[name].equal(other_weights[name]) for name in weights)
    # Nothing of this would mean much if nothing had been searched for or learnt.
    assert all(row["searches/mean"] > 0 and row["grad_norm"] > 0 for row in history)
    found = {s["text"] for record in records for s in record["segments"] if s["kind"] == "INFORMATION"}
    assert len(found) > 10


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    server = Served(folder / "index")
    server.start()
    server.wait_until_ready()
    retriever = RemoteRetriever(server.url)
    yield train(folder, tmp_path_factory.mktemp("undisturbed"), retriever)
    retriever.close()
    server.kill()


def wait_for_a_search(retriever):
    """Until a search of the first server is under way; it is stopped, so that the search stays so."""
    deadline = time.monotonic() + 60
    while not retriever._servers[0].queries_under_way:
        assert time.monotonic() < deadline, "nothing was searched for"
        time.sleep(0.01)
    time.sleep(0.2)


def told(caplog, level):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == level and record.name.startswith(CLIENT)
    ]


def test_a_killed_and_restarted_server_loses_no_sample_and_no_step(folder, undisturbed, servers, tmp_path, caplog):
    server = servers[0]
    server.start()
    server.wait_until_ready()
    retriever = RemoteRetriever(server.url)

    def die():
        server.process.send_signal(signal.SIGSTOP)

        def in_flight():
            wait_for_a_search(retriever)
            server.kill()
            time.sleep(1.0)
            server.start()

        return in_flight

    accident = Accident(die, steps=(2, 4))
    with caplog.at_level(logging.INFO, logger=CLIENT):
        run, seconds = train(folder, tmp_path / "run", retriever, accident)
    for thread in accident.threads:
        thread.join()
    assert server.lives == 3
    assert_same_run(undisturbed[0], run)
    # A dead process, its connection cut with the answer outstanding: told once, not at each of the attempts.
    assert told(caplog, "WARNING") and "connection failed" in told(caplog, "WARNING")[0]
    assert len(told(caplog, "WARNING")) <= 2 and len(told(caplog, "INFO")) <= 2
    # Searches waited for both restarts, the pauses before them included.
    assert seconds > 2 * 1.2
    logger.info("searches took %.2f s, and %.1f s with two deaths and restarts", undisturbed[1], seconds)
    retriever.close()


def test_one_of_two_servers_dying_costs_only_time(folder, undisturbed, servers, tmp_path, caplog):
    for server in servers:
        server.start()
    for server in servers:
        server.wait_until_ready()
    retriever = RemoteRetriever([server.url for server in servers])

    def die():
        servers[0].process.send_signal(signal.SIGSTOP)

        def in_flight():
            wait_for_a_search(retriever)
            servers[0].kill()

        return in_flight

    accident = Accident(die, steps=(2,))
    with caplog.at_level(logging.INFO, logger=CLIENT):
        run, seconds = train(folder, tmp_path / "run", retriever, accident)
    for thread in accident.threads:
        thread.join()
    assert_same_run(undisturbed[0], run)
    [warning] = told(caplog, "WARNING")
    assert servers[0].url in warning and "the other servers are asked meanwhile" in warning
    # What the stopped server was given to answer in, and little else.
    assert seconds < 2.0
    logger.info("searches took %.2f s, and %.2f s with one of two servers dead", undisturbed[1], seconds)
    retriever.close()


def test_a_server_that_stays_away_ends_the_run_with_its_address(folder, servers, tmp_path):
    server = servers[0]
    server.start()
    server.wait_until_ready()
    retriever = RemoteRetriever(server.url, max_attempts=3, backoff=0.1)

    def die():
        server.kill()
        return lambda: None

    with pytest.raises(RetrievalError, match=rf"{server.url}/retrieve failed after 3 attempts: connection failed"):
        train(folder, tmp_path / "run", retriever, Accident(die, steps=(2,)))
    retriever.close()
