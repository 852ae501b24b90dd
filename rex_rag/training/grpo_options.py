"""TRL's own settings, as far as search rollouts with probe slots make them wrong, or leave them without effect.

Such a setting is refused or warned of when the configuration is made. docs/grpo_config.md judges every field of
[`~trl.GRPOConfig`], the inherited ones included; what is not named here is harmless or handled where it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sized
from typing import TYPE_CHECKING, Any

from rex_rag.correction.forms import FORMS
from rex_rag.support.errors import UserError
from rex_rag.support.named import is_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import GRPOConfig

    from rex_rag.training.config import REXRAGConfig

# TRL notices some of these after the weights are loaded, and some after the first generation.
_CHOICES = {
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("auto", "vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}

# Settings that nothing reads here: their default, and why.
_WITHOUT_EFFECT = {
    "cache_implementation": (None, "rollouts are generated with the default cache"),
    "max_tool_calling_iterations": (None, "the turns of a rollout are max_turns"),
    "transformers_continuous_batching_config": (None, "continuous batching cannot stop a row at a tag"),
    "label_smoothing_factor": (0.0, "the loss has no labels"),
    "train_sampling_strategy": ("random", "the order of questions is shuffle_dataset's"),
    "data_seed": (None, "questions are drawn by seed"),
}

_ON = {
    "use_transformers_continuous_batching": "it cannot stop a row at a tag; use vLLM (use_vllm) or plain generation",
    "use_transformers_paged": "continuous batching cannot stop a row at a tag; use vLLM (use_vllm)",
    "vllm_structured_outputs_regex": "samples would follow the expression, while log-probabilities are those of the "
    "full softmax; leave it unset",
    "dataloader_drop_last": "generation batches are whole anyhow, and an evaluation would lose its last questions; "
    "switch it off",
    "include_for_metrics": "an evaluation has no inputs or predictions to hand to a metric; leave it empty",
}


# A class of one's own may stand there too, as `module:Class`.
_OPEN = ("correction",)


def choice_problems(args: GRPOConfig, choices: Mapping[str, Collection]) -> list[str]:
    """Which settings hold none of the values that there are for them."""
    return [
        f"{name} is {getattr(args, name)!r}; choose one of {', '.join(map(str, values))}"
        for name, values in choices.items()
        if getattr(args, name) not in values and not (name in _OPEN and is_named(getattr(args, name)))
    ]


def option_problems(args: GRPOConfig) -> list[str]:
    """What is wrong with TRL's own settings as they were given: value, reason and way out."""
    problems = choice_problems(args, _CHOICES)
    for name, (default, reason) in _WITHOUT_EFFECT.items():
        if getattr(args, name) != default:
            problems.append(f"{name} is {getattr(args, name)!r}, which would have no effect: {reason}; leave it unset")
    problems += [f"{name} is {getattr(args, name)!r}: {reason}" for name, reason in _ON.items() if getattr(args, name)]
    if not args.dataloader_in_order:
        problems.append(
            "dataloader_in_order is off: a question is handed out again for every step that its generation serves, so "
            "out of order some would be asked twice and others never; leave it on"
        )
    for name in ("num_iterations", "steps_per_generation"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"{name} is {getattr(args, name)}, with which no step is taken; use at least 1")
    if not 0 < args.top_entropy_quantile <= 1:
        problems.append(
            f"top_entropy_quantile is {args.top_entropy_quantile}; it is the share of tokens that get a gradient: "
            "give a value in (0, 1]"
        )
    if args.parallelism_config is not None and args.parallelism_config.tp_enabled:
        problems.append(
            f"parallelism_config has tp_size {args.parallelism_config.tp_size}, but the processes that share a model "
            "would each sample tokens of their own for it; use ZeRO-3 or FSDP"
        )
    return problems


def sampling_problems(args: GRPOConfig) -> list[str]:
    """What would sample from another distribution than is scored, or take answers for truncated."""
    reason = (
        "truncated sampling biases every ratio, since log-probabilities are those of the full softmax; "
        "sample from the full softmax"
    )
    problems = []
    if args.temperature <= 0:
        problems.append(f"temperature is {args.temperature}; rollouts of a group must differ: use 1.0")
    if args.top_p < 1:
        problems.append(f"top_p is {args.top_p}: {reason} (top_p 1.0)")
    if args.top_k is not None and args.top_k > 0:
        problems.append(f"top_k is {args.top_k}: {reason} (top_k 0). Passages per search are retrieval_top_k")
    if args.min_p:
        problems.append(f"min_p is {args.min_p}: {reason} (min_p unset)")
    if args.repetition_penalty != 1.0:
        problems.append(f"repetition_penalty is {args.repetition_penalty}: {reason} (repetition_penalty 1.0)")
    if args.mask_truncated_completions:
        problems.append(
            "mask_truncated_completions is on, but TRL takes a completion without end-of-sequence token for a "
            "truncated one, and a rollout ends at </answer>: every answer would be masked; switch it off"
        )
    return problems


def loss_problems(args: REXRAGConfig) -> list[str]:
    """What would make another objective of the loss, under any correction form or under the one chosen."""
    problems = []
    largest = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo" and largest < 1:
        problems.append(
            f"loss_type is 'cispo' with epsilon_high {args.epsilon_high}: TRL cuts every importance weight to "
            f"{largest} there, and not to 1 more than that; set epsilon_high to the largest weight to allow "
            "(ScaleRL: 5.0)"
        )
    if args.neftune_noise_alpha is not None:
        problems.append(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}: noise on the embeddings goes into every "
            "log-probability of the policy, so that ratios and KL measure noise; leave it unset"
        )
    if args.num_probe_slots > 0 and args.correction in FORMS:
        problems += args.correction_form.problems(args)
    return problems


