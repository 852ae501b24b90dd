"""Runs that end before they are done: signals, numbers that are none, a folder that is taken, nothing left to do."""

import os
import signal

import pytest
import torch
from parts import PASSAGES
from tiny_training import brevity, save_tiny_policy, timeless, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.support.errors import UserError
from rex_rag.training import launch
from rex_rag.training.checkpoints import checkpoints, finished_at
from rex_rag.training.finite import NonFinite, nonfinite
from rex_rag.training.interruption import Stopped
from rex_rag.training.run_folder import FolderError, held


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def make(policy, output, **settings):
    shared = {"per_device_train_batch_size": 18, "max_turns": 1, "retrieval_top_k": 1, "max_steps": 3, "save_steps": 1}
    return tiny_trainer(policy, output, BM25Retriever(PASSAGES), **shared | settings)


def signalling(*numbers):
    """A reward function that sends this process signals when it is called the second time."""
    calls = []

    def reward(completions, **_):
        calls.append(True)
        if len(calls) == 2:
            for number in numbers:
                os.kill(os.getpid(), number)
        return brevity(completions)

    reward.__name__ = "brevity"
    return reward


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_behind_a_saved_step_and_it_goes_on_as_if_nothing_was(policy, tmp_path, number):
    whole = make(policy, tmp_path / "whole", save_strategy="no")
    whole.train()
    before = signal.getsignal(number)
    stopped = make(policy, tmp_path / "out", reward_funcs=signalling(number), save_steps=100)
    with pytest.raises(Stopped, match=f"{number.name}.*checkpoint-2.*resume_from_checkpoint") as raised:
        stopped.train()
    assert raised.value.exit_code == 128 + number and signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    resumed = make(policy, tmp_path / "out", save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert timeless(resumed.state.log_history) == timeless(whole.state.log_history)
    for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_second_signal_ends_the_run_at_once(policy, tmp_path):
    trainer = make(policy, tmp_path / "out", reward_funcs=signalling(signal.SIGTERM, signal.SIGINT), save_steps=100)
    with pytest.raises(KeyboardInterrupt, match="ended without saving"):
        trainer.train()
    assert checkpoints(tmp_path / "out") == []


def test_weights_that_explode_are_neither_trained_on_nor_saved(policy, tmp_path):
    """Adam moves every weight by the learning rate: behind the first step they are 1e30, and their products none."""
    trainer = make(policy, tmp_path / "out", learning_rate=1e30, max_grad_norm=1.0)
    with pytest.raises(NonFinite) as raised:
        trainer.train()
    said = str(raised.value)
    assert "step 2: no token can be sampled" in said and "learning_rate (it is 1e+30)" in said
    assert "checkpoint-1 holds the weights that gave it" in said and "holds no good checkpoint" in said
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_what_is_not_finite_is_named(policy, tmp_path, where):
    trainer = make(policy, tmp_path / "out")
    if where == "weights":
        with torch.no_grad():
            trainer.model.model.norm.weight[0] = torch.nan
        with pytest.raises(
            NonFinite, match=r"1 weight tensors are not finite \(model.norm.weight\).*no good checkpoint"
        ):
            trainer.train()
        with pytest.raises(NonFinite, match="before saving"):
            trainer.save_model(str(tmp_path / "saved"))
        assert not (tmp_path / "saved" / "model.safetensors").exists()
        return
    plain = trainer.scored_batch

    def broken(output):
        output = plain(output)
        output["advantages"][0] = torch.inf
        return output

    trainer.scored_batch = broken
    with pytest.raises(NonFinite, match=r"the loss is (nan|inf|-inf).*advantages \(1 of \d+ entries\)"):
        trainer.train()


def test_nonfinite_by_hand():
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, torch.inf]), "c": torch.tensor([1, 2]), "d": torch.zeros(0)}
    weights["e"] = torch.tensor([torch.nan], dtype=torch.bfloat16)
    assert nonfinite(weights.items()) == ["b", "e"]
    assert nonfinite([]) == []


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_an_infinite_reward_is_refused_by_the_function_s_name(policy, tmp_path, value):
    def endless(completions, **_):
        return [value] * len(completions)

    with pytest.raises(UserError, match=r"endless gave -?inf"):
        make(policy, tmp_path / "out", reward_funcs=endless).train()


def test_a_folder_is_trained_into_by_one_run_at_a_time(tmp_path):
    with held(str(tmp_path / "out"), here=True):
        with pytest.raises(FolderError, match="another run is training into"), held(str(tmp_path / "out"), here=True):
            pass
        with held(str(tmp_path / "out"), here=False):  # another process of the same run
            pass
    with held(str(tmp_path / "out"), here=True):
        pass


def test_a_finished_run_says_so_and_trains_nothing(policy, tmp_path):
    trainer = make(policy, tmp_path / "out")
    trainer.train()
    last = str(tmp_path / "out" / "checkpoint-3")
    assert finished_at(last, 3, 3.0) == finished_at(last, 2, 3.0) == 3 and finished_at(last, 4, 3.0) is None
    # Three of the five steps of an epoch
    assert finished_at(last, -1, 0.6) == 3 and finished_at(last, -1, 1.0) is None
    with pytest.raises(launch.RunFinished, match=r"all 3 steps are done.*checkpoint-3"):
        launch.refuse_finished(trainer.args, last)
    launch.refuse_finished(trainer.args, str(tmp_path / "out" / "checkpoint-2"))
