"""A resumed run equals an uninterrupted one, the filter's moving average and all random draws included."""

import json

import pytest
import torch
from datasets import Dataset
from parts import PASSAGES, make_tiny_model, make_word_tokenizer
from transformers import Qwen2ForCausalLM

from rex_rag.config import REXRAGConfig
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.trainer import REXRAGTrainer


def brevity(completions, **_):
    return [-0.01 * len(completion[0]["content"]) for completion in completions]


def make_trainer(folder, output, settings):
    return REXRAGTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder),
        args=REXRAGConfig(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=6,
            learning_rate=2e-3,
            num_generations=6,
            num_probe_slots=3,
            probe_probability=0.7,
            keep_ratio=0.4,
            keep_ratio_schedule="accuracy_ema",
            max_prompt_length=32,
            max_turn_tokens=30,
            max_observation_tokens=40,
            max_sequence_length=200,
            max_turns=2,
            retrieval_top_k=1,
            exploration_prompts=str(folder / "pool.txt"),
            prompt_template=str(folder / "prompt.txt"),
            **settings,
        ),
        train_dataset=Dataset.from_list(
            [
                {"question": f"where is the {word}", "golden_answers": ["oak"]}
                for word in ["owl", "fox", "hill", "tree"]
            ]
            * 4
        ),
        retriever=BM25Retriever(PASSAGES),
        processing_class=make_word_tokenizer(),
        reward_funcs=brevity,
        recipe="recipes/example.yaml",
    )


def timeless(history):
    return [
        {key: value for key, value in row.items() if "seconds" not in key and key not in ("step_time",)}
        for row in history
        if "loss" in row
    ]


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (3, {"per_device_train_batch_size": 18}),
        (2, {"per_device_train_batch_size": 9, "steps_per_generation": 2}),  # two updates a generation batch
        (3, {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2, "steps_per_generation": 2}),
        (2, {"per_device_train_batch_size": 18, "num_iterations": 2}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, at, settings):
    settings = {**settings, "save_steps": at}
    folder = tmp_path / "tiny"
    make_tiny_model(make_word_tokenizer()).save_pretrained(folder)
    (folder / "pool.txt").write_text("<think> Wait I may be wrong .\n<think> Maybe not so .\n<think> Hold on .\n")
    (folder / "prompt.txt").write_text("Question: {question}")

    whole = make_trainer(folder, tmp_path / "whole", settings)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{at}"
    state = json.loads((checkpoint / "rex_rag_state.json").read_text())
    assert 0 <= state["keep_ratio"]["value"] < 0.4  # the average moved: a random policy's probes are wrong

    resumed = make_trainer(folder, tmp_path / "resumed", settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert timeless(whole.state.log_history) == timeless(resumed.state.log_history)
    assert len(timeless(whole.state.log_history)) == 6
    assert sum(row.get("probes/kept", 0) for row in timeless(whole.state.log_history)[at:]) > 0
    for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    card = (tmp_path / "whole" / "README.md").read_text()
    for words in ("REX-RAG", "2508.08149", "recipes/example.yaml", "BM25", "em/originals"):
        assert words in card, words
