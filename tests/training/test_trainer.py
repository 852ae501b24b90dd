"""The trainer against TRL's own: equal without probes, right masks, right numbers with them."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from parts import (
    PASSAGES,
    STOP_STRINGS,
    ScriptedGenerator,
    make_tiny_model,
    make_word_tokenizer,
    play,
    start_probe,
    token_gradients,
)
from peft import LoraConfig
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rex_rag.correction.forms import FORMS
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import SegmentKind

POOL = "<think> Wait I may be wrong .\n<think> Maybe not so .\n<think> Hold on .\n"
QUESTIONS = [
    {"question": f"where is the {thing}", "golden_answers": [answer]}
    for thing, answer in [("owl", "oak"), ("fox", "red"), ("river", "gold"), ("hill", "green")] * 4
]
SEARCH = "<think> owl </think> <search> owl </search>"
RIGHT, WRONG = "<think> so </think> <answer> oak </answer>", "<think> Maybe </think> <answer> red </answer>"
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "shuffle_dataset": False,
    "disable_tqdm": True,
    "beta": 0.04,
    "use_bias_correction_kl": False,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = make_word_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "pool.txt").write_text(POOL)
    (path / "prompt.txt").write_text("Question: {question}")
    return path


def config(model_path, tmp_path, **settings) -> REXRAGConfig:
    values = {
        **COMMON,
        "output_dir": str(tmp_path / "out"),
        "num_generations": 4,
        "num_probe_slots": 2,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "probe_probability": 1.0,
        "keep_ratio": 0.5,
        "max_prompt_length": 32,
        "max_turn_tokens": 40,
        "max_observation_tokens": 40,
        "max_sequence_length": 256,
        "retrieval_top_k": 1,
        "exploration_prompts": str(model_path / "pool.txt"),
        "prompt_template": str(model_path / "prompt.txt"),
        **settings,
    }
    return REXRAGConfig(**values)


def make_trainer(model_path, tmp_path, turns=None, reward_funcs=None, **settings) -> REXRAGTrainer:
    tokenizer = make_word_tokenizer()
    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        args=config(model_path, tmp_path, **settings),
        train_dataset=Dataset.from_list(QUESTIONS),
        retriever=BM25Retriever(PASSAGES),
        processing_class=tokenizer,
        reward_funcs=reward_funcs,
    )
    if turns is not None:
        play(trainer.sampler.agent, ScriptedGenerator(tokenizer, turns))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def leave_reference(trainer) -> None:
    """Move the policy a little, the same way every time, so that the KL to the reference model has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def generation_batch(trainer) -> list[dict]:
    group = trainer.num_generations
    questions = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation // group
    return [dict(trainer.train_dataset[index]) for index in range(questions) for _ in range(group)]


def gradients(trainer, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {name: value.grad.clone() for name, value in trainer.model.named_parameters()}


# Two questions, four rollouts each; some search, some answer at once, some never answer.
PLAIN_TURNS = [
    [SEARCH, RIGHT, WRONG, SEARCH, SEARCH, WRONG, RIGHT, "so so so"],
    [RIGHT, WRONG, SEARCH, RIGHT],
    [RIGHT],
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps_per_generation": 2, "per_device_train_batch_size": 4},  # TRL computes log pi_old itself
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ],
)
def test_without_probes_loss_and_gradients_equal_trl_bit_for_bit(model_path, tmp_path, settings):
    ours = make_trainer(model_path, tmp_path, PLAIN_TURNS, num_probe_slots=0, **settings)
    captured = {}
    generate = ours._generate

    def capture(prompts):
        captured["output"] = generate(prompts)
        captured["answers"] = [row.answer for row in ours._slots.rows]
        return captured["output"]

    ours._generate = capture
    leave_reference(ours)
    torch.manual_seed(0)
    our_inputs = ours._prepare_inputs(generation_batch(ours))

    def reward(completions, golden_answers, **_):
        return [float(a in golds) for a, golds in zip(captured["answers"], golden_answers, strict=True)]

    theirs = GRPOTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        reward_funcs=reward,
        args=GRPOConfig(
            **{**COMMON, "output_dir": str(tmp_path / "trl"), "num_generations": 4, "per_device_train_batch_size": 8}
            | settings
            | {"max_completion_length": 256, "max_steps": 2}
        ),
        train_dataset=ours.train_dataset,
        processing_class=make_word_tokenizer(),
    )
    theirs.current_gradient_accumulation_steps = theirs.args.gradient_accumulation_steps
    theirs.model.train()
    leave_reference(theirs)
    theirs._generate = lambda prompts: captured["output"]
    torch.manual_seed(0)
    their_inputs = theirs._prepare_inputs(generation_batch(theirs))

    assert set(their_inputs) < set(our_inputs)
    # Bit for bit, but where TRL's padding of the whole batch is trimmed.
    equal = partial(torch.allclose, rtol=1e-4, atol=1e-6) if ours.args.steps_per_generation > 1 else torch.equal
    for key, value in their_inputs.items():
        assert (equal if key.endswith("_logps") else torch.equal)(value, our_inputs[key]), key
    for step in range(ours.args.steps_per_generation):
        ours._step = theirs._step = step
        our_loss, our_gradients = gradients(ours, ours._prepare_inputs(None) if step else our_inputs)
        their_loss, their_gradients = gradients(theirs, theirs._prepare_inputs(None) if step else their_inputs)
        assert equal(our_loss, their_loss)
        for name, value in their_gradients.items():
            assert equal(value, our_gradients[name]), name
    assert any(value.abs().max() > 0 for value in their_gradients.values())


