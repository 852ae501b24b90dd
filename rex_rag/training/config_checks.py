"""Checks of REXRAGConfig across its own fields; those of TRL's fields are in `rex_rag.training.grpo_options`."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from rex_rag.correction.densities import CLIPPED_LOSSES, clip_bound
from rex_rag.probes import EndpointExplorer, explorer_kind
from rex_rag.probes.filter import keep_count
from rex_rag.support.errors import UserError
from rex_rag.training.grpo_options import option_warnings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rex_rag.training.config import REXRAGConfig

# TRL averages these over rows (or divides by their number), dapo, cispo and vespo over tokens.
_ROW_MEAN_LOSSES = ("grpo", "sapo", "luspo", "dr_grpo")


def rollout_problems(args: REXRAGConfig) -> list[str]:
    """What is wrong with the settings of rollouts, probes and rewards: value, reason, way out."""
    problems = []
    if args.num_probe_slots < 0:
        problems.append(f"num_probe_slots is {args.num_probe_slots}; use 0 to switch probes off")
    if args.num_generations is None:
        return [
            *problems,
            "num_generations is None; give the rows per question, originals and probe slots",
        ]
    if args.num_generations - max(args.num_probe_slots, 0) < 1:
        problems.append(
            f"num_generations is {args.num_generations} with num_probe_slots {args.num_probe_slots}, which leaves "
            "no original to sample; raise num_generations (it counts originals and probe slots together)"
        )
    for name in ("probe_probability", "keep_ratio"):
        value = getattr(args, name)
        if not 0.0 <= value <= 1.0:
            problems.append(f"{name} is {value}; it is a share, so give a value in [0, 1]")
    for name in ("max_turns", "max_prompt_length", "max_turn_tokens", "max_observation_tokens", "retrieval_top_k"):
        lowest = 0 if name == "max_turns" else 1
        if getattr(args, name) < lowest:
            problems.append(f"{name} is {getattr(args, name)}; use at least {lowest}")
    turn = args.max_prompt_length + args.max_turn_tokens
    if args.max_sequence_length < turn:
        problems.append(
            f"max_sequence_length is {args.max_sequence_length}, which cannot hold a prompt and a turn "
            f"(max_prompt_length {args.max_prompt_length} + max_turn_tokens {args.max_turn_tokens} = {turn}); "
            "raise it or lower the others"
        )
    if args.max_completion_length not in (None, args.max_sequence_length):
        problems.append(
            f"max_completion_length is {args.max_completion_length}, but a search rollout is limited by "
            f"max_sequence_length ({args.max_sequence_length}, prompt included); set that one and leave "
            "max_completion_length unset"
        )
    if args.num_probe_slots:
        try:
            kind = explorer_kind(args.explorer)
            problems += kind.problems(args)
            if not kind.has_density and "probe_density" in args.correction_form.reads:
                problems.append(
                    f"explorer is {args.explorer!r}, whose proposals have no log-probabilities, but correction "
                    f"{args.correction!r} reads them; use a form that does not, such as 'continuation' or 'none'"
                )
        except UserError as error:
            problems.append(str(error))
    if (args.explorer_url or args.explorer_model) and args.explorer != EndpointExplorer.name:
        problems.append(
            f"explorer_url {args.explorer_url!r} and explorer_model {args.explorer_model!r} are for explorer "
            f"'endpoint', but explorer is {args.explorer!r}; leave them out, or set explorer to endpoint"
        )
    if args.num_probe_slots and args.loss_type in _ROW_MEAN_LOSSES:
        problems.append(
            f"loss_type is {args.loss_type!r}, which averages over rows, so the rows that level the ranks' counts "
            "of probes would dilute it; use 'dapo', the method's mean over tokens"
        )
    if args.num_probe_slots and args.loss_type == "bnpo":
        problems.append(
            "loss_type is 'bnpo', which averages over micro-batches, so one of nothing but rows that level the "
            "ranks' counts of probes would dilute it; use 'dapo', the method's mean over tokens"
        )
    if args.remove_unused_columns:
        problems.append("remove_unused_columns is on, which would remove the gold answers; switch it off")
    if args.format_reward_weight and args.reward_weights is not None:
        problems.append(
            f"format_reward_weight is {args.format_reward_weight} beside reward_weights {args.reward_weights}; "
            "set one of them: reward_weights counts exact match first, then your own functions"
        )
    if args.format_reward_weight < 0:
        problems.append(f"format_reward_weight is {args.format_reward_weight}; use 0 (off) or a positive weight")
    if args.kl_token_max is not None and not 0.0 < args.kl_token_max <= 1000.0:
        problems.append(
            f"kl_token_max is {args.kl_token_max}; it bounds the KL estimate of a token, in nats: give a value in "
            "(0, 1000], 10 in the reference, or inf for the unbounded estimate"
        )
    for name in ("llds_weight", "watchdog_seconds"):
        if not 0.0 <= getattr(args, name) < math.inf:
            problems.append(f"{name} is {getattr(args, name)}; use 0 (off) or a positive number")
    shards = sharded_by(args)
    if shards == "FSDP" and args.use_cpu:
        problems.append(
            "use_cpu is on under an FSDP configuration, which accelerate then takes for plain data parallelism "
            "without a word; to try several processes on the CPU, launch with ddp_cpu or zero3_cpu"
        )
    if args.collapse_guard == "rollback" and (args.save_strategy == "no" or shards):
        cause = "with save_strategy 'no' there is nothing to go back to"
        if args.save_strategy != "no":
            cause = f"{shards} cannot load a checkpoint into a run that is under way"
        problems.append(f"collapse_guard is 'rollback', but {cause}; use 'stop', which names the last good checkpoint")
    if args.correction_weight_max is not None and args.correction_weight_max < 1:
        problems.append(
            f"correction_weight_max is {args.correction_weight_max}; below 1 it would cut weights of tokens that "
            "need no correction: use at least 1, or leave it unset"
        )
    return problems


def sharded_by(args: REXRAGConfig) -> str | None:
    """What shards the run, by its own settings or by the configuration that accelerate launched it with."""
    asked = {"DeepSpeed": args.deepspeed, "FSDP": args.fsdp}
    for name, setting in asked.items():
        if setting or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            return name
    return None


def config_warnings(args: REXRAGConfig) -> Iterator[str]:
    """What is worth saying of settings that go together, but not well."""
    yield from option_warnings(args)
    if args.loss_type != "dapo":
        yield (
            f"loss_type is {args.loss_type!r}; the mean over the tokens of an update, which comes nearest to the "
            "reference's (tokens per micro-batch, weighted by rows), is loss_type 'dapo'"
        )
    served = args.steps_per_generation * args.num_iterations  # micro-batches
    updates = served // math.gcd(served, args.gradient_accumulation_steps)
    if args.save_strategy == "steps" and args.save_steps >= 1 and args.save_steps % updates:
        yield (
            f"save_steps is {args.save_steps}, but a generation batch ends together with an update every {updates} "
            "updates: a run resumed from inside one generates anew and differs from an uninterrupted one. Use a "
            f"multiple of {updates}"
        )
    originals = args.generation_batch_size // args.num_generations * args.num_originals
    if args.num_probe_slots and args.probe_filter != "none" and keep_count(args.keep_ratio, originals) == 0:
        yield (
            f"keep_ratio {args.keep_ratio} of {originals} originals a batch is less than one probe, so none is ever "
            "kept; raise keep_ratio or the generation batch (per_device_train_batch_size, steps_per_generation)"
        )
    epsilon = args.epsilon if args.epsilon_high is None else args.epsilon_high
    ratio = args.probe_probability if args.probe_filter == "none" else args.keep_ratio
    share = ratio / (1 + ratio)
    widened = args.num_probe_slots and args.correction_form.in_ratio and args.loss_type in CLIPPED_LOSSES
    if widened and share > clip_bound(epsilon):
        lowered = "probe_probability" if args.probe_filter == "none" else "keep_ratio"
        yield (
            f"up to {share:.3f} of the batch can be probes, beyond the clip bound eps/(1+eps) = "
            f"{clip_bound(epsilon):.3f}: originals then start at a ratio of 1/(1-a) outside the clip range and those "
            f"with positive advantage get no gradient. Lower {lowered} below {epsilon:.2f} or use "
            "correction='decoupled'"
        )
    if args.num_probe_slots:
        yield from args.correction_form.warnings(args)
