"""What nobody set follows from the model and the machine: budgets of tokens, and bfloat16."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from parts import make_word_tokenizer
from tiny_training import save_tiny_policy
from transformers import Qwen2ForCausalLM
from transformers.utils import is_torch_bf16_gpu_available

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.budgets import BUDGETS
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import Passage


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def trainer_of(args: REXRAGConfig, policy: Path) -> REXRAGTrainer:
    return REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(policy),
        args=args,
        train_dataset=Dataset.from_list([{"question": "where is the owl", "golden_answers": ["oak"]}] * 4),
        retriever=BM25Retriever([Passage("1", "Owl", "the owl is in the oak")]),
        processing_class=make_word_tokenizer(),
    )


def budgets(args: REXRAGConfig) -> list[int]:
    return [getattr(args, name) for name in BUDGETS]


def config(folder, **settings) -> REXRAGConfig:
    return REXRAGConfig(output_dir=str(folder), report_to="none", save_strategy="no", max_steps=1, **settings)


def test_defaults_train_a_small_model_on_whatever_machine_this_is(policy, tmp_path, caplog):  # 1024 tokens
    args = config(tmp_path, disable_tqdm=True, gradient_accumulation_steps=2, max_turns=1)
    assert args.bf16 is is_torch_bf16_gpu_available()
    trainer = trainer_of(args, policy)
    assert budgets(trainer.args) == [1024, 512, 125, 125] and trainer.args.max_completion_length == 1024
    [said] = [record.message for record in caplog.records if "max_position_embeddings" in record.message]
    assert "1024 tokens" in said and "max_turn_tokens 125" in said
    assert budgets(args) == list(BUDGETS.values())  # the caller's, for another model
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_that_takes_the_defaults_has_them(policy, tmp_path, caplog):
    shutil.copytree(policy, tmp_path / "long")
    shape = json.loads((policy / "config.json").read_text()) | {"max_position_embeddings": 32768}
    (tmp_path / "long" / "config.json").write_text(json.dumps(shape))
    assert budgets(trainer_of(config(tmp_path), tmp_path / "long").args) == list(BUDGETS.values())
    assert "max_position_embeddings" not in caplog.text


def test_what_is_set_keeps_its_meaning(policy, tmp_path, caplog):
    beyond = {"max_sequence_length": 2048, "max_prompt_length": 256}
    caplog.set_level(logging.WARNING)
    assert budgets(trainer_of(config(tmp_path, **beyond), policy).args) == [2048, 256, 500, 500]
    assert "max_sequence_length is 2048, but the model was made for 1024 tokens" in caplog.text
    assert config(tmp_path, bf16=True, use_cpu=True).bf16 is True
    with pytest.raises(ValueError, match="cannot hold a prompt and a turn"):
        trainer_of(config(tmp_path, max_prompt_length=1000), policy)
