"""The collapse guard: bounds by hand, and what each mode does in a run whose figures leave them."""

import logging

import pytest
import torch
from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.support.errors import UserError
from rex_rag.training.checkpoints import checkpoints
from rex_rag.training.collapse_guard import Collapsed
from rex_rag.training.health_figures import BOUNDS, Figures, Out
from rex_rag.training.metrics import is_garbled, is_repetitive
from rex_rag.training.run_settings import changed_settings
from rex_rag.types import Segment, SegmentKind, Trajectory

HEALTHY = {
    **{"entropy": 0.5, "grad_norm": 0.1, "kl/policy": 0.01, "likelihood/good": -0.5, "repetitive/rate": 0.0},
    **{"garbled/rate": 0.0, "invalid_actions/mean": 0.2, "unanswered/rate": 0.1, "completions/mean_length": 100.0},
}
BROKEN = {
    **{"entropy": 1.6, "grad_norm": 5.1, "kl/policy": 2.1, "likelihood/good": -2.6, "repetitive/rate": 0.6},
    **{"garbled/rate": 0.3, "invalid_actions/mean": 1.6, "unanswered/rate": 0.6, "completions/mean_length": 410.0},
}


@pytest.mark.parametrize("name", BOUNDS)
def test_each_figure_breaks_by_itself_and_a_missing_one_does_not(name):
    figures, broken = Figures(), HEALTHY | {name: BROKEN[name]}
    for step in range(1, 4):
        figures.add(step, HEALTHY)
    figures.add(4, {})
    figures.add(5, {name: float("nan")})
    assert figures.out == {} and figures.out_since is None
    assert [figures.add(step, broken) for step in (6, 7)] == [False, False]
    assert figures.out == {name: Out(BROKEN[name], HEALTHY[name], since=6, logs=2)} and figures.out_since == 6
    assert not figures.add(8, HEALTHY) and figures.out == {}
    # Told once, and once again after all was well.
    assert [figures.add(step, broken) for step in range(9, 14)] == [False, False, True, False, False]
    assert [figures.add(step, one) for step, one in enumerate([HEALTHY, *[broken] * 3], 14)] == [False] * 3 + [True]


def test_figures_of_rollouts_stand_through_the_updates_of_a_generation():
    """Four updates a generation: three generations out of bounds, though nine logs between say nothing of it."""
    figures, update = Figures(), {"kl/policy": 0.1}
    for step in range(1, 9):
        figures.add(step, HEALTHY if step % 4 == 1 else update)
    told = [figures.add(step, BROKEN | update if step % 4 == 1 else update) for step in range(9, 21)]
    assert told.index(True) == 8 and sum(told) == 1 and figures.out_since == 9  # in the log of step 17


def test_a_policy_that_was_bad_at_the_start_is_not_broken():
    base = HEALTHY | {"unanswered/rate": 0.9, "invalid_actions/mean": 3.0, "repetitive/rate": 0.6, "entropy": 3.0}
    figures = Figures()
    assert not any(figures.add(step, base) for step in range(10)) and not figures.out


def test_lengths_may_grow_over_a_run_and_not_at_once():
    figures = Figures()
    for step in range(150):
        figures.add(step, {"completions/mean_length": 100.0 * 1.02**step})
        assert not figures.out
    figures.add(150, {"completions/mean_length": 100.0 * 1.02**150 * 5})
    assert figures.out


def written(*texts, ids=None):
    return Trajectory([0], [Segment(SegmentKind.POLICY, ids or [1], text) for text in texts])


