"""Budgets of tokens that nobody set: the reference's, or what the model's context holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger

from rex_rag.models.files import adapter_base, is_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from rex_rag.training.config import REXRAGConfig

logger = get_logger(__name__)

_TOTAL = "max_sequence_length"
BUDGETS = {_TOTAL: 4096, "max_prompt_length": 2048, "max_turn_tokens": 500, "max_observation_tokens": 500}


def fill_budgets(args: REXRAGConfig) -> tuple[str, ...]:
    """Give the budgets that are unset the reference's values; returns their names."""
    unset = tuple(name for name in BUDGETS if getattr(args, name) is None)
    for name in unset:
        setattr(args, name, BUDGETS[name])
    return unset


def fit_budgets(args: REXRAGConfig, model: str | PreTrainedModel | PeftModel) -> REXRAGConfig:
    """The settings, or a copy whose budgets that nobody set fit the model's context, all in proportion.

    Only the model's configuration is read. What is set keeps its meaning: `context_warning` says where it is too much.
    """
    context = context_length(model, args) if _TOTAL in args.unset_budgets else None
    if context is None or context >= args.max_sequence_length:
        return args
    fitted = copy.copy(args)
    for name in args.unset_budgets:
        setattr(fitted, name, max(BUDGETS[name] * context // BUDGETS[_TOTAL], 1))
    fitted.max_completion_length = context
    if args.vllm_max_model_length == args.max_sequence_length:
        fitted.vllm_max_model_length = context
    fitted.refuse_bad_budgets()
    chosen = ", ".join(f"{name} {getattr(fitted, name)}" for name in args.unset_budgets)
    logger.warning(
        f"the model takes {context} tokens (max_position_embeddings), fewer than the {BUDGETS[_TOTAL]} of the "
        f"defaults, so these are used: {chosen}. Set them for others"
    )
    return fitted


def context_warning(args: REXRAGConfig, model: PreTrainedModel | PeftModel) -> list[str]:
    """What to say of a budget that was set beyond the model's context."""
    context = context_length(model, args)
    if context is None or context >= args.max_sequence_length:
        return []
    return [
        f"max_sequence_length is {args.max_sequence_length}, but the model was made for {context} tokens "
        "(max_position_embeddings): what it writes behind them is likely rubbish, or an error; lower it, or leave "
        "it unset"
    ]


def context_length(model: str | PreTrainedModel | PeftModel, args: REXRAGConfig) -> int | None:
    """The positions that a model was made for, `None` where its configuration does not say."""
    if isinstance(model, str):
        from transformers import AutoConfig

        place = model, (args.model_init_kwargs or {}).get("revision")
        name, revision = adapter_base(Path(model)) if is_adapter(model) else place
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        config = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)
