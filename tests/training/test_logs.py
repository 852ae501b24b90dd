"""What a step logs."""

from __future__ import annotations

import math

from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever


def test_a_figure_that_a_step_has_not_is_left_out_of_its_log(tmp_path):
    folder, settings = save_tiny_policy(tmp_path / "tiny"), {"per_device_train_batch_size": 6}
    trainer = tiny_trainer(folder, tmp_path / "run", BM25Retriever(PASSAGES), **settings)
    told = {}
    trainer.callback_handler.on_log = lambda args, state, control, logs: told.update(logs)  # what trackers get
    trainer.model.train()
    trainer._metrics["train"] |= {"em/probes": [math.nan, math.nan], "reward/probes": [math.nan, 0.5], "em": [0.0]}
    trainer.log({"loss": 1.0})
    [row] = trainer.state.log_history
    for logged in (row, told):
        assert "em/probes" not in logged
        assert (logged["reward/probes"], logged["em"], logged["loss"]) == (0.5, 0.0, 1.0)
