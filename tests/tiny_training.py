"""Training runs of seconds with everything real: a tiny policy that writes tags at random, probes, and a retriever."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from parts import make_bpe_tokenizer, make_tiny_model, make_word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Qwen2ForCausalLM

from rex_rag.retrieval.base import Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.trainer import REXRAGTrainer

WORDS = ("owl", "fox", "hill", "tree")


def save_tiny_policy(folder: Path) -> Path:
    """Write model and tokenizer, `prompt.txt`, and `pool.txt` with exploration prompts."""
    tokenizer = make_word_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompt.txt").write_text("Question: {question}")
    (folder / "pool.txt").write_text("<think> Wait I may be wrong .\n<think> Maybe not so .\n<think> Hold on .\n")
    return folder


def write_tiny_recipe(folder: Path, hidden: int = 32, **changes: Any) -> Path:
    """A recipe of two updates of a tiny model that writes tags at random, with all its files, in a folder."""
    # AutoTokenizer takes any tokenizer of a Qwen2 model for Qwen2's own, and this one is made like that.
    tokenizer = make_bpe_tokenizer()
    make_tiny_model(tokenizer, hidden=hidden).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompt.txt").write_text("Question: {question}")
    rows = [{"question": f"where is the {word}", "golden_answers": ["oak"]} for word in ("owl", "fox")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text('{"id": "1", "contents": "\\"Owl\\"\\nthe owl is in the oak"}\n')
    settings = {
        "model_name_or_path": str(folder / "model"),
        "datasets": [{"path": str(folder / "questions.jsonl")}],
        "retriever": "bm25",
        "corpus": str(folder / "corpus.jsonl"),
        "output_dir": str(folder / "run"),
        "prompt_template": str(folder / "prompt.txt"),
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{"num_probe_slots": 0, "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 2},
        **{"max_turns": 1, "max_prompt_length": 64, "max_turn_tokens": 8, "max_observation_tokens": 48},
        **{"max_sequence_length": 192, "save_strategy": "no", "disable_tqdm": True, "dtype": "float32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings | changes))
    return folder / "recipe.yaml"


def write_lora_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe of `write_tiny_recipe`, and `lora.yaml`, which goes on training an adapter that is not zero."""
    recipe = write_tiny_recipe(folder, **changes)
    model = Qwen2ForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    settings = yaml.safe_load(recipe.read_text()) | {"model_name_or_path": str(folder / "adapter")}
    (folder / "lora.yaml").write_text(yaml.safe_dump(settings))
    return recipe


def brevity(completions, **_):
    """A reward that differs between any two rollouts: with exact match alone a random policy learns nothing."""
    return [-0.01 * len(completion[0]["content"]) for completion in completions]


def tiny_trainer(
    folder: Path,
    output: Path,
    retriever: Retriever,
    rounds: int = 4,
    recipe: str | None = None,
    questions: list[dict[str, Any]] | None = None,
    reward_funcs: Callable | None = brevity,
    model: PreTrainedModel | PeftModel | None = None,
    **settings: Any,
) -> REXRAGTrainer:
    """A trainer of `save_tiny_policy`'s model on four questions, `rounds` times over, or on those that are given.

    `settings` are the config's.
    """
    shared = {
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{"disable_tqdm": True, "logging_steps": 1, "learning_rate": 2e-3},
        **{"num_generations": 6, "num_probe_slots": 3, "probe_probability": 0.7, "keep_ratio": 0.4},
        **{"max_prompt_length": 32, "max_turn_tokens": 30, "max_observation_tokens": 40, "max_sequence_length": 200},
        "exploration_prompts": str(folder / "pool.txt"),
        "prompt_template": str(folder / "prompt.txt"),
    }
    if questions is None:
        questions = [{"question": f"where is the {word}", "golden_answers": ["oak"]} for word in WORDS] * rounds
    return REXRAGTrainer(
        model=model or Qwen2ForCausalLM.from_pretrained(folder),
        args=REXRAGConfig(output_dir=str(output), **shared | settings),
        train_dataset=Dataset.from_list(questions),
        retriever=retriever,
        processing_class=make_word_tokenizer(),
        reward_funcs=reward_funcs,
        recipe=recipe,
    )


def timeless(log_history: list[dict]) -> list[dict]:
    """What was logged of each step, without anything that time has a part in."""
    return [
        {key: value for key, value in row.items() if "seconds" not in key and key != "step_time"}
        for row in log_history
        if "loss" in row
    ]
