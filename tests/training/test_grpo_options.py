"""Every setting of TRL's that search rollouts make wrong is refused or warned of, and none is unjudged."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from parts import PASSAGES, make_tiny_model, make_word_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.grpo_options import dropped_out, training_problems, training_warnings
from rex_rag.training.trainer import REXRAGTrainer

PAGE = Path(__file__).parents[2] / "docs" / "grpo_config.md"
EVALUATES = {"eval_strategy": "steps", "num_generations_eval": 4}
SERVES = {"use_vllm": True, "vllm_mode": "server"}

# A value of each refused field that would be wrong, with what else makes it so.
REFUSED = {
    "num_generations": {"num_generations": 5, "num_probe_slots": 5},
    "num_generations_eval": EVALUATES | {"per_device_eval_batch_size": 6, "processes": 2},
    "max_completion_length": {"max_completion_length": 512},
    "generation_batch_size": {"generation_batch_size": 15},
    "steps_per_generation": {"steps_per_generation": 0},
    "temperature": {"temperature": 0.0},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.05},
    "generation_kwargs": {"generation_kwargs": {"no_repeat_ngram_size": 3}},
    "cache_implementation": {"cache_implementation": "quantized"},
    "vllm_mode": {"vllm_mode": "serve"},
    "vllm_model_impl": {"vllm_model_impl": "torch"},
    "vllm_structured_outputs_regex": {"vllm_structured_outputs_regex": "a+"},
    "vllm_max_model_length": SERVES | {"vllm_max_model_length": 4095},
    "num_iterations": {"num_iterations": 0},
    "epsilon": {"epsilon": 0.0},
    "epsilon_high": {"loss_type": "cispo"},
    "delta": {"delta": 1.1},  # originals start at up to 1 + keep_ratio = 1.12
    "loss_type": {"loss_type": "drgrpo"},
    "importance_sampling_level": {"importance_sampling_level": "turn"},
    "reward_weights": {"reward_weights": [1.0, 0.5], "format_reward_weight": 0.1},
    "multi_objective_aggregation": {"multi_objective_aggregation": "sum"},
    "scale_rewards": {"scale_rewards": "std"},
    "mask_truncated_completions": {"mask_truncated_completions": True},
    "top_entropy_quantile": {"top_entropy_quantile": 0.0},
    "max_tool_calling_iterations": {"max_tool_calling_iterations": 3},
    "vllm_importance_sampling_mode": {"vllm_importance_sampling_mode": "sequence"},
    "use_transformers_continuous_batching": {"use_transformers_continuous_batching": True},
    "use_transformers_paged": {"use_transformers_paged": True},
    "transformers_continuous_batching_config": {"transformers_continuous_batching_config": {"block_size": 32}},
    "per_device_train_batch_size": {"per_device_train_batch_size": 5, "processes": 2},
    "per_device_eval_batch_size": EVALUATES | {"per_device_eval_batch_size": 2, "processes": 2},
    "metric_for_best_model": {"metric_for_best_model": "eval_loss"},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "steps"},
    "lr_scheduler_type": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
    "remove_unused_columns": {"remove_unused_columns": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "data_seed": {"data_seed": 7},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "accelerator_config": {"accelerator_config": {"split_batches": True}},
    "parallelism_config": {"parallelism_config": ParallelismConfig(tp_size=2)},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "dataloader_in_order": {"dataloader_in_order": False},
    "include_for_metrics": {"include_for_metrics": ["inputs"]},
}

WARNED = {
    "disable_dropout": {"lora_dropout": 0.05},
    "shuffle_dataset": {"shuffle_dataset": False, "per_device_train_batch_size": 30},
    "vllm_enable_sleep_mode": {"use_vllm": True, "vllm_enable_sleep_mode": True},
    "loss_type": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sync_ref_model": {"sync_ref_model": True},
    "entropy_coef": {"entropy_coef": 0.01},
    "use_adaptive_entropy": {"use_adaptive_entropy": True},
    "use_bias_correction_kl": {"use_bias_correction_kl": True},
    "save_steps": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "save_steps": 101},
}

# The same fields where there is nothing to warn of.
SILENT = {
    "disable_dropout": {},
    "shuffle_dataset": {"shuffle_dataset": False},
    "vllm_enable_sleep_mode": {"vllm_enable_sleep_mode": True},
    "loss_type": {},
    "sync_ref_model": {},
    "entropy_coef": {"entropy_coef": 0.01, "num_probe_slots": 0},
    "use_adaptive_entropy": {"use_adaptive_entropy": True, "num_probe_slots": 0},
    "use_bias_correction_kl": {"use_bias_correction_kl": True, "beta": 0.0},
    "save_steps": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "save_steps": 100},
}

OTHER_REFUSALS = [
    {"accelerator_config": {"dispatch_batches": True}},
    {"accelerator_config": {"even_batches": False}},
    {"loss_type": None},
    {"loss_type": "bnpo"},
    {"loss_type": "vespo"},
    {"importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 1.5},
    {"delta": 1.0, "num_probe_slots": 0},
    {"delta": 1.15, "keep_ratio": 0.2},
    {"delta": 1.4, "probe_filter": "none", "probe_probability": 0.5},
    {"lr_scheduler_type": "greedy", "eval_strategy": "steps"},
]

ACCEPTED = [
    {"delta": 1.1, "num_probe_slots": 0},
    {"delta": 1.1, "correction": "decoupled"},
    {"scale_rewards": False},
    {"scale_rewards": True},
    {"accelerator_config": {"non_blocking": True}},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "eval_em/originals"},
    {"vllm_importance_sampling_mode": "token_truncate", "multi_objective_aggregation": "normalize_then_sum"},
]


def judged(table: int) -> dict[str, str]:
    """The fields of the page's tables, each with its verdict (or, of arguments, why)."""
    part = PAGE.read_text(encoding="utf-8").split("\n## ")[1:][table]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `")]
    names = [(name, row[1].strip()) for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert len(dict(names)) == len(names), "judged twice"
    return dict(names)


VERDICTS = judged(0) | judged(1)


def having(verdict: str) -> set[str]:
    return {name for name, said in VERDICTS.items() if verdict in said.split(", ")}


def make(tmp_path, monkeypatch, processes=1, lora_dropout=None, **settings) -> REXRAGConfig:
    """A configuration, with the checks that `REXRAGTrainer` makes of it and of 20 questions."""
    monkeypatch.setattr(REXRAGConfig, "world_size", property(lambda self: processes))
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    config = REXRAGConfig(**values, **settings)
    questions = Dataset.from_list([{"question": "who", "golden_answers": ["me"]}] * 20)
    if problems := training_problems(config, questions):
        raise ValueError("; ".join(problems))
    model = make_tiny_model(make_word_tokenizer())
    if lora_dropout is not None:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=lora_dropout))
    for warning in training_warnings(config, questions, model):
        logging.getLogger("rex_rag.training.config").warning(warning)
    return config


def test_every_setting_of_trl_is_judged_and_no_other():
    assert set(VERDICTS) == {field.name for field in fields(GRPOConfig)}
    words = {word for verdict in VERDICTS.values() for word in verdict.split(", ")}
    assert words == {"handled", "refused", "warned", "harmless"}


def test_every_argument_of_trls_trainer_is_taken_or_judged():
    ours, theirs = (set(inspect.signature(trainer.__init__).parameters) for trainer in (REXRAGTrainer, GRPOTrainer))
    assert set(judged(2)) == theirs - ours
    for name in judged(2):
        with pytest.raises(TypeError, match=name):
            REXRAGTrainer("model", None, **{name: []})


@pytest.mark.parametrize("name", sorted(having("refused")))
def test_what_is_called_refused_is(tmp_path, monkeypatch, name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make(tmp_path, monkeypatch, **REFUSED[name])


@pytest.mark.filterwarnings("ignore:.*use_transformers_paged")
@pytest.mark.parametrize("settings", OTHER_REFUSALS, ids=str)
def test_others_of_the_kind_are_refused(tmp_path, monkeypatch, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(tmp_path, monkeypatch, **settings)


@pytest.mark.parametrize("settings", [{}, *ACCEPTED], ids=str)
def test_what_is_right_is_not_refused(tmp_path, monkeypatch, settings):
    make(tmp_path, monkeypatch, **settings)


@pytest.mark.parametrize("name", sorted(having("warned")))
def test_what_is_called_warned_of_is(tmp_path, monkeypatch, caplog, name):
    with caplog.at_level(logging.WARNING, logger="rex_rag.training.config"):
        make(tmp_path, monkeypatch, **SILENT[name])
        assert not re.search(rf"\b{name}\b", caplog.text)
        make(tmp_path, monkeypatch, **WARNED[name])
    assert re.search(rf"\b{name}\b", caplog.text)


def test_unknown_choices_are_refused_together_and_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError) as error:
        make(tmp_path, monkeypatch, loss_type="ppo", importance_sampling_level="turn")
    assert "loss_type is 'ppo'; choose one of dapo, grpo, dr_grpo, bnpo, cispo, sapo, luspo, vespo" in str(error.value)
    assert "importance_sampling_level is 'turn'; choose one of token, sequence" in str(error.value)


def test_dropout_is_found_wherever_it_is():
    model = make_tiny_model(make_word_tokenizer())
    assert dropped_out(model) == {}
    model.config.attention_dropout = 0.1
    assert dropped_out(model) == {"config.attention_dropout": 0.1}
    model.config.attention_dropout = 0.0
    model.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.2), model.lm_head)
    assert dropped_out(model) == {"lm_head.0": 0.2}


def trainer(tmp_path, questions, peft_config=None, **settings) -> REXRAGTrainer:
    tokenizer = make_word_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("Question: {question}")
    args = REXRAGConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=4,
        num_probe_slots=2,
        per_device_train_batch_size=8,
        prompt_template=str(tmp_path / "prompt.txt"),
        **settings,
    )
    return REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(tmp_path),
        args=args,
        train_dataset=questions,
        retriever=BM25Retriever(PASSAGES),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def test_a_training_set_smaller_than_a_generation_batch_is_refused(tmp_path):
    """TRL's sampler hands out whole batches alone, so such a run would end at once, and well."""
    rows = [{"question": "who", "golden_answers": ["me"]}]
    with pytest.raises(ValueError, match=r"train_dataset has 1 questions, fewer than the 2 of a generation batch"):
        trainer(tmp_path, Dataset.from_list(rows))
    trainer(tmp_path, Dataset.from_list(rows * 2))
    trainer(tmp_path, IterableDataset.from_generator(lambda: iter(rows)), max_steps=1)


def test_the_trainer_says_that_an_adapter_drops_out(tmp_path, caplog):
    lora = {"target_modules": ["q_proj"], "lora_dropout": 0.05}
    questions = Dataset.from_list([{"question": "who", "golden_answers": ["me"]}] * 2)
    with caplog.at_level(logging.WARNING, logger="rex_rag.training.trainer"):
        trainer(tmp_path, questions, LoraConfig(**lora), disable_dropout=True)
        assert "drop out" not in caplog.text
        trainer(tmp_path, questions, LoraConfig(**lora))
    assert "2 modules drop out while rollouts are sampled and scored" in caplog.text
