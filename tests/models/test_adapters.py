"""An adapter goes on being trained on its base model, and a resumed run does as well."""

from __future__ import annotations

import copy

import pytest
import torch
from parts import PASSAGES
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_training import save_tiny_policy, timeless, tiny_trainer
from transformers import Qwen2ForCausalLM

from rex_rag.models.adapters import load_policy, merged, policy_name, tokenizer_place
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    folder = save_tiny_policy(tmp_path_factory.mktemp("models") / "base")
    torch.manual_seed(3)
    get_peft_model(Qwen2ForCausalLM.from_pretrained(folder), LORA).save_pretrained(folder.parent / "adapter")
    return folder


def policy(base, tmp_path):
    args = REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"})
    return load_policy(str(base.parent / "adapter"), args)


def adapter_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if ".default." in name}


def test_an_adapter_goes_on_being_trained_and_resumes(base, tmp_path):
    settings = {"per_device_train_batch_size": 18, "max_steps": 3, "save_steps": 1, "max_turns": 1, "beta": 0.04}

    def trainer(output: str):
        return tiny_trainer(base, tmp_path / output, BM25Retriever(PASSAGES), model=policy(base, tmp_path), **settings)

    whole = trainer("whole")
    before = adapter_weights(whole.model)
    frozen = {name: value.clone() for name, value in whole.model.named_parameters() if ".default." not in name}
    assert any(value.any() for name, value in before.items() if "lora_B" in name)  # the stored one
    whole.train()
    after = adapter_weights(whole.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, frozen[name]) for name, value in whole.model.named_parameters() if name in frozen)
    log = timeless(whole.state.log_history)
    assert log[0]["kl"] == 0 < log[2]["kl"]  # the reference is the adapter as it was, not the base model

    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert timeless(resumed.state.log_history) == log
    assert all(torch.equal(value, after[name]) for name, value in adapter_weights(resumed.model).items())


def test_an_adapter_is_merged_for_a_while_and_leaves_no_rounding_error(base, tmp_path):
    model = policy(base, tmp_path).bfloat16()
    before = {name: value.clone() for name, value in model.named_parameters()}
    wanted = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert len(layers) == 4
    for name, layer in layers.items():
        with merged(layer):
            assert torch.equal(layer.base_layer.weight, wanted[name.removeprefix("base_model.model.") + ".weight"])
            assert not torch.equal(layer.base_layer.weight, before[f"{name}.base_layer.weight"])
        assert not layer.merged
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_what_lies_where_and_a_second_adapter_on_top_is_refused(base, tmp_path):
    adapter = base.parent / "adapter"
    args = REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert load_policy(str(base), args, None, LORA) == str(base)
    # The base's name alone would do for neither a resume nor a card.
    assert policy_name(policy(base, tmp_path)) == str(adapter)
    with pytest.raises(ValueError, match=r"is an adapter of .* already, which goes on being trained as it is; leave"):
        load_policy(str(adapter), args, None, LORA)
    assert tokenizer_place("a/model", "main") == ("a/model", "main")
    assert tokenizer_place(str(adapter), None) == (str(base), None)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert tokenizer_place(str(adapter), None) == (str(adapter), None)
