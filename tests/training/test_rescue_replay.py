"""Rescue replay: which rows are kept and drawn, what they weigh, and the loss of a batch that holds some, by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from parts import PASSAGES, ScriptedGenerator, make_tiny_model, make_word_tokenizer, play, token_gradients
from transformers import Qwen2ForCausalLM

from rex_rag.probes.mixed_sampling import MixedBatch
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.rescue_replay import (
    MAX_AGE,
    Imitated,
    RescueReplay,
    Role,
    imitation_advantages,
    without_ratio,
)
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import Segment, SegmentKind, Trajectory


def row(token: int, length: int = 2) -> Trajectory:
    """A trajectory of `length` trained tokens behind an observation."""
    segments = [
        Segment(SegmentKind.INFORMATION, [1], "<information>x</information>"),
        Segment(SegmentKind.POLICY, [token] * length, "said", [-0.5] * length),
    ]
    return Trajectory(prompt_ids=[7], segments=segments)


def batch(originals: list[tuple[int, bool]], probes: list[tuple[int, int, bool]] = ()) -> MixedBatch:
    """Originals as (token, right), probes as (token, parent, right)."""
    made = []
    for token, parent, _ in probes:
        probe = row(token)
        probe.parent, probe.trained = parent, row(token)
        made.append(probe)
    count = len(originals)
    return MixedBatch(
        [row(token) for token, _ in originals],
        [right for _, right in originals],
        made,
        [right for *_, right in probes],
        len(made),
        count,
        count,
        len(made),
        len(made),
    )


def drawn(replay: RescueReplay, step: int) -> Counter:
    """(role, token) of the rows of a step."""
    return Counter((one.role, one.trajectory.completion_ids[-1]) for one in replay.draw(step))


def test_rescues_are_right_probes_of_dead_ends_and_right_originals_are_kept():
    replay = RescueReplay(rows=9, seed=0)
    # two originals a question: the first question has a right one, the second is a dead end, the third as well
    mixed = batch(
        [(10, True), (11, False), (12, False), (13, False), (14, False), (15, False)],
        [(20, 1, True), (21, 2, True), (22, 3, False), (23, 5, False)],
    )
    replay.add([mixed], originals=2, step=0)
    assert drawn(replay, 0) == {(Role.RESCUE, 21): 1, (Role.RIGHT, 10): 1}


def test_nothing_is_drawn_while_there_is_no_rescue():
    replay = RescueReplay(rows=9, seed=0)
    replay.add([batch([(10, True), (11, True)], [])], originals=2, step=0)
    assert replay.draw(0) == []


def test_a_third_of_the_rows_are_rescues_and_draws_follow_from_seed_and_step():
    replay, twin, other = RescueReplay(9, seed=0), RescueReplay(9, seed=0), RescueReplay(9, seed=1)
    rescued = batch([(9, False)] * 12, [(20 + index, index, True) for index in range(12)])
    right = batch([(40 + index, True) for index in range(24)])
    for one in (replay, twin, other):
        one.add([rescued, right], originals=1, step=0)
    first = drawn(replay, 0)
    assert Counter(role for role, _ in first.elements()) == {Role.RESCUE: 3, Role.RIGHT: 6}
    assert first == drawn(twin, 0) == drawn(replay, 0)
    assert first != drawn(replay, 1) and first != drawn(other, 0)


def test_rows_leave_with_age():
    """So a run whose dead ends are gone becomes plain GRPO again."""
    replay = RescueReplay(9, seed=0)
    replay.add([batch([(9, False)], [(20, 0, True)])], originals=1, step=3)
    replay.add([batch([(10, True)])], originals=1, step=3 + MAX_AGE - 1)
    assert replay.draw(0)
    replay.add([batch([(11, True)])], originals=1, step=3 + MAX_AGE)
    assert replay.draw(0) == []


def test_every_process_holds_what_all_have_sampled():
    own = batch([(9, False)], [(20, 0, True)])
    others = [Imitated.of(0, Role.RIGHT, row(30))]
    replay = RescueReplay(9, seed=0, gather=lambda found: [found, others])
    replay.add([own], originals=1, step=0)
    assert drawn(replay, 0) == {(Role.RESCUE, 20): 1, (Role.RIGHT, 30): 1}


def test_state_survives_json():
    replay, resumed = RescueReplay(9, seed=0), RescueReplay(9, seed=0)
    replay.add([batch([(9, False), (10, True)], [(20, 0, True)])], originals=1, step=5)
    resumed.load_state_dict(json.loads(json.dumps(replay.state_dict())))
    assert drawn(resumed, 6) == drawn(replay, 6) == {(Role.RESCUE, 20): 1, (Role.RIGHT, 10): 1}
    (one, *_) = resumed.draw(6)
    assert one.step == 5 and one.trajectory.trained_mask == [0, 1, 1] and one.trajectory.prompt_ids == [7]


def test_advantages_make_mean_log_likelihoods_of_the_loss():
    """200 tokens in the batch, 4 of rescues and 10 of right originals: 200/4 = 50, and 3 * 200/10 = 60."""
    rows = [Imitated.of(0, Role.RESCUE, row(1, 4)), *(Imitated.of(0, Role.RIGHT, row(2, 5)) for _ in range(2))]
    assert imitation_advantages(rows, 200, hold_weight=3.0) == {Role.RESCUE: 50.0, Role.RIGHT: 60.0}
    assert imitation_advantages(rows[:1], 200, hold_weight=3.0) == {Role.RESCUE: 50.0, Role.RIGHT: 0.0}


def test_imitated_rows_have_no_ratio():
    old, now = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[-0.5, -0.5], [-0.1, -9.0]])
    replaced = without_ratio(old, now, torch.tensor([Role.SAMPLED, Role.RESCUE]))
    assert replaced.tolist() == [[-1.0, -2.0], pytest.approx([-0.1, -9.0])]


# In the trainer

QUESTIONS = [{"question": "where is the owl", "golden_answers": ["oak"]}]
QUESTIONS += [{"question": "where is the fox", "golden_answers": ["red"]}]
OAK, RED, GOLD = (f"<think> so </think> <answer> {answer} </answer>" for answer in ("oak", "red", "gold"))
# Of the first question one of two originals is right, and its probe too; the second is a dead end with one rescue.
TURNS = [
    [OAK, GOLD, OAK, OAK],
    ["</think> <answer> oak </answer>", "</think> <answer> red </answer>", "</think> <answer> green </answer>"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = make_word_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(path)
    (path / "pool.txt").write_text("<think> Wait I may be wrong .\n<think> Hold on .\n")
    (path / "prompt.txt").write_text("Question: {question}")
    return path


def trainer_of(folder, tmp_path, **settings) -> REXRAGTrainer:
    tokenizer = make_word_tokenizer()
    values = {
        "output_dir": str(tmp_path / "out"),
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True},
        **{"save_strategy": "no", "shuffle_dataset": False, "use_bias_correction_kl": False, "beta": 0.0},
        **{"num_generations": 5, "num_probe_slots": 3, "per_device_train_batch_size": 10, "max_steps": 2},
        **{"probe_probability": 1.0, "probe_filter": "none", "correction": "rescue_replay", "hold_weight": 2.0},
        **{"max_prompt_length": 32, "max_turn_tokens": 40, "max_observation_tokens": 40, "max_sequence_length": 256},
        **{"retrieval_top_k": 1, "log_completions": True, "num_completions_to_print": 0},
        "exploration_prompts": str(folder / "pool.txt"),
        "prompt_template": str(folder / "prompt.txt"),
        **settings,
    }
    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder),
        args=REXRAGConfig(**values),
        train_dataset=Dataset.from_list(QUESTIONS),
        retriever=BM25Retriever(PASSAGES),
        processing_class=tokenizer,
    )
    play(trainer.sampler.agent, ScriptedGenerator(tokenizer, TURNS))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def scored(trainer) -> dict:
    """The scored batch before it is shuffled."""
    examples = [dict(trainer.train_dataset[index]) for index in range(2) for _ in range(5)]
    return trainer._generate_and_score_completions(examples)


@pytest.mark.parametrize("steps", [1, 2], ids=["aligned", "log pi_old kept"])
def test_the_loss_is_grpos_on_originals_and_mean_log_likelihoods(folder, tmp_path, steps):
    """Originals: of the first question 1 and 0, mean 0.5, std 0.707107, advantages +-0.5 / 0.707207 = 0.707007; of the
    dead end 0. Drawn: its rescue and the right original, of 6 tokens each, so 4 * 6 + 12 = 36 trained tokens in all:
    the rescue's count 36/6 = 6, the right original's 2 * 36/6 = 12. Probes themselves are not there."""
    trainer = trainer_of(folder, tmp_path, steps_per_generation=steps, per_device_train_batch_size=10 // steps)
    inputs = scored(trainer)
    assert not (inputs["segment_kinds"] == SegmentKind.PROBE).any()
    assert float(inputs["num_items_in_batch"]) == 36
    roles, advantages = inputs["roles"].tolist(), inputs["advantages"].tolist()
    sampled = [value for role, value in zip(roles, advantages, strict=True) if role == Role.SAMPLED]
    assert sampled == pytest.approx([0.707007, -0.707007, 0, 0], abs=1e-5)
    by_role = {role: value for role, value in zip(roles, advantages, strict=True) if role != Role.SAMPLED}
    assert by_role == {Role.RESCUE: pytest.approx(6.0), Role.RIGHT: pytest.approx(12.0)}
    texts = trainer._tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    # Its own thought, without the inserted one; the question is the one that it answers.
    assert texts[roles.index(Role.RESCUE)].split() == RED.split()
    prompts = trainer._tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
    assert "fox" in prompts[roles.index(Role.RESCUE)] and "owl" in prompts[roles.index(Role.RIGHT)]

    with torch.no_grad():  # away from pi_old, far enough for the clip
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    logps, gradients = token_gradients(trainer, inputs)
    width = logps.size(1)
    mask = (inputs["completion_mask"] * inputs["tool_mask"])[:, :width].bool()
    for role, expected in ((Role.RESCUE, -1 / 6), (Role.RIGHT, -2 / 6)):
        gradient = gradients[roles.index(role)][mask[roles.index(role)]]
        assert gradient.tolist() == pytest.approx([steps * expected] * 6, rel=1e-5)  # TRL: one mean an update
    metrics = trainer._metrics["train"]
    assert metrics["replay/rescue"] == [1.0] and metrics["replay/right"] == [1.0]
    expected = -logps[roles.index(Role.RESCUE)][mask[roles.index(Role.RESCUE)]].mean().item()
    assert metrics["replay/rescue_nll"] == [pytest.approx(expected, rel=1e-5)]


def test_probes_are_rewarded_and_shown_and_have_no_part_in_the_groups(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    scored(trainer)
    table, metrics = trainer._logs, trainer._metrics["train"]
    # two originals, a right probe; two originals, one right probe and a wrong one
    assert list(table["rewards"][trainer.reward_func_names[0]]) == [1, 0, 1, 0, 0, 1, 0]
    assert list(table["extra"]["is_probe"]) == [False, False, True, False, False, True, True]
    assert metrics["em/probes"] == [pytest.approx(2 / 3)] and metrics["dead_end/rescue_rate"] == [1.0]


def test_without_a_rescue_the_batch_is_plain_grpos(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    wrong = ["</think> <answer> oak </answer>", *["</think> <answer> green </answer>"] * 2]
    play(trainer.sampler.agent, ScriptedGenerator(trainer._tokenizer, [TURNS[0], wrong]))
    inputs = scored(trainer)
    assert "roles" not in inputs and inputs["completion_mask"].sum() == 24
    plain = trainer_of(folder, tmp_path, num_generations=2, num_probe_slots=0, per_device_train_batch_size=4)
    play(plain.sampler.agent, ScriptedGenerator(plain._tokenizer, TURNS[:1]))
    examples = [dict(plain.train_dataset[index]) for index in range(2) for _ in range(2)]
    theirs = plain._generate_and_score_completions(examples)
    assert torch.equal(inputs["advantages"][:4], theirs["advantages"])
    losses = [one.compute_loss(one.model, batch) for one, batch in ((trainer, inputs), (plain, theirs))]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-7)


def test_what_is_replayed_goes_into_checkpoints(folder, tmp_path):
    trainer, resumed = trainer_of(folder, tmp_path), trainer_of(folder, tmp_path / "resumed")
    scored(trainer)
    resumed.load_own_state(json.loads(json.dumps(trainer.own_state())))
    assert len(resumed._replay.draw(1)) == len(trainer._replay.draw(1)) == 2
    del (state := trainer.own_state())["replay"]
    resumed.load_own_state(state)  # a checkpoint of another form


def test_a_negative_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"hold_weight is -1.0, which would drive right answers away"):
        REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, correction="rescue_replay", hold_weight=-1.0)