def test_repetition_and_garbage_by_hand():
    assert is_repetitive(written("x", ids=[1, 2] * 10))  # 17 runs, two different ones
    assert not is_repetitive(written("x", ids=list(range(20))))
    assert not is_repetitive(written("x", ids=[1, 2] * 9))  # 15 runs are too few to say
    assert not is_garbled(written("plain\ttext\n", "é 漢字 ₂"))
    assert is_garbled(written("plain", "half a \ufffd")) and is_garbled(written("bell \x07"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def make(policy, output, mode, broken=(), **settings):
    """A run of eight steps whose figures are out of bounds at those steps, the first time that it comes there."""
    shared = {"per_device_train_batch_size": 18, "max_turns": 1, "retrieval_top_k": 1, "max_steps": 8, "save_steps": 1}
    shared |= {"lr_scheduler_type": "constant", "collapse_guard": mode}
    trainer = tiny_trainer(policy, output, BM25Retriever(PASSAGES), **shared | settings)
    figures, seen = trainer.collapse_guard, []

    def log(args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            is_out = state.global_step in broken and state.global_step not in seen
            seen.append(state.global_step)
            logs = {"loss": 0.0, **(BROKEN if is_out else HEALTHY)}
            return type(figures).on_log(figures, args, state, control, logs=logs, **kwargs)

    figures.on_log = log
    return trainer


def test_warn_says_so_once_and_trains_on(policy, tmp_path, caplog):
    trainer = make(policy, tmp_path / "out", "warn", broken=(4, 5, 6, 7))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "seems to break" in record.getMessage()]
    assert len(said) == 1 and "step 6" in said[0] and "since step 4" in said[0]
    assert "entropy 1.6 (was 0.5)" in said[0] and trainer.state.global_step == 8


def test_two_logs_out_of_bounds_are_no_collapse(policy, tmp_path):
    trainer = make(policy, tmp_path / "out", "stop", broken=(2, 3, 5, 6), save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 8


def test_stop_names_the_last_checkpoint_from_before(policy, tmp_path):
    # Step 4's rollouts, which are out of bounds, are of checkpoint-3's weights.
    with pytest.raises(Collapsed, match=r"since step 4.*last good checkpoint is .*checkpoint-2\b") as raised:
        make(policy, tmp_path / "out", "stop", broken=(4, 5, 6)).train()
    assert raised.value.exit_code == 1
    assert [path.name for path in checkpoints(tmp_path / "out")][-1] == "checkpoint-5"  # 6 is not saved


def test_rollback_goes_on_from_before_with_a_lower_learning_rate(policy, tmp_path):
    trainer = make(policy, tmp_path / "out", "rollback", broken=(4, 5, 6))
    trainer.train()
    assert trainer.state.global_step == 8
    rates = {row["step"]: row["learning_rate"] for row in trainer.state.log_history if "loss" in row}
    assert list(rates) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [rates[step] for step in (1, 2)] == [2e-3] * 2
    assert [rates[step] for step in (3, 8)] == pytest.approx([6e-4] * 2)
    assert sorted(path.name for path in (tmp_path / "out" / "abandoned").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    ]
    # A later resume, of another process, keeps the lower rate, and a further rollback lowers it again.
    resumed = make(policy, tmp_path / "out", "rollback", broken=(7, 8, 9), max_steps=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    rates = {row["step"]: row["learning_rate"] for row in resumed.state.log_history if "loss" in row}
    assert [rates[step] for step in (2, 3, 5, 6, 9)] == pytest.approx([2e-3, 6e-4, 6e-4, 1.8e-4, 1.8e-4])


@pytest.mark.parametrize("before", [0, 3])
def test_where_going_back_does_not_help_it_stops(policy, tmp_path, before):
    """The first rollback goes to checkpoint-2, and so do the others, as nothing lies far enough before it."""
    trainer = make(policy, tmp_path / "out", "rollback")
    guard = trainer.collapse_guard
    guard.rollbacks = before

    def log(args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            logs = {"loss": 0.0, **(BROKEN if state.global_step > 3 else HEALTHY)}
            return type(guard).on_log(guard, args, state, control, logs=logs, **kwargs)

    guard.on_log = log
    with pytest.raises(Collapsed, match=r"after 3 rollbacks; .*-2\b"):
        trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * (1 if before else 0.3**3))


@pytest.mark.parametrize(
    "settings", [{"save_strategy": "no"}, {"deepspeed": {"zero_optimization": {"stage": 2}}}], ids=["no saves", "zero"]
)
def test_rollback_is_refused_where_it_cannot_be(policy, tmp_path, settings):
    with pytest.raises(UserError, match=r"collapse_guard is 'rollback', but .*use 'stop'"):
        make(policy, tmp_path / "out", "rollback", **settings)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_rollback_is_refused_under_what_accelerate_launches(policy, tmp_path, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=r"collapse_guard is 'rollback', but .*a run that is under way"):
        make(policy, tmp_path / "out", "rollback")


def test_what_is_watched_is_no_part_of_what_a_run_is_made_of(policy, tmp_path):
    one, other = (make(policy, tmp_path / mode, mode).run_settings for mode in ("warn", "stop"))
    assert changed_settings(one, other) == []


def test_a_run_logs_what_the_guard_watches(policy, tmp_path):
    trainer = make(policy, tmp_path / "out", "off", max_steps=2, save_strategy="no")
    trainer.train()
    assert {*BOUNDS} <= {*trainer.state.log_history[0]}
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["likelihood/good"]))