# Question 0 oak, question 1 red: originals 1 to 3 are wrong, and two of their probes are kept.
PROBED_TURNS = [
    [RIGHT, WRONG, SEARCH, RIGHT],
    [RIGHT],
    ["</think> <answer> oak </answer>", "</think> <answer> green </answer>"],
]


def score_by_parent(trainer, scores):
    trainer.sampler._score_probes = lambda probes: [scores[probe.parent] for probe in probes]


@pytest.fixture
def probed(model_path, tmp_path):

    def build(**settings):
        trainer = make_trainer(model_path, tmp_path, PROBED_TURNS, **settings)
        score_by_parent(trainer, {1: -1.0, 2: -3.0, 3: -2.0})
        return trainer

    return build


def scored(trainer):
    """The scored batch before it is shuffled."""
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(generation_batch(trainer))


def test_group_advantages_with_probes(probed):
    """Question 0: originals 1, 0 and a probe 1; question 1: originals 0, 0 and a probe 0 (2 and 3 are wrong).

    The filter keeps parents 1 (-1.0) and 3 (-2.0), drops 2 (-3.0). Group 0: mean 2/3, std sqrt(1/3) = 0.577350,
    so (1/3) / 0.577450 = 0.577250 and (-2/3) / 0.577450 = -1.154501 (TRL adds 1e-4 to the std).
    """
    trainer = probed()
    output = scored(trainer)
    batch = trainer._slots.batch
    assert [probe.parent for probe in batch.probes] == [1, 3]
    assert (batch.global_originals, batch.global_failed, batch.global_made, batch.global_kept) == (4, 3, 3, 2)
    # rows: question 0 original, original, probe; question 1 the same; the two empty slots are gone
    assert output["advantages"].tolist() == pytest.approx([0.577250, -1.154501, 0.577250, 0, 0, 0], abs=1e-5)
    kinds = output["segment_kinds"]
    assert [bool((row == SegmentKind.PROBE).any()) for row in kinds] == [False, False, True, False, False, True]
    assert float(output["mixing_share"]) == 2 / 6 and float(output["failure_rate"]) == 0.75


def test_padding_to_a_multiple_changes_no_gradient(probed):
    """TRL pads prompts and completions; what describes the rows' tokens is padded along."""
    found = []
    for multiple in (None, 16):
        trainer = probed(pad_to_multiple_of=multiple, epsilon=0.9)
        leave_reference(trainer)
        inputs = scored(trainer)
        found.append((inputs["completion_ids"].size(1), *gradients(trainer, inputs)))
    (width, loss, plain), (padded_width, padded_loss, padded) = found
    assert width % 16 and padded_width % 16 == 0
    assert torch.allclose(loss, padded_loss, atol=1e-6)
    for name, value in plain.items():
        assert torch.allclose(value, padded[name], atol=1e-5), name
    assert max(value.abs().max() for value in plain.values()) > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "vespo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"correction": "decoupled", "kl_token_max": 0.01},
    ],
    ids=str,
)
def test_padding_that_is_cut_changes_no_loss(probed, monkeypatch, settings):
    """The parent's loss on inputs as TRL pads them, and ours on trimmed ones with the long rows apart."""
    trainer = probed(**{"correction": "none", "epsilon": 0.9, **settings})
    check_trimming(trainer, monkeypatch)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "luspo", "sapo"])
def test_padding_that_is_cut_changes_no_loss_over_rows(probed, monkeypatch, loss_type):
    """These are refused beside probes, so they are set behind the settings' back."""
    trainer = probed(correction="none", epsilon=0.9)
    trainer.loss_type = loss_type
    check_trimming(trainer, monkeypatch)


