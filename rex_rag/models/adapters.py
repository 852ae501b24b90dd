"""Adapters that go on being trained: on their base model, with a frozen copy of themselves as the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.models.files import adapter_base, is_adapter
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel
    from trl import GRPOConfig


def load_policy(
    name: str, args: GRPOConfig, quantization: Any = None, peft_config: PeftConfig | None = None
) -> str | PeftModel:
    """What the trainer is given as its model: the name, and for a folder with an adapter the adapter on its base.

    Args:
        args: its `model_init_kwargs` load the base, and are used up by it.
        quantization: of the base model.

    Raises:
        ValueError: for an adapter that a new one is to be put on.
    """
    if not is_adapter(name):
        return name
    from peft import PeftModel
    from trl.trainer.utils import create_model_from_path

    base, revision = adapter_base(Path(name))
    if peft_config is not None:
        raise UserError(
            f"model_name_or_path={name} is an adapter of {base!r} already, which goes on being trained as it is; "
            "leave use_peft and lora_* out, or merge it into its base first (peft: merge_and_unload, save_pretrained)"
        )
    settings = {**(args.model_init_kwargs or {}), "revision": revision, "trust_remote_code": args.trust_remote_code}
    if quantization is not None:
        settings["quantization_config"] = quantization
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None  # "auto" fails there
    args.model_init_kwargs = None
    # As TRL does for a new adapter: ZeRO-3 gathers parameters of one type alone.
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    model = create_model_from_path(base, **settings)
    policy = PeftModel.from_pretrained(model, name, is_trainable=True, autocast_adapter_dtype=not zero3)
    policy.loaded_from = name  # it is known to transformers by its base's name alone
    return policy


def policy_name(model: str | PreTrainedModel | PeftModel) -> str:
    """The folder or Hub name of what is trained: of an adapter, where `load_policy` found it."""
    return model if isinstance(model, str) else getattr(model, "loaded_from", model.config.name_or_path)


@contextmanager
def merged(layer: BaseTunerLayer) -> Iterator[None]:
    """A layer's active adapters merged into its weights, which are afterwards what they were, bit for bit.

    Taking an adapter off again by subtraction leaves rounding errors, which add up in weights that are to be frozen.
    """
    base = layer.get_base_layer()
    weights = {name: (value, value.detach().clone()) for name, value in base.named_parameters(recurse=False)}
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        for name, (value, before) in weights.items():
            value.data.copy_(before)
            setattr(base, name, value)  # of quantised weights merging makes new ones


def tokenizer_place(name: str, revision: str | None) -> tuple[str, str | None]:
    """Where the tokenizer of a model lies, as (name, revision): with its base for an adapter that has none."""
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        return adapter_base(Path(name))
    return name, revision
