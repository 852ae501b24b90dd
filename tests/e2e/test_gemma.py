"""A start from real pretrained weights, and two training steps from it by each recipe, on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rex_rag.protocols import SearchR1
from rex_rag.protocols.chat import encode_chat
from rex_rag.quickstart import gemma_start

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "The question asks for more than I have found so far, and the last passage may not be about what was asked."
for name in gemma_start.PACKAGES:
    pytest.importorskip(name, reason=f"{name} is not installed, `make gemma` brings it")

pytestmark = pytest.mark.slow


@torch.no_grad()
def token_log_probs(model, tokenizer, text: str) -> dict[str, torch.Tensor]:
    """(T,) log-probabilities of each token at every place of `<bos>` and a text."""
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return dict(zip(tokens, log_probs.unbind(1), strict=True))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of the start, and log-probabilities of the whole model and of the cut one before any training."""
    seen = {}
    load, train = gemma_start.load_gemma, gemma_start.train

    def loaded(folder):
        model, tokenizer = load(folder)
        seen["whole"] = token_log_probs(model, tokenizer, SENTENCE)
        return model, tokenizer

    def trained(args, model, tokenizer, rows, phase):
        seen["cut"] = token_log_probs(model, tokenizer, SENTENCE)
        return train(args, model, tokenizer, rows, phase)

    folder = tmp_path_factory.mktemp("gemma")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma_start, "load_gemma", loaded)
        patch.setattr(gemma_start, "train", trained)
        options = ["--max-steps", "2", "--batch-size", "2", "--check-questions", "0"]
        assert gemma_start.main(["--output", str(folder / "warm_start"), *options]) == 0
    return folder, seen


def test_the_cut_model_says_what_the_whole_one_says(start):
    folder, seen = start
    whole, cut = (seen[name] for name in ("whole", "cut"))
    assert len(cut) < 3000 < len(whole) == 262144
    kept = torch.stack([whole[token] for token in cut], dim=1)
    difference = kept.log_softmax(-1) - torch.stack(list(cut.values()), dim=1)
    assert difference.abs().max() < 1e-3
    # Real weights read by the right pieces behind <bos>: English is no surprise to them.
    tokenizer = AutoTokenizer.from_pretrained(folder / "warm_start")
    pieces = tokenizer.tokenize(SENTENCE)
    assert sum(whole[piece][place] for place, piece in enumerate(pieces)) / len(pieces) > -4
    figures = json.loads((folder / "warm_start" / "warm_start.json").read_text())
    assert figures["parameters"]["whole"] == 268098176 and figures["steps"] == 2 and math.isfinite(figures["loss"])
    prompt = encode_chat(tokenizer, SearchR1(template="Question: {question}").messages("Who?"))
    assert [place for place, token in enumerate(prompt) if token == tokenizer.bos_token_id] == [0]


@pytest.mark.parametrize("recipe", ["grpo", "rex_rag"])
def test_two_steps_on_the_cpu(start, recipe: str, tmp_path):
    folder, _ = start
    command = [sys.executable, "-m", "rex_rag.train", "--config", f"recipes/gemma-3-270m/{recipe}.yaml"]
    command += ["--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--save_strategy", "no"]
    command += ["--model_name_or_path", str(folder / "warm_start"), "--output_dir", str(tmp_path)]
    command += ["--datasets", str(folder / "world" / "train.jsonl")]
    command += ["--corpus", str(folder / "world" / "corpus.jsonl")]
    rows, slots = {"grpo": ("2", "0"), "rex_rag": ("3", "1")}[recipe]
    command += ["--num_generations", rows, "--num_probe_slots", slots]
    command += ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", "1"]
    # Every rollout is wrong after so short a start: the entropy bonus is what gives a gradient.
    command += ["--max_turns", "1", "--max_turn_tokens", "24", "--entropy_coef", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [row for row in history if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["grad_norm"] > 0
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) and math.isfinite(row["kl"])