def check_trimming(trainer, monkeypatch):
    batch = scored(trainer)
    width = batch["completion_ids"].size(1)
    for name, value in batch.items():  # as if another mini-batch of the generation batch held longer rows
        if value.dim() == 2:
            columns = value.new_full((value.size(0), 5), -1 if name == "segment_kinds" else 0)
            batch[name] = torch.cat([columns, value] if name.startswith("prompt") else [value, columns], dim=1)
    leave_reference(trainer)
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = [gradients(trainer, batch)]
    assert len(shapes) == 2 and shapes[0][1] < shapes[1][1] == width + batch["prompt_ids"].size(1) - 5
    monkeypatch.setattr("rex_rag.training.grpo_seams.trimmed", lambda inputs, multiple: dict(inputs))
    monkeypatch.setattr(trainer, "has_long_rows", lambda inputs: False)
    found.append(gradients(trainer, batch))
    assert shapes[2:] == [(6, width + batch["prompt_ids"].size(1) + 5)]
    (loss, ours), (parents, theirs) = found
    assert torch.allclose(loss, parents, rtol=1e-4, atol=1e-6)
    for name, value in theirs.items():
        assert torch.allclose(value, ours[name], rtol=1e-3, atol=1e-6), name
    assert max(value.abs().max() for value in theirs.values()) > 1e-3


def test_loss_mask_is_policy_and_probe(probed):
    trainer = probed()
    output = scored(trainer)
    filled = [row for row in trainer._slots.rows if row is not None]
    for index, row in enumerate(filled):
        length = row.completion_length
        assert output["completion_ids"][index, :length].tolist() == row.completion_ids
        assert output["completion_mask"][index].sum() == length
        assert output["tool_mask"][index, :length].tolist() == row.trained_mask
        assert output["segment_kinds"][index].tolist() == row.kinds + [-1] * (
            output["completion_ids"].size(1) - length
        )
    assert int(output["num_items_in_batch"]) == sum(sum(row.trained_mask) for row in filled)


@pytest.mark.parametrize("correction", FORMS)
def test_masked_tokens_have_exactly_zero_gradient(probed, correction):
    trainer = probed(correction=correction, beta=0.04, epsilon=0.9)
    inputs = scored(trainer)
    leave_reference(trainer)
    _, gradient = token_gradients(trainer, inputs)
    kinds = inputs["segment_kinds"]
    trained = (kinds == SegmentKind.POLICY) | (kinds == SegmentKind.PROBE)
    if correction == "continuation":
        inserted = kinds == SegmentKind.PROBE
        behind = (inserted.cumsum(1) == inserted.sum(1, keepdim=True)) & ~inserted
        assert int((trained & ~behind).sum()) == 17  # two prefixes of 3 tokens, prompts of 7 and of 4
        trained &= behind
    assert (kinds == SegmentKind.INFORMATION).any()
    assert (gradient[~trained] == 0).all()
    assert (gradient[trained] != 0).all()


@pytest.mark.parametrize("correction", ["token", "decoupled", "sequence", "none"])
def test_correction_forms_weight_the_gradient(probed, correction):
    """At pi_theta = pi_old without KL, d loss / d log pi of a token is -A * weight / number of trained tokens.

    a = 1/3, z = 3/4. Originals weigh 1 / (1 - a) = 1.5. The probe's prefix has |o'| = 3 tokens ("<think> Maybe
    </think>"), each weighing 1 / (2/3 + 1/3 * (4/3)^(1/3)); its continuation weighs 1 token by token.
    """
    trainer = probed(correction=correction, beta=0.0, epsilon=0.9)
    inputs = scored(trainer)
    logps, gradient = token_gradients(trainer, inputs)
    count = float(inputs["num_items_in_batch"])
    weight = -gradient * count / inputs["advantages"].unsqueeze(1)
    kinds = inputs["segment_kinds"]
    original = weight[1][kinds[1] == SegmentKind.POLICY]
    inserted = kinds[2] == SegmentKind.PROBE
    prefix, continuation = weight[2][:3], weight[2][(kinds[2] == SegmentKind.POLICY).nonzero()[3:].squeeze(1)]
    assert (kinds[2][:3] == SegmentKind.POLICY).all() and inserted[3]
    pool = inputs["pool_logps"][2][inserted].exp()
    assert pool.prod().item() == pytest.approx(1 / 3)
    old = logps[2][inserted].exp()
    if correction == "none":
        expected = {"original": 1.0, "prefix": 1.0, "inserted": torch.ones_like(old), "continuation": 1.0}
    elif correction == "sequence":
        ratio = (1 / 0.75) * (pool / old).prod()
        value = (1 / (2 / 3 + ratio / 3)).item()
        expected = {"original": 1.5, "prefix": value, "inserted": torch.full_like(old, value), "continuation": value}
    else:
        expected = {
            "original": 1.5,
            "prefix": 1 / (2 / 3 + (4 / 3) ** (1 / 3) / 3),
            "inserted": old / (2 / 3 * old + pool / 3),
            "continuation": 1.0,
        }
    assert original.tolist() == pytest.approx([expected["original"]] * len(original), rel=1e-4)
    assert prefix.tolist() == pytest.approx([expected["prefix"]] * 3, rel=1e-4)
    assert weight[2][inserted].tolist() == pytest.approx(expected["inserted"].tolist(), rel=1e-3)
    assert continuation.tolist() == pytest.approx([expected["continuation"]] * len(continuation), rel=1e-4)


