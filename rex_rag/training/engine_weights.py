"""The weights that vLLM is given. Read with trl 1.16; tests/training/test_grpo_seams.py holds what this rests on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.generation.vllm_generation import VLLMGeneration

from rex_rag.models.adapters import merged


class ExactSync(VLLMGeneration):
    """TRL's weights for the engine, with adapters merged layer by layer into weights that are put back bit for bit.

    The only change w.r.t. [`~trl.generation.vllm_generation.VLLMGeneration`] is this: TRL merges the whole model and
    subtracts the adapter afterwards, so that each sync leaves a rounding error in the frozen base model. Under FSDP
    weights are TRL's.
    """

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        if not is_peft_model(model) or self._dist.is_fsdp:
            yield from super()._iter_named_params()
            return
        given: set[torch.nn.Parameter] = set()  # a tied one goes once

        def named(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
            for name, value in module.named_parameters(path):
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                # An adapter's own weights, and those that `modules_to_save` stands in for, are none of the engine's.
                if value not in given and model.prefix not in name and "original_module" not in name:
                    given.add(value)
                    yield self._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."]), value

        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                with self._dist.gather_params(list(layer.parameters())), merged(layer):
                    yield from ((name, value.data) for name, value in named(layer, path))
        for name, value in named(model, ""):
            with self._dist.gather_params([value]):
                yield name, value.data
