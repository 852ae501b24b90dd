"""A resumed run equals an uninterrupted one: questions, trajectories, draws, the filter's moving average, weights."""

import json

import pytest
import torch
from parts import PASSAGES
from tiny_training import save_tiny_policy, timeless, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.epoch_sampler import EpochSampler


def make_trainer(folder, output, settings):
    """Eight questions, three a generation batch: two batches an epoch, and two questions that an epoch leaves out."""
    shared = {"keep_ratio_schedule": "accuracy_ema", "max_turns": 1, "retrieval_top_k": 1, "save_steps": 1}
    shared |= {"hub_token": "hf_SECRET"}
    return tiny_trainer(
        folder, output, BM25Retriever(PASSAGES), rounds=2, recipe="recipes/example.yaml", **shared | settings
    )


def test_order_of_questions_follows_from_seed_and_epoch():
    order = {"mini_repeat_count": 1, "batch_size": 3, "repeat_count": 1, "seed": 7}
    uninterrupted = EpochSampler(range(8), **order)
    epochs = []
    for epoch in range(3):
        uninterrupted.epoch = epoch
        epochs.append(list(uninterrupted))
        resumed = EpochSampler(range(8), **order)
        resumed.epoch = epoch
        assert list(resumed) == epochs[epoch] and len(epochs[epoch]) == 6
    assert len({tuple(one) for one in epochs}) == 3
    generator = torch.Generator().manual_seed(7)  # as TRL's, in an uninterrupted run
    assert epochs == [torch.randperm(8, generator=generator).tolist()[:6] for _ in range(3)]
    assert list(EpochSampler(range(8), shuffle=False, **order)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("steps", "at", "settings"),
    [
        # Two steps an epoch: from the end of the first, within the third, and before its last step.
        (6, (2, 5), {"per_device_train_batch_size": 18}),
        # Four steps an epoch, of two generation batches: from between those of the second.
        (7, (6,), {"per_device_train_batch_size": 9, "steps_per_generation": 2, "dataloader_num_workers": 1}),
        (5, (3,), {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2, "steps_per_generation": 2}),
        (7, (6,), {"per_device_train_batch_size": 18, "num_iterations": 2}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, steps, at, settings):
    settings = {**settings, "max_steps": steps}
    folder = save_tiny_policy(tmp_path / "tiny")

    whole = make_trainer(folder, tmp_path / "whole", settings)
    whole.train()
    logged = timeless(whole.state.log_history)
    assert len(logged) == steps
    # The token is there to push with, and in nothing that would be pushed.
    assert whole.args.hub_token == "hf_SECRET"
    saved = [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert (tmp_path / "whole" / "checkpoint-1" / "training_args.bin") in saved
    assert [path for path in saved if b"hf_SECRET" in path.read_bytes()] == []
    state = json.loads((tmp_path / "whole" / f"checkpoint-{at[0]}" / "rex_rag_state.json").read_text())
    assert 0 <= state["keep_ratio"]["value"] < 0.4  # the average moved: a random policy's probes are wrong

    for step in at:
        resumed = make_trainer(folder, tmp_path / f"resumed_{step}", settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert timeless(resumed.state.log_history) == logged
        for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert sum(row.get("probes/kept", 0) for row in logged) > 0

    card = (tmp_path / "whole" / "README.md").read_text()
    for words in ("REX-RAG", "2508.08149", "recipes/example.yaml", "BM25", "em/originals"):
        assert words in card, words


def test_a_run_resumed_within_a_generation_batch_asks_each_question_when_its_turn_is(tmp_path):
    settings = {"per_device_train_batch_size": 9, "steps_per_generation": 2, "max_steps": 8, "num_probe_slots": 0}
    folder = save_tiny_policy(tmp_path / "tiny")

    def asked(trainer, **resume):
        batches = []
        generate = trainer._generate_and_score_completions

        def recorded(inputs):
            batches.append((trainer.state.global_step, sorted({row["question"] for row in inputs})))
            return generate(inputs)

        trainer._generate_and_score_completions = recorded
        trainer.train(**resume)
        return batches

    whole = asked(make_trainer(folder, tmp_path / "whole", settings))
    assert [step for step, _ in whole] == [0, 2, 4, 6]
    resumed = asked(
        make_trainer(folder, tmp_path / "resumed", settings),
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"),
    )
    # The batch of steps 4 and 5 is generated anew for step 5 alone; the next one comes at its own step.
    assert resumed == [(5, whole[2][1]), whole[3]]


def test_a_trainer_that_trained_before_resumes_with_rollouts_of_its_own(tmp_path):
    """Stopped in a generation batch and resumed within it, in the same process."""
    settings = {"per_device_train_batch_size": 9, "steps_per_generation": 2, "max_steps": 4, "num_probe_slots": 0}
    trainer = make_trainer(save_tiny_policy(tmp_path / "tiny"), tmp_path / "out", settings)
    steps, generate = [], trainer._generate_and_score_completions

    def recorded(inputs):
        steps.append(trainer.state.global_step)
        return generate(inputs)

    trainer._generate_and_score_completions = recorded
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert steps == [0, 2, 1, 2]
