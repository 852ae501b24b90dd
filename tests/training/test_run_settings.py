"""What a run goes on with is what it began with, or it says by name what is not."""

import json
import logging

import pytest
from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.support.errors import UserError
from rex_rag.training.run_settings import changed_settings, recorded_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, as a function that makes it anew with other settings."""
    root = tmp_path_factory.mktemp("run")
    folder = save_tiny_policy(root / "tiny")

    def make(passages=PASSAGES, **settings):
        shared = {"per_device_train_batch_size": 18, "max_turns": 1, "retrieval_top_k": 1, "max_steps": 1}
        shared |= {"save_steps": 1}
        return tiny_trainer(folder, root / "out", BM25Retriever(passages), **shared | settings)

    make().train()
    return make, root / "out" / "checkpoint-1"


def test_an_unchanged_run_goes_on_without_a_word(run, caplog):
    make, checkpoint = run
    with caplog.at_level(logging.WARNING):
        make(max_steps=1, logging_steps=5, save_steps=7).train(resume_from_checkpoint=str(checkpoint))
    assert "a setting changed" not in caplog.text


def test_every_change_that_takes_effect_is_told_by_name(run, caplog):
    make, checkpoint = run
    others = {"seed": 7, "beta": 0.5, "probe_probability": 0.1, "keep_ratio": 0.2, "correction": "none"}
    others |= {
        "max_steps": 2,
        "max_turns": 2,
        "num_generations": 9,
        "exploration_pool_size": 2,
        "lr_scheduler_type": "constant",
    }
    trainer = make(passages=PASSAGES[:-1], rounds=2, **others)
    changes = "\n".join(changed_settings(recorded_settings(str(checkpoint)), trainer.run_settings))
    named = {line.split(":")[0] for line in changes.splitlines()}
    assert named >= {*others} - {"exploration_pool_size"} | {"exploration_prompts", "questions.rows", "retriever"}
    assert "max_steps: 1 against 2" in changes and "questions.rows: 16 against 8" in changes


@pytest.mark.parametrize("setting", [{"learning_rate": 1e-6}, {"weight_decay": 0.1}, {"adam_beta1": 0.5}])
def test_a_change_that_the_checkpoint_would_undo_is_refused(run, setting):
    make, checkpoint = run
    with pytest.raises(UserError, match=f"{next(iter(setting))}: .* against"):
        make(**setting).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_holds_no_machine_s_paths(run):
    _, checkpoint = run
    state = json.loads((checkpoint / "rex_rag_state.json").read_text())
    assert str(checkpoint.parent.parent) not in json.dumps(state["settings"])
