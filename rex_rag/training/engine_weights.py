"""The weights that vLLM is given. Read with trl 1.16; tests/training/test_grpo_seams.py holds what this rests on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.generation.vllm_generation import VLLMGeneration

from rex_rag.models.adapters import merged


class ExactSync(VLLMGeneration):
    """TRL's weights for the engine, with adapters merged layer by layer into copies.

    The only change w.r.t. [`~trl.generation.vllm_generation.VLLMGeneration`] is this. TRL merges in place and
    subtracts the adapter afterwards: each sync leaves a rounding error in the frozen base model, and a server, whose
    sender packs up to a gigabyte of tensors before it reads any, is sent the last of them without the adapter. Under
    FSDP weights are TRL's.
    """

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        if not is_peft_model(model) or self._dist.is_fsdp:
            yield from super()._iter_named_params()
            return
        # Adapters' own weights, and those that `modules_to_save` stands in for, are none of the engine's.
        names = {
            value: self._engine_name(name)
            for name, value in model.named_parameters()
            if model.prefix not in name and "original_module" not in name
        }
        done: set[torch.nn.Module] = set()  # a layer may stand around another
        for layer in model.modules():
            if not isinstance(layer, BaseTunerLayer) or layer in done:
                continue
            own = [(place, names.pop(value)) for place, value in layer.named_parameters() if value in names]
            with ExitStack() as stack:
                stack.enter_context(self._dist.gather_params(list(layer.parameters())))
                for part in layer.modules():
                    if isinstance(part, BaseTunerLayer):
                        done.add(part)
                        stack.enter_context(merged(part))
                for place, name in own:
                    yield name, layer.get_parameter(place).data.clone()
        for value, name in names.items():
            with self._dist.gather_params([value]):
                yield name, value.data

    def _engine_name(self, name: str) -> str:
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        return self._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."])
