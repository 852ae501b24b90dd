"""What vLLM is given of an adapter, by the names that TRL gives it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from parts import make_tiny_model
from peft import LoraConfig, get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

from rex_rag.training.engine_weights import ExactSync


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["k_proj", "lm_head"], "ensure_weight_tying": False},  # tied to the embedding
        {"target_modules": ["v_proj", "embed_tokens"]},
    ],
    ids=["a module saved whole", "dora", "tied", "embedding"],
)
def test_the_engine_is_given_trls_names_and_merged_weights_that_last(word_tokenizer, settings):
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_model(word_tokenizer), LoraConfig(r=2, init_lora_weights=False, **settings))
    before = {name: value.clone() for name, value in model.named_parameters()}
    sync = ExactSync.__new__(ExactSync)
    sync.model, sync._dist = model, SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext())

    given = dict(list(sync._iter_named_params()))  # read once all has gone by, as a server's sender does
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    merged = {name: value.clone() for name, value in VLLMGeneration._iter_named_params(sync)}
    assert given.keys() == merged.keys()
    assert [name for name, value in merged.items() if not torch.equal(given[name], value)] == []