def bound_problems(args: REXRAGConfig) -> list[str]:
    """Bounds on the ratio that leave no gradient before the first update."""
    problems = []
    if args.epsilon <= 0:
        problems.append(f"epsilon is {args.epsilon}, which clips every token that moved; use 0.2 or another share")
    share = args.probe_probability if args.probe_filter == "none" else args.keep_ratio
    form = FORMS.get(args.correction)
    start = 1 + share if args.num_probe_slots and form is not None and form.in_ratio else 1.0
    if args.delta is not None and args.delta <= start:
        problems.append(
            f"delta is {args.delta}, but ratios of originals start at up to {start:g} under correction "
            f"{args.correction!r}: cut at delta they have no gradient; use more than {start + args.epsilon:g}, or none"
        )
    return problems


def data_loading_problems(args: GRPOConfig) -> list[str]:
    """What `accelerator_config` would do to groups; to be asked once transformers has read it."""
    loading = args.accelerator_config
    wrong = {
        "split_batches": (
            loading.split_batches,
            "a generation batch would be spread over several steps; leave it off",
        ),
        "dispatch_batches": (loading.dispatch_batches, "questions are no tensors to be dispatched; leave it unset"),
        "even_batches": (not loading.even_batches, "processes would evaluate unequally often and wait; leave it on"),
    }
    return [
        f"accelerator_config has {name} {getattr(loading, name)}: {reason}"
        for name, (bad, reason) in wrong.items()
        if bad
    ]


def option_warnings(args: REXRAGConfig) -> list[str]:
    """What works, but not as one may think."""
    warnings = []
    if args.sync_ref_model:
        warnings.append(
            "sync_ref_model is on, but checkpoints do not hold the reference model: a resumed run starts from the "
            "initial one again. The method's KL is against the initial model: leave it off"
        )
    if args.use_vllm and args.vllm_enable_sleep_mode:
        warnings.append(
            "vllm_enable_sleep_mode is on: TRL puts vLLM to sleep behind every call, so that each turn of a rollout "
            "wakes it and loads the weights anew. A smaller vllm_gpu_memory_utilization may be faster"
        )
    if args.num_probe_slots and (args.entropy_coef or args.use_adaptive_entropy):
        name = "entropy_coef" if args.entropy_coef else "use_adaptive_entropy"
        warnings.append(
            f"{name} is {getattr(args, name)}: the bonus is a mean over micro-batches, in which one of nothing but "
            "empty probe slots counts as entropy 0. The method has no entropy bonus"
        )
    return warnings


def training_problems(args: REXRAGConfig, train_dataset: Any) -> list[str]:
    """What stands against training on a set, that no one would be told of."""
    from datasets import IterableDataset

    problems = []
    batch = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Sized) and len(train_dataset) < batch:
        problems.append(
            f"train_dataset has {len(train_dataset)} questions, fewer than the {batch} of a generation batch "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), so that "
            "no step would be taken; lower per_device_train_batch_size or steps_per_generation"
        )
    if isinstance(train_dataset, IterableDataset) and (args.dynamic_sampling_rounds or args.rest_after):
        problems.append(
            f"dynamic_sampling_rounds is {args.dynamic_sampling_rounds} and rest_after is {args.rest_after}, but "
            "train_dataset is a stream: fresh questions are drawn by their place in it, the same in a resumed run. "
            "Load it as a datasets.Dataset, or set both to 0"
        )
    if args.metric_for_best_model in ("loss", "eval_loss"):
        problems.append(
            f"metric_for_best_model is {args.metric_for_best_model!r} (the default where load_best_model_at_end or "
            "lr_scheduler_type needs one), but GRPO's loss says nothing of how good a policy is; name a metric of an "
            "evaluation set, such as eval_em/originals"
        )
    return problems


def training_warnings(args: GRPOConfig, train_dataset: Any, model: PreTrainedModel) -> list[str]:
    """Questions that are never asked, and noise on the log-probabilities."""
    warnings = []
    batch = args.generation_batch_size // args.num_generations
    rest = len(train_dataset) % batch if isinstance(train_dataset, Sized) else 0
    if rest and not args.shuffle_dataset:
        warnings.append(
            f"shuffle_dataset is off, so the last {rest} of {len(train_dataset)} questions, which fill no generation "
            f"batch of {batch}, are never asked; switch it on"
        )
    if dropped := dropped_out(model):
        name, probability = next(iter(dropped.items()))
        warnings.append(
            f"{len(dropped)} modules drop out while rollouts are sampled and scored ({name}: {probability}), so that "
            "ratios and KL measure noise too; set disable_dropout (and lora_dropout 0.0, attention_dropout 0.0)"
        )
    return warnings


def refuse_short_server(client: Any, args: GRPOConfig) -> None:
    """Raise `ValueError` for a vLLM server, by TRL's client of it, that takes less of a row than it will be asked."""
    served = client.get_server_info()["model_config"]["max_model_len"]
    if served < args.vllm_max_model_length:
        raise UserError(
            f"the vLLM server takes {served} tokens of a row, less than vllm_max_model_length "
            f"{args.vllm_max_model_length} (by default max_sequence_length): it would refuse long rows in mid-run. "
            "Restart it with a larger --max-model-len, or lower max_sequence_length"
        )


def dropped_out(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model drops out while it is trained: name of the module or setting, and probability."""
    from torch import nn

    found = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p}
    attention = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    return found | ({"config.attention_dropout": attention} if attention else {})