def test_continuation_is_trained_as_plain_grpo_behind_its_context(probed):
    """The loss is divided by the tokens that are trained: originals 6, 6, 12 and 6, behind the prompts 4 and 4."""
    trainer = probed(correction="continuation", beta=0.0)
    inputs = scored(trainer)
    assert float(inputs["num_items_in_batch"]) == 38
    _, gradient = token_gradients(trainer, inputs)
    weight = -gradient * 38 / inputs["advantages"].unsqueeze(1)
    kinds = inputs["segment_kinds"]
    assert weight[1][kinds[1] == SegmentKind.POLICY].tolist() == pytest.approx([1.0] * 6)
    assert weight[2][kinds[2] == SegmentKind.POLICY].tolist() == pytest.approx([0.0] * 3 + [1.0] * 4)
    assert (weight[2][kinds[2] == SegmentKind.PROBE] == 0).all()
    metrics = trainer._metrics["train"]
    assert "importance_weight/max" not in metrics and "clip_ratio/probe" not in metrics
    # rollouts are as long as under any form: probes of 3 + 7 + 4 and 3 + 4 + 4 tokens
    assert metrics["completions/mean_length"][-1] == pytest.approx((6 + 6 + 12 + 6 + 14 + 11) / 6)


def test_unprompted_is_trained_without_the_prompt_and_rewarded_with_it(probed):
    sizes = {"steps_per_generation": 2, "per_device_train_batch_size": 4}  # so that TRL keeps log pi_old
    trainer = probed(correction="unprompted", log_completions=True, **sizes)
    inputs = scored(trainer)
    text = trainer._tokenizer.decode(inputs["completion_ids"][2][inputs["completion_mask"][2].bool()])
    assert text == "<think> Maybe </think> <answer> oak </answer>"
    assert not (inputs["segment_kinds"] == SegmentKind.PROBE).any()
    assert inputs["tool_mask"][2].tolist()[:6] == [1] * 6
    assert float(inputs["num_items_in_batch"]) == 6 + 6 + 12 + 6 + 6 + 6
    # log pi_old and log pi_ref are those of the shorter text
    ids = torch.cat([inputs["prompt_ids"][2], inputs["completion_ids"][2][:6]])[inputs["prompt_mask"][2].eq(0).sum() :]
    with torch.no_grad():
        logps = trainer.model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
    expected = [logps[place - 1, ids[place]].item() for place in range(len(ids) - 6, len(ids))]
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert inputs[name][2][:6].tolist() == pytest.approx(expected, abs=1e-4)
    # reward, advantage, length and table are the rollout's
    assert inputs["advantages"][:3].tolist() == pytest.approx([0.577250, -1.154501, 0.577250], abs=1e-5)
    assert list(trainer._logs["extra"]["is_probe"]) == [False, False, True, False, False, True]
    assert "[PROBE]" in trainer._logs["extra"]["trajectory"][2]
    metrics = trainer._metrics["train"]
    assert metrics["completions/max_length"][-1] == 14
    assert metrics["probes/kept"][-1] == 2 and metrics["probes/dropped"][-1] == 0


def test_a_probe_that_cannot_be_trained_leaves_its_slot_empty(model_path, tmp_path, caplog):
    """The first probe answers within its thought: it is out of rewards, a and the batch, and counted."""
    turns = [*PROBED_TURNS[:2], ["<answer> oak </answer>", "</think> <answer> green </answer>"]]
    trainer = make_trainer(model_path, tmp_path, turns, correction="unprompted", beta=0.0)
    score_by_parent(trainer, {1: -1.0, 2: -3.0, 3: -2.0})
    inputs = scored(trainer)
    batch = trainer._slots.batch
    assert [probe.parent for probe in batch.probes] == [3]
    assert (batch.global_made, batch.global_kept, batch.mixing_share) == (3, 1, 1 / 5)
    assert inputs["advantages"].size(0) == 5
    # question 0 has but its originals, 1 and 0: mean 1/2, std 0.707107
    assert inputs["advantages"][:2].tolist() == pytest.approx([0.707007, -0.707007], abs=1e-5)
    metrics = trainer._metrics["train"]
    assert metrics["probes/dropped"][-1] == metrics["probes/dropped/unclosed"][-1] == 1
    assert "could train none" not in caplog.text

    turns = [*PROBED_TURNS[:2], ["<answer> oak </answer>", "<answer> green </answer>"]]
    trainer = make_trainer(model_path, tmp_path, turns, correction="unprompted", beta=0.0)
    score_by_parent(trainer, {1: -1.0, 2: -3.0, 3: -2.0})
    inputs = scored(trainer)
    assert inputs["advantages"].size(0) == 4 and float(inputs["mixing_share"]) == 0
    assert "could train none of the 2 probes" in caplog.text


