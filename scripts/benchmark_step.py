"""What REX-RAG costs: a training step with probes against a plain GRPO step from the same originals, in one run.

    python scripts/benchmark_step.py [--steps 20] [--config recipes/quickstart/rex_rag.yaml] [--key value ...]

Both trainers hold the same weights (nothing is updated) and take the same questions and random numbers, turn about, so
their originals are equal; a step is generation, scoring, loss and backward pass. Needs the quickstart's warm start, or
another model by --model_name_or_path.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from rex_rag.data.qa import load_questions
from rex_rag.retrieval.load import load_retriever
from rex_rag.training.recipe import RECIPE_PARTS
from rex_rag.training.trainer import REXRAGTrainer

# Of the cost of probes, what belongs to the method (more rows, longer ones) and what to the code can be told apart.
AIMS = {"rex_over_grpo": 1.15, "correction_share": 0.01, "engine_share": 0.02}


def make_trainer(arguments: list[str], probes: bool) -> REXRAGTrainer:
    parser = TrlParser(RECIPE_PARTS)
    questions, _, retrieval, config, model = parser.parse_args_and_config(arguments)
    if not probes:
        rows = config.per_device_train_batch_size // config.num_generations * config.num_originals
        switches = ["--num_generations", str(config.num_originals), "--num_probe_slots", "0"]
        switches += ["--per_device_train_batch_size", str(rows)]
        questions, _, retrieval, config, model = parser.parse_args_and_config(arguments + switches)
    trainer = REXRAGTrainer(
        model=model.model_name_or_path,
        retriever=load_retriever(retrieval),
        args=config,
        train_dataset=load_questions(questions),
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left"),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def one_step(trainer: REXRAGTrainer, questions: list[int], seed: int) -> dict[str, float]:
    """Seconds of a whole step, and of its parts as the trainer logs them."""
    trainer.state.global_step = seed  # seeds the draws
    batch = [dict(trainer.train_dataset[index]) for index in questions for _ in range(trainer.num_generations)]
    torch.manual_seed(seed)
    trainer._metrics["train"].clear()
    started = time.perf_counter()
    inputs = trainer._generate_and_score_completions(batch)
    trainer.compute_loss(trainer.model, inputs).backward()
    seconds = {"step": time.perf_counter() - started}
    trainer.model.zero_grad()
    for name in ("generation", "retrieval", "engine", "scoring", "correction", "realignment"):
        values = trainer._metrics["train"][f"seconds/{name}"]
        seconds[name] = values[-1] if values else 0.0
    seconds["rows"], seconds["length"] = inputs["completion_ids"].shape
    seconds["kept"] = trainer._metrics["train"]["probes/kept"][-1]
    seconds["originals"] = [row.completion_ids for row in trainer._slots.batch.originals]
    return seconds


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    own.add_argument("--steps", type=int, default=20)
    own.add_argument("--config", default="recipes/quickstart/rex_rag.yaml")
    own.add_argument("--output", type=Path, help="write the figures here as JSON, too")
    args, overrides = own.parse_known_args()
    disable_progress_bar()
    arguments = ["--config", args.config, "--save_strategy", "no", "--log_completions", "false", *overrides]
    rex, grpo = make_trainer(arguments, probes=True), make_trainer(arguments, probes=False)
    num_questions = rex.args.per_device_train_batch_size // rex.num_generations
    generator = torch.Generator().manual_seed(rex.args.seed)
    pairs = []
    for step in tqdm(range(-2, args.steps), desc="paired steps", unit="pair"):  # two to warm up
        questions = torch.randperm(len(rex.train_dataset), generator=generator)[:num_questions].tolist()
        order = (rex, grpo) if step % 2 else (grpo, rex)
        pair = {trainer is rex: one_step(trainer, questions, seed=step + 2) for trainer in order}
        if pair[True].pop("originals") != pair[False].pop("originals"):
            raise RuntimeError("the originals of the two trainers differ, so their times cannot be compared")
        if step >= 0:
            pairs.append((pair[True], pair[False]))
    figures = summarize(pairs)
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def summarize(pairs: list[tuple[dict, dict]]) -> dict:
    ratios = sorted(rex["step"] / grpo["step"] for rex, grpo in pairs)
    total = sum(rex["step"] for rex, _ in pairs)

    def share(*names: str) -> float:
        return sum(rex[name] for rex, _ in pairs for name in names) / total

    return {
        "pairs": len(pairs),
        "grpo_step_seconds": statistics.median(grpo["step"] for _, grpo in pairs),
        "rex_step_seconds": statistics.median(rex["step"] for rex, _ in pairs),
        "rex_over_grpo": total / sum(grpo["step"] for _, grpo in pairs),
        "rex_over_grpo_quartiles": [ratios[len(ratios) // 4], ratios[len(ratios) // 2], ratios[3 * len(ratios) // 4]],
        "probes_kept_per_step": statistics.mean(rex["kept"] for rex, _ in pairs),
        "rows_rex_over_grpo": sum(rex["rows"] for rex, _ in pairs) / sum(grpo["rows"] for _, grpo in pairs),
        "padded_length_rex_over_grpo": sum(rex["length"] for rex, _ in pairs) / sum(g["length"] for _, g in pairs),
        "generation_rex_over_grpo": sum(rex["generation"] for rex, _ in pairs)
        / sum(grpo["generation"] for _, grpo in pairs),
        "generation_share": share("generation"),
        "retrieval_share": share("retrieval"),
        "filter_scoring_share": share("scoring"),
        "correction_share": share("correction", "realignment"),
        "engine_share": share("engine"),
        "aims": AIMS,
    }


if __name__ == "__main__":
    main()
