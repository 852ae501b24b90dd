"""Pushing over HTTP to a stand-in of the Hub: what arrives, what is tried again, what is said when nothing helps."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, hub_stand_in

from rex_rag.training.push import NotPushed, push

ROOT = Path(__file__).resolve().parents[2]

# The library reads its address once, when it is imported: so a process of its own.
PUSHING = """
import sys
from pathlib import Path
import rex_rag.training.push as pushing
pushing.PAUSES = (0.1, 0.1)
pushing.push.__defaults__ = ((0.1, 0.1),)
from rex_rag.support import hub
hub._SILENT_SECONDS = 1.0
from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.support.errors import RunEnded, refuse
from rex_rag.training.launch import run
folder, token = Path(sys.argv[1]), sys.argv[2]
hub.bound_hub_requests()
trainer = tiny_trainer(
    save_tiny_policy(folder / "tiny"), folder / "out", BM25Retriever(PASSAGES), max_steps=1, save_strategy="no",
    per_device_train_batch_size=18, max_turns=1, retrieval_top_k=1, num_probe_slots=0, push_to_hub=True,
    hub_model_id="me/model", hub_token=token,
)
try:
    run(trainer, None)
except RunEnded as ended:
    sys.exit(refuse(ended))
"""


def pushed(folder, hub, token=TOKEN):
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        **{"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_DISABLE_TELEMETRY": "1"},
    }
    return subprocess.run(
        [sys.executable, "-c", PUSHING, str(folder), token],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_model_arrives_whole_once_the_hub_answers(tmp_path):
    with hub_stand_in() as hub:
        hub.fails = ["drop", "hang"]  # a connection that is closed, one in which nothing comes
        done = pushed(tmp_path, hub)
        assert done.returncode == 0, done.stderr[-2000:]
        assert hub.fails == [] and hub.tokens == {TOKEN}
        [(summary, paths)] = hub.commits
        assert summary == "End of training"
        assert {"model.safetensors", "README.md", "agent.json", "tokenizer.json", "config.json"} <= {*paths}
        weights = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert hub.stored[hashlib.sha256(weights).hexdigest()] == weights
        assert not any(TOKEN.encode() in content for content in hub.stored.values())


@pytest.mark.slow
def test_a_hub_that_never_answers_leaves_a_whole_model_and_says_how_to_push_it(tmp_path):
    with hub_stand_in() as hub:
        hub.fails = [500] * 99
        done = pushed(tmp_path, hub)
    assert done.returncode == 1
    assert "error: me/model was not pushed" in done.stderr and "hf upload me/model" in done.stderr
    assert {"model.safetensors", "trainer_state.json", "README.md", "agent.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_token_that_may_not_is_not_tried_again():
    calls = []

    def upload():
        calls.append(True)
        raise OSError("403 Forbidden: you have no write access")

    with pytest.raises(NotPushed, match=r"o/m was not pushed \(OSError: 403"):
        push(upload, "out", "o/m")
    assert len(calls) == 1
