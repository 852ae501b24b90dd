"""What training writes on screen by itself, in Python as from the command line."""

from __future__ import annotations

import pytest
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.training.shown_rollouts import print_rollouts
from rex_rag.visualization.records import read_completion_tables


def test_a_step_is_a_line_and_two_rollouts_and_all_of_them_are_on_disk(tmp_path, retriever, capsys):
    policy = save_tiny_policy(tmp_path / "policy")
    settings = {"max_steps": 2, "save_strategy": "no", "log_completions": True, "disable_tqdm": False}
    trainer = tiny_trainer(policy, tmp_path / "run", retriever, per_device_train_batch_size=12, **settings)
    capsys.readouterr()
    trainer.train()
    written = capsys.readouterr().out
    for step in (1, 2):
        assert written.count(f"step {step}/2  EM ") == 1
        assert written.count(f"--- step {step}, rollout ") == 2
    assert "rewards/exact_match_reward/mean" not in written and "train_runtime" not in written
    assert len(read_completion_tables(tmp_path / "run")) > 2 * 2


@pytest.mark.parametrize(("asked", "shown"), [(2, ["1", "4"]), (None, list("123456")), (0, []), (9, list("123456"))])
def test_as_many_rollouts_as_asked_for_from_all_of_the_table(asked, shown, capsys):
    texts = [f"text {row} " * 1000 for row in range(6)]
    extra = {"question": ["who?"] * 6, "golden_answers": [["oak"]] * 6, "trajectory": texts, "is_probe": [False] * 6}
    print_rollouts(
        ["p"] * 6, ["c"] * 6, {"em": [1.0] * 6}, [0.5] * 6, 3, asked, extra | {"predicted_answer": [None] * 6}
    )
    written = capsys.readouterr().out
    assert [line.split()[4] for line in written.splitlines() if line.startswith("--- step 3")] == shown
    assert len(written) < 2500 * max(len(shown), 1)