@pytest.mark.parametrize("correction", ["token", "decoupled"])
def test_nothing_is_off_policy_before_the_first_update(probed, correction):
    """TRL's off-policy mask compares pi_theta with what sampled: pi_old, and not mu."""
    trainer = probed(correction=correction, beta=0.0, epsilon=0.9, off_policy_mask_threshold=0.05)
    inputs = scored(trainer)
    inputs["advantages"] = -torch.ones_like(inputs["advantages"])  # TRL drops none of positive advantage
    _, gradient = token_gradients(trainer, inputs)
    behind = (inputs["segment_kinds"] == SegmentKind.POLICY) & (inputs["tool_mask"] == 1)
    assert (gradient[behind] != 0).all()


def test_a_loss_that_passes_the_correction_by_is_refused(probed, monkeypatch):
    trainer = probed()
    inputs = scored(trainer)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: torch.zeros(()))
    with pytest.raises(RuntimeError, match="would be trained uncorrected"):
        trainer.compute_loss(trainer.model, inputs)


@pytest.mark.parametrize(("mode", "counted"), [("sequence_truncate", "rows"), ("token_truncate", "tokens")])
def test_ratios_between_trainer_and_engine_are_of_rollouts_alone(probed, mode, counted):
    """The scripted engine reports -1 for every token it sampled; TRL counts the two empty slots' ratios too, as 1."""
    trainer = probed(correction="none", beta=0.0, vllm_importance_sampling_mode=mode)
    trainer.use_vllm = True
    inputs = scored(trainer)
    difference = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    mask = inputs["tool_mask"].bool() & inputs["completion_mask"].bool() & ~difference.isnan()
    if counted == "rows":
        expected = torch.where(mask, difference, 0.0).sum(1).exp()
    else:
        inserted = int((inputs["segment_kinds"] == SegmentKind.PROBE).sum())
        expected = torch.cat([difference[mask].exp(), torch.ones(inserted)])
    expected = expected.clamp(max=trainer.vllm_importance_sampling_clip_max)
    metrics = trainer._metrics["train"]
    for name, value in (("min", expected.min()), ("mean", expected.mean()), ("max", expected.max())):
        assert metrics[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx([value.item()], rel=1e-4)


@pytest.mark.parametrize("correction", ["floor", "continuation", "unprompted"])
def test_two_training_steps(model_path, tmp_path, correction):
    brevity = lambda completions, **_: [-0.01 * len(one[0]["content"]) for one in completions]  # noqa: E731
    trainer = make_trainer(model_path, tmp_path, PROBED_TURNS * 2, reward_funcs=brevity, correction=correction)
    score_by_parent(trainer, {0: -4.0, 1: -1.0, 2: -3.0, 3: -2.0})
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    history = [row for row in trainer.state.log_history if "em/originals" in row]
    assert [row["probes/kept"] for row in history] == [2, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_token_form_clips_originals_and_decoupled_does_not(probed):
    """a = 1/3 lies beyond the clip bound 1/6: eq. 7 starts originals at 1.5 and takes their positive gradient away."""
    for correction, flows in (("token", False), ("decoupled", True)):
        trainer = probed(correction=correction, beta=0.0, epsilon=0.2)
        inputs = scored(trainer)
        _, gradient = token_gradients(trainer, inputs)
        assert bool((gradient[0] != 0).any()) is flows
        sampled = inputs["segment_kinds"] == SegmentKind.POLICY
        assert int(sampled[0].sum()) == 6  # the one right original: <think> so </think> <answer> oak </answer>
        clipped = 0.0 if flows else 6 / int(sampled.sum())
        assert trainer._metrics["train"]["clip_ratio/policy"][-1] == pytest.approx(clipped)


def test_weights_are_truncated(probed):
    trainer = probed(correction="decoupled", correction_weight_max=1.2, beta=0.0)
    inputs = scored(trainer)
    _, gradient = token_gradients(trainer, inputs)
    weight = -gradient * float(inputs["num_items_in_batch"]) / inputs["advantages"].unsqueeze(1)
    original = weight[1][inputs["segment_kinds"][1] == SegmentKind.POLICY]
    assert original.tolist() == pytest.approx([1.2] * len(original), rel=1e-5)


def test_metrics_of_a_known_batch(probed):
    trainer = probed()
    inputs = scored(trainer)
    trainer.compute_loss(trainer.model, inputs)
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    expected = {
        "em/originals": 1 / 4,
        "em/probes": 1 / 2,
        "reward/originals": 1 / 4,
        "reward/probes": 1 / 2,
        "dead_end/rate": 1 / 2,  # question 1
        "dead_end/rescue_rate": 0.0,  # its probe answered green
        "probes/made": 3.0,
        "probes/kept": 2.0,
        "probes/mixing_share": 1 / 3,
        "probes/failure_rate": 3 / 4,
        "tokens/generated": 38.0,  # 4 turns of 6 tokens, 1 more behind the search, 2 continuations of 4
        "searches/mean": 1 / 6,  # one original of six rows searched once
        "invalid_actions/mean": 0.0,
        "truncations/turn": 0.0,
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value), key
    assert metrics["importance_weight/max"] == pytest.approx(1.5, rel=1e-4)
    assert 0 < metrics["importance_weight/ess"] <= 1


def test_completion_table_shows_trajectories_without_empty_slots(probed):
    trainer = probed(log_completions=True)
    scored(trainer)
    logs = trainer._logs
    assert len(logs["prompt"]) == len(logs["completion"]) == len(logs["advantages"]) == 6
    assert list(logs["extra"]["is_probe"]) == [False, False, True, False, False, True]
    assert "[PROBE]" in logs["extra"]["trajectory"][2] and "[INFORMATION]" in logs["extra"]["trajectory"][3]
    assert "<information>" not in logs["completion"][3][0]["content"]


def test_real_scores_are_mean_log_probs_of_the_inserted_tokens(model_path, tmp_path):
    """The filter's forward pass over the inserted tokens alone agrees with a plain forward pass, row by row."""
    trainer = make_trainer(model_path, tmp_path, [[WRONG, WRONG, SEARCH, "<answer> blue </answer>"], [RIGHT]])
    originals = trainer.sampler.agent.rollout([[3, 4, 5]] * 4)
    probes = [
        start_probe(trainer.sampler.agent, original, row, POOL.splitlines(), row % 3)
        for row, original in enumerate(originals)
    ]
    scores = trainer._score_probes(probes)
    for probe, score in zip(probes, scores, strict=True):
        ids = probe.prompt_ids + probe.completion_ids
        count = len(probe.segments[-1].ids)
        with torch.no_grad():
            logps = trainer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [logps[position - 1, ids[position]].item() for position in range(len(ids) - count, len(ids))]
        assert score == pytest.approx(sum(expected) / count, abs=1e-4)
    assert trainer._score_probes([]) == []


def test_empty_slots_are_not_sent_through_the_model(probed):
    trainer = probed()
    sizes = []
    forward = GRPOTrainer._get_per_token_logps_and_entropies

    def record(self, model, input_ids, *args, **kwargs):
        sizes.append(input_ids.size(0))
        return forward(self, model, input_ids, *args, **kwargs)

    GRPOTrainer._get_per_token_logps_and_entropies = record
    try:
        scored(trainer)
    finally:
        GRPOTrainer._get_per_token_logps_and_entropies = forward
    assert sizes == [6]  # the reference model's pass, six of eight rows


def test_training_with_a_sampling_policy_runs_and_moves(model_path, tmp_path):
    """A random policy never answers rightly, so shorter completions are rewarded too."""

    def brevity(completions, **_):
        return [-0.01 * len(completion[0]["content"]) for completion in completions]

    sizes = {"num_generations": 8, "num_probe_slots": 4, "per_device_train_batch_size": 32, "max_steps": 4}
    trainer = make_trainer(model_path, tmp_path, reward_funcs=brevity, **sizes)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    history = [row for row in trainer.state.log_history if "em/originals" in row]
    assert len(history) == 4
    assert sum(row["probes/kept"] for row in history) > 0
    for row in history:
        assert row["probes/kept"] <= math.floor(0.5 * 16)
        assert row["probes/mixing_share"] == pytest.approx(row["probes/kept"] / (16 + row["probes/kept"]))
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_further_reward_functions_read_model_text_alone(model_path, tmp_path):
    seen = []

    def mentions_oak(completions, **kwargs):
        seen.extend(completion[0]["content"] for completion in completions)
        return [float("oak" in completion[0]["content"]) for completion in completions]

    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        args=config(model_path, tmp_path, num_probe_slots=0, format_reward_weight=0.1, max_steps=1),
        train_dataset=Dataset.from_list(QUESTIONS),
        retriever=BM25Retriever(PASSAGES),
        processing_class=make_word_tokenizer(),
        reward_funcs=mentions_oak,
    )
    assert trainer.reward_weights.tolist() == pytest.approx([1.0, 0.1, 1.0])
    turns = [[SEARCH] * 4 + [WRONG] * 4, ["<answer> red </answer>"] * 4]  # the passage says oak, the model does not
    play(trainer.sampler.agent, ScriptedGenerator(trainer._tokenizer, turns))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    scored(trainer)
    assert not any("oak" in text for text in seen)
    assert list(trainer._logs["rewards"]["mentions_oak"]) == [0.0] * 8
    assert list(trainer._logs["rewards"]["format_reward"]) == [1.0] * 8


def test_further_reward_functions_never_see_an_empty_slot(model_path, tmp_path):
    seen = []

    def searches(completions, trajectory, question, log_extra, **_):
        seen.append(len(trajectory))
        log_extra("asked", list(question))
        if len(seen) == 2:  # a column that is filled now and then
            log_extra("searches", [len(item.searches) for item in trajectory])
        assert len(completions) == len(trajectory) == len(question)
        return [float(len(item.searches)) for item in trajectory]

    trainer = make_trainer(model_path, tmp_path, PROBED_TURNS * 3, reward_funcs=searches, log_completions=True)
    score_by_parent(trainer, {1: -1.0, 2: -3.0, 3: -2.0})
    for step in range(3):
        trainer.state.global_step = step
        output = scored(trainer)
        assert output["advantages"].size(0) == seen[-1] == 6
        assert list(trainer._logs["rewards"]["searches"]) == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
        assert len(trainer._logs["prompt"]) == len(trainer._logs["extra"]["asked"]) == 6
        trainer.log({})  # writes the table, whose columns must be equally long
        if step == 1:
            assert list(trainer._logs["extra"]["searches"]) == [0, 0, 0, 1, 0, 0]
    assert len(seen) == 3


def test_evaluation_may_hold_more_rows_than_a_generation_batch(model_path, tmp_path):
    trainer = make_trainer(model_path, tmp_path, per_device_eval_batch_size=16)
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_em/originals"] >= 0


def test_long_prompts_are_refused_in_every_dataset(model_path, tmp_path):
    long = [{"question": "where is the hill " * 10, "golden_answers": ["green"]}]
    shared = {
        "args": config(model_path, tmp_path),
        "retriever": BM25Retriever(PASSAGES),
        "processing_class": make_word_tokenizer(),
    }
    with pytest.raises(ValueError, match="more than max_prompt_length 32"):
        REXRAGTrainer(
            model=Qwen2ForCausalLM.from_pretrained(model_path),
            train_dataset=Dataset.from_list(QUESTIONS),
            eval_dataset={"far": Dataset.from_list(long)},
            **shared,
        )
    stream = Dataset.from_list(long * 8).to_iterable_dataset()
    trainer = REXRAGTrainer(model=Qwen2ForCausalLM.from_pretrained(model_path), train_dataset=stream, **shared)
    with pytest.raises(ValueError, match="more than max_prompt_length 32"):
        trainer.train()


def test_lora_trains_the_adapter_alone(model_path, tmp_path):
    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        args=config(
            model_path,
            tmp_path,
            num_generations=6,
            num_probe_slots=2,
            per_device_train_batch_size=12,
        ),
        train_dataset=Dataset.from_list(QUESTIONS),
        retriever=BM25Retriever(PASSAGES),
        processing_class=make_word_tokenizer(),
        reward_funcs=lambda completions, **_: [-0.01 * len(item[0]["content"]) for item in completions],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert any(row.get("kl", 0) > 0 for row in trainer.state.log_history)  # against the model without the adapter


def test_evaluation_samples_and_never_probes(model_path, tmp_path):
    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        args=config(model_path, tmp_path, per_device_eval_batch_size=8, num_generations_eval=2),
        train_dataset=Dataset.from_list(QUESTIONS),
        eval_dataset=Dataset.from_list(QUESTIONS),
        retriever=BM25Retriever(PASSAGES),
        processing_class=make_word_tokenizer(),
    )
    turns = [[RIGHT] * 8] * 4  # oak, which is right for one question in four
    play(trainer.sampler.agent, ScriptedGenerator(trainer._tokenizer, turns))
    metrics = trainer.evaluate()
    assert metrics["eval_em/originals"] == pytest.approx(1 / 4)
    assert metrics["eval_dead_end/rate"] == pytest.approx(3 / 4)
    assert not [name for name, value in metrics.items() if "probe" in name and value is not None]


