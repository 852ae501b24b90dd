"""A resumed run equals an uninterrupted one, the filter's moving average and all random draws included."""

import json

import pytest
import torch
from parts import PASSAGES
from tiny_training import save_tiny_policy, timeless, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever


def make_trainer(folder, output, settings):
    return tiny_trainer(
        folder,
        output,
        BM25Retriever(PASSAGES),
        recipe="recipes/example.yaml",
        max_steps=6,
        keep_ratio_schedule="accuracy_ema",
        max_turns=2,
        retrieval_top_k=1,
        **settings,
    )


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (3, {"per_device_train_batch_size": 18}),
        (2, {"per_device_train_batch_size": 9, "steps_per_generation": 2}),  # two updates a generation batch
        (3, {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2, "steps_per_generation": 2}),
        (2, {"per_device_train_batch_size": 18, "num_iterations": 2}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, at, settings):
    settings = {**settings, "save_steps": at}
    folder = save_tiny_policy(tmp_path / "tiny")

    whole = make_trainer(folder, tmp_path / "whole", settings)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{at}"
    state = json.loads((checkpoint / "rex_rag_state.json").read_text())
    assert 0 <= state["keep_ratio"]["value"] < 0.4  # the average moved: a random policy's probes are wrong

    resumed = make_trainer(folder, tmp_path / "resumed", settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert timeless(whole.state.log_history) == timeless(resumed.state.log_history)
    assert len(timeless(whole.state.log_history)) == 6
    assert sum(row.get("probes/kept", 0) for row in timeless(whole.state.log_history)[at:]) > 0
    for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    card = (tmp_path / "whole" / "README.md").read_text()
    for words in ("REX-RAG", "2508.08149", "recipes/example.yaml", "BM25", "em/originals"):
        assert words in card, words
