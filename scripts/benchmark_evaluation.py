"""How fast an evaluation runs: vLLM in batches against transformers one question at a time, in one run.

    python scripts/benchmark_evaluation.py --config recipes/evaluation/local_sample.yaml \\
        [--questions 400] [--batched 200] [--alone 40] [--json FILE] [--key value ...]

The last of the recipe's benchmarks with `--questions` questions or more is asked, a seeded subset of it: all of them
by vLLM in batches, the first `--batched` by transformers in batches, the first `--alone` by transformers one after the
other. Questions a second come from whole runs (searches, parsing and writing included), after a warm-up; loading a
model is not counted.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rex_rag.commands.evaluate import load_benchmarks
from rex_rag.commands.sections import parse_section
from rex_rag.commands.terminal import positive
from rex_rag.evaluation.arguments import EvaluationArguments, SearchArguments
from rex_rag.evaluation.benchmarks import Benchmark, subset
from rex_rag.evaluation.methods import make_method
from rex_rag.evaluation.records import Prediction
from rex_rag.evaluation.run import EvaluationRun
from rex_rag.evaluation.run_card import protocol_card
from rex_rag.evaluation.scores import read_predictions
from rex_rag.models.language_model import TRANSFORMERS, VLLM, LanguageModel, open_model
from rex_rag.retrieval.base import Retriever
from rex_rag.retrieval.load import load_retriever

WARM_UP_QUESTIONS = 8


def timed_run(
    model: LanguageModel,
    retriever: Retriever,
    arguments: EvaluationArguments,
    benchmark: Benchmark,
    batch_size: int,
) -> tuple[float, list[Prediction]]:
    """Seconds of one whole run, and its predictions."""
    method = make_method(
        arguments.method, arguments.prompt_text(), arguments.further_texts(), **arguments.method_options()
    )
    card = protocol_card(
        method=method,
        model=model.describe(),
        benchmarks=[benchmark],
        retriever={"kind": "benchmark", "description": retriever.description, "fingerprint": None},
        budget=arguments.budget(),
        temperature=0.0,
        samples=1,
        seed=arguments.seed,
        chunk_size=batch_size,
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = EvaluationRun(
            Path(scratch) / "run",
            card,
            [benchmark],
            method,
            model,
            retriever,
            budget=arguments.budget(),
            chunk_size=batch_size,
        )
        started = time.perf_counter()
        run.run()
        seconds = time.perf_counter() - started
        return seconds, read_predictions(Path(scratch) / "run" / benchmark.name)


def measure(arguments: EvaluationArguments, search: SearchArguments, questions: int, batched: int, alone: int) -> dict:
    """Questions a second of the three ways, and how many trajectories of vLLM's are transformers' own."""
    large = [
        benchmark for benchmark in load_benchmarks(replace(arguments, subset=None)) if len(benchmark) >= questions
    ]
    if not large:
        raise ValueError(f"no benchmark of the recipe has {questions} questions; lower --questions")
    asked = subset(large[-1], questions, arguments.subset_seed)
    warm_up, in_batches, by_one = (
        replace(asked, questions=asked.questions[:first]) for first in (WARM_UP_QUESTIONS, batched, alone)
    )
    # vLLM before the retriever: its CPU build cannot start once a dense encoder or bm25s has loaded llvmlite.
    models = {
        backend: open_model(replace(arguments, backend=backend, temperature=0.0).model_options())
        for backend in (VLLM, TRANSFORMERS)
    }
    retriever = load_retriever(search)
    ways = {
        "vllm, batches": (models[VLLM], asked, arguments.batch_size),
        "transformers, batches": (models[TRANSFORMERS], in_batches, arguments.batch_size),
        "transformers, one by one": (models[TRANSFORMERS], by_one, 1),
    }
    figures: dict = {"benchmark": asked.name, "batch_size": arguments.batch_size, "ways": {}}
    predictions = {}
    for name, (model, benchmark, batch_size) in ways.items():
        timed_run(model, retriever, arguments, warm_up, batch_size)
        seconds, predictions[name] = timed_run(model, retriever, arguments, benchmark, batch_size)
        samples = [prediction.samples[0] for prediction in predictions[name]]
        figures["ways"][name] = {
            "questions": len(benchmark),
            "seconds": round(seconds, 2),
            "questions_per_second": round(len(benchmark) / seconds, 2),
            "tokens_per_question": round(sum(sample.tokens for sample in samples) / len(samples), 1),
            "searches_per_question": round(sum(len(sample.searches) for sample in samples) / len(samples), 2),
        }
    by_transformers = predictions["transformers, batches"]
    pairs = zip(predictions["vllm, batches"][: len(by_transformers)], by_transformers, strict=True)
    figures["same_trajectories"] = round(sum(one == other for one, other in pairs) / len(by_transformers), 4)
    rate = {name: way["questions_per_second"] for name, way in figures["ways"].items()}
    figures["vllm_over_one_by_one"] = round(rate["vllm, batches"] / rate["transformers, one by one"], 2)
    figures["load_average"] = [round(load, 2) for load in os.getloadavg()]
    return figures


def main(words: list[str]) -> None:
    def switches(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--questions", type=positive, default=400, help="questions by vLLM, in batches")
        parser.add_argument("--batched", type=positive, default=200, help="of them by transformers, in batches")
        parser.add_argument("--alone", type=positive, default=40, help="of them by transformers, one by one")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")

    arguments, search, options = parse_section(
        "evaluate", __doc__.split("\n")[0], "evaluate", (EvaluationArguments, SearchArguments), words, switches
    )
    figures = measure(arguments, search, options.questions, options.batched, options.alone)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    main(sys.argv[1:])