def test_evaluation_sets_keep_their_names_and_every_question_its_weight(model_path, tmp_path):
    oak, *others = QUESTIONS[:4]
    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        args=config(model_path, tmp_path, per_device_eval_batch_size=4, log_completions=True),
        train_dataset=Dataset.from_list(QUESTIONS),
        eval_dataset={"mixed": Dataset.from_list([oak, *others, oak]), "wrong": Dataset.from_list(others)},
        retriever=BM25Retriever(PASSAGES),
        processing_class=make_word_tokenizer(),
    )
    turns = [[RIGHT] * 4, [RIGHT], [RIGHT] * 3]  # oak: of `mixed` in batches of 4 and 1, of `wrong` in one of 3
    play(trainer.evaluator, ScriptedGenerator(trainer._tokenizer, turns))
    trainer._logs["prompt"].append("a rollout of training")
    metrics = trainer.evaluate()
    assert metrics["eval_mixed_em/originals"] == pytest.approx(2 / 5)  # the mean over batches would be 0.625
    assert metrics["eval_wrong_em/originals"] == 0.0
    assert "eval_em/originals" not in metrics
    logged = [{name for name in row if name.endswith("em/originals")} for row in trainer.state.log_history]
    assert logged == [{"eval_mixed_em/originals"}, {"eval_wrong_em/originals"}]
    assert list(trainer._logs["prompt"]) == ["a rollout of training"]
    assert not list((tmp_path / "out" / "completions").glob("*.parquet"))


