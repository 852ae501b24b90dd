"""Damaged models are refused by the file's name, an adapter goes on being trained, and a bug keeps its traceback."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from parts import make_bpe_tokenizer, make_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rex_rag.models.files import (
    ModelFileError,
    check_model,
    check_tokenizer,
    explained,
    load_causal_lm,
    refuse_nonfinite,
)
from rex_rag.models.language_model import ModelOptions, check_files, open_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    tokenizer = make_bpe_tokenizer()
    model = make_tiny_model(tokenizer)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_causal_lm(str(folder / "whole")), lora).save_pretrained(folder / "adapter")
    for name in ("whole", "sharded", "adapter"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def copy(stored: Path, tmp_path: Path):
    def copied(name: str = "whole") -> Path:
        return Path(shutil.copytree(stored / name, tmp_path / "m"))

    return copied


def refusal(folder: Path) -> str:
    """What evaluation says of a model before it loads it; training calls the same function."""
    with pytest.raises(ModelFileError) as refused:
        check_files(ModelOptions(str(folder)))
    return str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_cut_empty_or_a_pointer_is_named(copy, name: str):
    folder = copy()
    check_files(ModelOptions(str(folder)))
    content = (folder / name).read_bytes()
    for damaged, reason in ((content[: len(content) // 2], "cut"), (b"", "is empty"), (POINTER, "with git-lfs")):
        (folder / name).write_bytes(damaged)
        assert refusal(folder).startswith(f"{folder / name} ") and reason in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_no_object_is_named(copy, name: str):
    folder = copy()
    (folder / name).write_text("[]")
    assert refusal(folder).startswith(f"{folder / name} holds a list and no JSON object")


def test_a_chat_template_that_is_not_there_in_truth_is_named(copy):
    folder = copy()
    for content, reason in ((b"", "is empty"), (POINTER, "with git-lfs")):
        (folder / "chat_template.jinja").write_bytes(content)
        assert refusal(folder).startswith(f"{folder / 'chat_template.jinja'} ") and reason in refusal(folder)


def test_missing_settings_weights_and_shards_are_named(copy):
    folder = copy("sharded")
    check_files(ModelOptions(str(folder)))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = sorted(index["weight_map"].values())[1]
    (folder / shard).unlink()
    assert f"{folder / shard}, which model.safetensors.index.json names, is missing" in refusal(folder)
    for index in ("{}", '{"weight_map": {}}', '{"weight_map": {"lm_head.weight": 5}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        assert "model.safetensors.index.json has no `weight_map`" in refusal(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'model.safetensors'} is missing")
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'config.json'} is missing")


def test_an_archive_of_pytorch_without_its_end_is_named(copy):
    folder = copy()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check_model(str(folder))
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:5000])
    assert refusal(folder).startswith(f"{folder / 'pytorch_model.bin'} is cut")
    (folder / "pytorch_model.bin").write_bytes(b"<html>not found</html>")
    assert refusal(folder).startswith(f"{folder / 'pytorch_model.bin'} is no file of PyTorch's")


def test_what_only_loading_can_tell_names_the_model_too(copy):
    folder = copy()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 48}))
    with pytest.raises(ModelFileError, match=f"do not fit {folder}/config.json"):
        open_model(ModelOptions(str(folder), device="cpu"))
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"lack 1 of the tensors .* \(model\.norm\.weight\)"):
        open_model(ModelOptions(str(folder), device="cpu"))


def test_an_adapter_is_opened_with_its_base_and_named_with_it_where_it_is_away(copy, stored: Path):
    folder = copy("adapter")
    check_model(str(folder))
    assert "q_proj.lora_A" in " ".join(dict(load_causal_lm(str(folder)).named_parameters()))
    settings = json.loads((folder / "adapter_config.json").read_text())
    gone = stored / "gone"
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(gone)}))
    assert f"{folder} holds an adapter of {str(gone)!r}" in refusal(folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "nobody/model"}))
    check_files(ModelOptions(str(folder)))  # it could be on the Hub
    with pytest.raises(ModelFileError, match=f"{folder} holds an adapter of 'nobody/model', and there is no"):
        open_model(ModelOptions(str(folder), device="cpu"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert "does not say which model it adapts" in refusal(folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(folder)


def test_names_of_the_hub_are_left_to_it_and_a_bug_keeps_its_traceback(tmp_path: Path):
    check_model("nobody/model")
    check_tokenizer("nobody/model")
    for bug in (RuntimeError("a bug"), KeyError("a bug"), PermissionError(13, "denied", "x")):
        with pytest.raises(type(bug)) as raised, explained(str(tmp_path)):
            raise bug
        assert raised.value is bug


def test_weights_that_are_no_numbers_are_refused_by_name(copy):
    folder = copy()
    refuse_nonfinite(str(folder))
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=re.escape(f"model.safetensors holds values of {name} that are NaN")):
        open_model(ModelOptions(name=str(folder)))
