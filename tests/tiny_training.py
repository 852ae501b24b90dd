"""Training runs of seconds with everything real: a tiny policy that writes tags at random, probes, and a retriever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from parts import make_tiny_model, make_word_tokenizer
from peft import PeftModel
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
