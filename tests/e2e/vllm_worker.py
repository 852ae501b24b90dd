"""Trains a recipe with a colocated vLLM on CPU and writes down how its tokens line up with the trainer's.

python tests/e2e/vllm_worker.py OUTPUT.json --config RECIPE [--key value ...]
"""

import json
import sys
from pathlib import Path

import torch
import vllm._custom_ops as ops
from transformers import AutoTokenizer
from trl import TrlParser

from rex_rag.data.qa import load_questions
from rex_rag.retrieval.load import load_retriever
from rex_rag.training.recipe import RECIPE_PARTS
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import SegmentKind


def prepare_vllm_on_cpu() -> None:
    """What only vLLM's CPU build needs, before its engine starts."""
    # Without this it repacks the weights, and TRL's weight sync cannot find their loaders.
    ops._supports_onednn = False


def main() -> None:
    prepare_vllm_on_cpu()
    output, arguments = Path(sys.argv[1]), sys.argv[2:]
    parser = TrlParser(RECIPE_PARTS)
    questions, _, retrieval, config, model = parser.parse_args_and_config(arguments)
    trainer = REXRAGTrainer(
        model=model.model_name_or_path,
        retriever=load_retriever(retrieval),
        args=config,
        train_dataset=load_questions(questions),
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left"),
    )
    comparisons = []
    score = trainer._generate_and_score_completions

    def compare(inputs):
        result = score(inputs)
        trajectories = [row for row in trainer._slots.rows if row is not None]
        comparisons.append([compare_row(trainer.model, row) for row in trajectories])
        return result

    trainer._generate_and_score_completions = compare
    trainer.train()
    log = [row for row in trainer.state.log_history if "em/originals" in row]
    output.write_text(json.dumps({"log": log, "comparisons": comparisons}))


@torch.no_grad()
def compare_row(model, row) -> dict:
    """The engine's log-probability of every sampled token against a plain forward pass over the same ids.

    `shifted` is what the mean difference would be if the ids were off by one.
    """
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logps = model(ids).logits[0].float().log_softmax(-1)
    first = len(row.prompt_ids)
    differences, shifted, inserted = [], [], 0
    for position, (token, value, kind) in enumerate(
        zip(row.completion_ids, row.sampling_logprobs, row.kinds, strict=True)
    ):
        assert (value is None) == (kind != SegmentKind.POLICY), "log-probabilities belong to sampled tokens alone"
        if value is None:
            inserted += 1
            continue
        differences.append(abs(value - logps[first + position - 1, token].item()))
        if position:
            shifted.append(abs(value - logps[first + position - 2, token].item()))
    return {
        "is_probe": row.is_probe,
        "inserted": inserted,
        "mean": sum(differences) / len(differences),
        "shifted": sum(shifted) / len(shifted),
    }


if __name__ == "__main__":
    main()
