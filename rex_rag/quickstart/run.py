"""The main job on the built-in world, start to end, on a CPU: warm start, REX-RAG training, before and after.

    make quickstart         or         python -m rex_rag.quickstart [--output outputs/quickstart] [--seed 0]

Training itself goes through rex_rag.train and the recipe quickstart/rex_rag, as a real run does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin starve whatever else is running
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig, TrlParser

from rex_rag.data.qa import QuestionArguments
from rex_rag.evaluation.dead_ends import EvaluatedQuestion, evaluate_questions, probe_dead_ends
from rex_rag.models.generation import TransformersGenerator
from rex_rag.probes import explorer_kind
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.rollout.agent import Agent
from rex_rag.support.recipes import FOLDER
from rex_rag.tools import make_tools
from rex_rag.training.config import REXRAGConfig
from rex_rag.visualization.curves import plot_training_curves
from rex_rag.visualization.page import write_trajectory_page
from rex_rag.visualization.records import trajectory_record
from rex_rag.visualization.text import write_trajectory_text

# The recipe names its files from here, in a checkout and in an installed package alike.
ROOT = FOLDER.parent
RECIPE = "recipes/quickstart/rex_rag.yaml"
ACCELERATE = "recipes/accelerate_configs/cpu.yaml"
SAMPLES = 5
# glibc hands big freed buffers back to the kernel and faults them in anew at every step; keeping them saves a third.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0, help="seed of world, warm start, training and evaluation")
    parser.add_argument("--test-questions", type=int, default=100, help="test questions per hop count")
    parser.add_argument("--keep-warm-start", action="store_true", help="use the warm start already in --output")
    args, overrides = parser.parse_known_args()
    args.output = args.output.absolute()
    args.overrides = overrides  # further recipe keys, passed on to training
    return args


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(*command: str) -> None:
    """Run a step as its own process, output passed through; stop the quickstart where it fails."""
    result = subprocess.run(command, cwd=ROOT, env={**KEEP_MEMORY, **os.environ}, check=False)
    if result.returncode:
        sys.exit(f"quickstart stopped: {' '.join(command)} ended with exit code {result.returncode}")


def recipe_settings(args: argparse.Namespace) -> tuple[list[str], REXRAGConfig, RetrieverArguments]:
    """The recipe as training will see it, with paths and seed of this run."""
    overrides = [
        *("--model_name_or_path", str(args.output / "warm_start")),
        *("--datasets", str(args.output / "world" / "train.jsonl")),
        *("--corpus", str(args.output / "world" / "corpus.jsonl")),
        *("--output_dir", str(args.output / "rex_rag")),
        *("--seed", str(args.seed)),
        *("--overwrite_output_dir", "true"),
        *args.overrides,
    ]
    parser = TrlParser((QuestionArguments, RetrieverArguments, REXRAGConfig, ModelConfig))
    _, retrieval, config, _ = parser.parse_args_and_config(["--config", str(ROOT / RECIPE), *overrides])
    return overrides, config, retrieval


class Examiner:
    """Evaluates a saved model on the test questions: greedily once, sampled five times, dead ends probed."""

    def __init__(self, config: REXRAGConfig, retrieval: RetrieverArguments, questions: list[dict], seed: int) -> None:
        self.config = config
        self.retriever = load_retriever(retrieval)
        self.questions = questions
        self.seed = seed

    def __call__(self, name: str, model_path: Path) -> tuple[dict, list[EvaluatedQuestion]]:
        started = time.perf_counter()
        set_seed(self.seed)
        tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        total = len(self.questions) * (1 + SAMPLES)
        with tqdm(total=total, desc=f"evaluating {name}", unit="rollout", dynamic_ncols=True) as bar:
            runs = {}
            for mode, samples in (("greedy", 1), ("sampled", SAMPLES)):
                temperature = 1.0 if mode == "sampled" else 0.0
                agent = Agent(
                    lambda stop, temperature=temperature: TransformersGenerator(
                        model, tokenizer, temperature=temperature, stop_strings=stop
                    ),
                    make_tools(self.config.agent_tools, self.retriever, self.config.retrieval_top_k),
                    tokenizer,
                    self.config.agent_protocol(),
                    self.config.rollout_budget(),
                    chat_template_kwargs=self.config.chat_template_kwargs,
                )
                runs[mode] = evaluate_questions(agent, self.questions, samples=samples, progress=bar.update)
            explorer = explorer_kind(self.config.explorer).make(agent, self.config, None)
            probe_dead_ends(agent, runs["sampled"], explorer, seed=self.seed)
        return summarize(runs["greedy"], runs["sampled"], time.perf_counter() - started), runs["sampled"]


def summarize(greedy: list[EvaluatedQuestion], sampled: list[EvaluatedQuestion], seconds: float) -> dict:
    """The figures of one model, by hop count and over all."""

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    figures: dict = {}
    hops = sorted({question.hops for question in sampled})
    for key, chosen in [*((f"{count}_hop", {count}) for count in hops), ("all", set(hops))]:
        drawn = [question for question in sampled if question.hops in chosen]
        dead = [question for question in drawn if question.is_dead_end]
        rollouts = [rollout for question in drawn for rollout in question.rollouts]
        figures[key] = {
            "questions": len(drawn),
            "em_greedy": mean(question.accuracy for question in greedy if question.hops in chosen),
            "em_sampled": mean(question.accuracy for question in drawn),
            "dead_end_rate": len(dead) / len(drawn),
            "rescue_rate": mean(question.is_rescued for question in dead if question.probes),
            "searches_per_question": mean(len(rollout.searches) for rollout in rollouts),
            "invalid_actions_per_question": mean(rollout.invalid_actions for rollout in rollouts),
        }
    figures["seconds"] = seconds
    return figures


ROWS = (
    ("exact match, greedy", "em_greedy"),
    ("exact match, sampled", "em_sampled"),
    ("dead-end rate (5 of 5 wrong)", "dead_end_rate"),
    ("rescue rate (dead ends probed)", "rescue_rate"),
    ("searches per question", "searches_per_question"),
    ("invalid actions per question", "invalid_actions_per_question"),
)


def table(before: dict, after: dict) -> str:
    """The before/after table as Markdown."""
    lines = ["| figure | questions | before | after |", "|---|---|---|---|"]
    keys = [key for key in before if key != "seconds"]
    for label, field in ROWS:
        for key in keys:
            cells = [
                "-" if value != value else f"{value:.3f}" for value in (before[key][field], after[key][field])
            ]  # NaN: nothing to rate
            lines.append(f"| {label} | {key.replace('_', '-')} ({before[key]['questions']}) | {' | '.join(cells)} |")
    lines.append(f"| evaluation, seconds | all | {before['seconds']:.0f} | {after['seconds']:.0f} |")
    return "\n".join(lines)


def example_records(before: list[EvaluatedQuestion], after: list[EvaluatedQuestion], steps: int) -> list[dict]:
    """A few whole trajectories of multi-hop questions: dead ends, their probes, and what training made of them."""
    records = []
    for old, new in zip(before, after, strict=True):
        if (old.hops or 1) < 2 or not (old.is_dead_end and old.probes):
            continue
        probe = max(old.probes, key=old.is_correct)
        first = len(records)
        for step, question, trajectory in (
            (0, old, old.rollouts[probe.parent]),
            (0, old, probe),
            (steps, new, new.rollouts[0]),
        ):
            correct = question.is_correct(trajectory)
            record = trajectory_record(
                trajectory,
                question.question,
                question.golden_answers,
                float(correct),
                rescue=trajectory.is_probe and correct,
                step=step,
            )
            record["parent"] = first if trajectory.is_probe else None  # on the page, a record's number is its place
            records.append(record)
        if len(records) >= 36:
            break
    return records


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    disable_progress_bar()
    seconds: dict[str, float] = {}

    def timed(name: str, step, *arguments):
        begun = time.perf_counter()
        result = step(*arguments)
        seconds[name] = time.perf_counter() - begun
        return result

    warm_start = args.output / "warm_start"
    if not (args.keep_warm_start and warm_start.is_dir()):
        say("1/4 warm start: a tiny policy learns to search from imperfect demonstrations")
        command = [
            sys.executable,
            "-m",
            "rex_rag.quickstart.warm_start",
            "--output",
            str(warm_start),
            "--seed",
            str(args.seed),
        ]
        timed("warm_start", run, *command)
    overrides, config, retrieval = recipe_settings(args)
    rows = [json.loads(line) for line in (args.output / "world" / "test.jsonl").read_text().splitlines()]
    by_hops: dict[int, list[dict]] = {}
    for row in rows:
        by_hops.setdefault(row["metadata"]["hops"], []).append(row)
    questions = [row for hops in sorted(by_hops) for row in by_hops[hops][: args.test_questions]]
    examine = Examiner(config, retrieval, questions, args.seed)

    say("2/4 before: the warm-started policy on test questions it has never seen")
    before, before_runs = timed("evaluation_before", examine, "before", warm_start)
    say(f"3/4 REX-RAG: {config.max_steps} steps through rex_rag.train and {RECIPE}")
    launch = ["-m", "accelerate.commands.launch", "--config_file", ACCELERATE]
    launch += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]  # else it warns that it chose this
    timed("training", run, sys.executable, *launch, "-m", "rex_rag.train", "--config", RECIPE, *overrides)
    say("4/4 after")
    after, after_runs = timed("evaluation_after", examine, "after", Path(config.output_dir))

    history = json.loads((Path(config.output_dir) / "trainer_state.json").read_text())["log_history"]
    plot_training_curves({"REX-RAG": history}, args.output / "training_curves.png")
    records = example_records(before_runs, after_runs, config.max_steps)
    write_trajectory_page(records, args.output / "trajectories.html", title="HopWorld: dead ends, probes, and after")
    write_trajectory_text(records, args.output / "trajectories.txt")
    seconds["total"] = time.perf_counter() - started
    summary = {
        "before": before,
        "after": after,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": args.seed,
        "samples_per_question": SAMPLES,
        "recipe": RECIPE,
        "overrides": args.overrides,
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    markdown = table(before, after)
    (args.output / "summary.md").write_text(markdown + "\n", encoding="utf-8")
    print(f"\n{markdown}\n")
    print("  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    for name in ("summary.json", "training_curves.png", "trajectories.html", "trajectories.txt"):
        print(f"wrote {args.output / name}")