def test_the_card_of_the_best_weights_tells_their_figures_not_the_last_ones(model_path, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_own_em/originals"}
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(model_path),
        args=config(model_path, tmp_path, **best, **every_step, per_device_eval_batch_size=4, logging_steps=1),
        train_dataset=Dataset.from_list(QUESTIONS),
        eval_dataset={"own": Dataset.from_list(QUESTIONS[:4])},
        retriever=BM25Retriever(PASSAGES),
        processing_class=make_word_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    rows = [row for row in trainer.state.log_history if "eval_own_em/originals" in row]
    assert [row["eval_own_em/originals"] for row in rows] == [0.0, 0.0], "a random policy: the first stays the best"
    assert trainer.state.best_global_step == 1
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Last logged of own (4 questions), greedy, at step 1:" in card and "step: 1\n" in card
    assert "at step 2" not in card and "step: 2\n" not in card


# Refusals


def test_missing_columns_are_refused_before_the_model_loads(model_path, tmp_path):
    with pytest.raises(ValueError, match="no column 'golden_answers'; it has 'question', 'answer'"):
        REXRAGTrainer(
            model="does/not-exist",
            args=config(model_path, tmp_path),
            train_dataset=Dataset.from_list([{"question": "q", "answer": "a"}]),
            retriever=BM25Retriever(PASSAGES),
        )


def test_unreachable_retriever_is_refused_before_the_model_loads(model_path, tmp_path):
    class Away(BM25Retriever):
        def check(self):
            raise RetrievalError("nobody listens at http://127.0.0.1:9")

    with pytest.raises(RetrievalError, match="nobody listens"):
        REXRAGTrainer(
            model="does/not-exist",
            args=config(model_path, tmp_path),
            train_dataset=Dataset.from_list(QUESTIONS),
            retriever=Away(PASSAGES),
        )


def test_long_prompt_is_refused_by_name(model_path, tmp_path):
    rows = [*QUESTIONS, {"question": "where is the hill " * 10, "golden_answers": ["green"]}]
    with pytest.raises(ValueError, match=r"ends in '.*the hill.*has 42 tokens, more than max_prompt_length 32"):
        REXRAGTrainer(
            model=Qwen2ForCausalLM.from_pretrained(model_path),
            args=config(model_path, tmp_path),
            train_dataset=Dataset.from_list(rows),
            retriever=BM25Retriever(PASSAGES),
            processing_class=make_word_tokenizer(),
        )


@pytest.mark.parametrize(
    ("settings", "divergence"),
    [({"kl_token_max": math.inf}, math.exp(7) - 8), ({}, 10.0), ({"kl_on_probe_tokens": False}, 0.0)],
)
def test_kl_on_inserted_tokens(probed, settings, divergence):
    """log pi_ref - log pi_theta is 7 on inserted tokens: k3 = e^7 - 8 = 1088.6, d k3 / d log pi_theta = 1 - e^7."""
    trainer = probed(correction="none", beta=0.04, epsilon=0.9, **settings)
    inputs = scored(trainer)
    inserted, sampled = (inputs["segment_kinds"] == kind for kind in (SegmentKind.PROBE, SegmentKind.POLICY))
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] + 7 * inserted
    _, gradient = token_gradients(trainer, inputs)
    metrics = trainer._metrics["train"]
    assert metrics["kl/probe"][-1] == pytest.approx(divergence, rel=1e-4)
    assert metrics["kl/policy"][-1] == pytest.approx(0.0, abs=1e-5)
    assert metrics["kl_bounded/probe"][-1] == (0.0 if settings else 1.0)
    assert metrics["kl_bounded/policy"][-1] == 0.0
    # without the KL's part, the surrogate's gradient at pi_theta = pi_old is -A per trained token
    surrogate = -inputs["advantages"].unsqueeze(1).expand_as(gradient)
    slope = 0.04 * (1 - math.exp(7)) if "kl_token_max" in settings else 0.0
    scaled = gradient * float(inputs["num_items_in_batch"])
    assert torch.allclose(scaled[inserted], surrogate[inserted] + slope, rtol=1e-4, atol=1e-4)
    assert torch.allclose(scaled[sampled], surrogate[sampled], rtol=1e-4, atol=1e-4)


def test_a_vllm_server_of_too_short_a_context_is_refused_before_the_run(model_path, tmp_path):
    """Stands in for TRL's connection to a server, which needs a GPU."""
    trainer = make_trainer(model_path, tmp_path)
    trainer.use_vllm, trainer.args.vllm_max_model_length = True, 256
    info = {"model_config": {"max_model_len": 200}}
    trainer.vllm_mode = "server"
    trainer.vllm_generation = SimpleNamespace(vllm_client=SimpleNamespace(get_server_info=lambda: info))
    with pytest.raises(ValueError, match=r"takes 200 tokens of a row, less than vllm_max_model_length 256"):
        trainer._make_sampler(trainer.args.agent_protocol(), trainer.retriever)
    info["model_config"]["max_model_len"] = 256
    sampler = trainer._make_sampler(trainer.args.agent_protocol(), trainer.retriever)
    assert sampler.agent.driver.generator(STOP_STRINGS).equal_rows
