"""The main job on the built-in world, start to end, on a CPU: a start in dead ends, two ways on, before and after.

    make quickstart         or         python -m rex_rag.quickstart [--output outputs/quickstart] [--seed 0]

Training itself goes through rex_rag.train and the recipes of recipes/quickstart, as a real run does. Two recipes are
trained side by side, each on its share of the cores; `--recipes` names others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin starve whatever else is running
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig, TrlParser

from rex_rag.data.qa import QuestionArguments
from rex_rag.evaluation.dead_ends import EvaluatedQuestion, evaluate_questions, probe_dead_ends
from rex_rag.models.files import load_causal_lm
from rex_rag.models.generation import TransformersGenerator
from rex_rag.probes import explorer_kind
from rex_rag.quickstart.hopworld import TEST_FILES
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.rollout.agent import Agent
from rex_rag.support.options import OptionParser
from rex_rag.support.recipes import FOLDER
from rex_rag.support.wording import counted
from rex_rag.tools import make_tools
from rex_rag.training.config import REXRAGConfig
from rex_rag.visualization.curves import plot_training_curves
from rex_rag.visualization.files import new_figure, write_figure
from rex_rag.visualization.page import write_trajectory_page
from rex_rag.visualization.records import trajectory_record
from rex_rag.visualization.text import write_trajectory_text

# Recipes name their files from here, in a checkout and in an installed package alike.
ROOT = FOLDER.parent
RECIPES = ("grpo", "rescue_replay")
ACCELERATE = "recipes/accelerate_configs/cpu.yaml"
SAMPLES = 5
EVALUATED = {"one_hop": 1, "two_hop": 2}  # evaluation sets during training, and their hop counts
# glibc hands big freed buffers back to the kernel and faults them in anew at every step; keeping them saves a third.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}
# Of loading and mapping, which last a second: two programs cannot share a line.
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def parse_args() -> argparse.Namespace:
    parser = OptionParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0, help="seed of world, warm start, training and evaluation")
    parser.add_argument("--test-questions", type=int, default=100, help="test questions per hop count")
    parser.add_argument("--keep-warm-start", action="store_true", help="use the warm start already in --output")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help="of recipes/quickstart")
    args, overrides = parser.parse_known_args()
    for name in args.recipes:
        if not recipe_of(name).is_file():
            known = ", ".join(sorted(path.stem for path in recipe_of(name).parent.glob("*.yaml")))
            parser.error(f"--recipes {name}: there is no such recipe of the quickstart; there are {known}")
    args.output = args.output.absolute()
    args.overrides = overrides  # further recipe keys, passed on to every training
    return args


def recipe_of(name: str) -> Path:
    return FOLDER / "quickstart" / f"{name}.yaml"


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(*command: str) -> None:
    """Run a step as its own process, output passed through; stop the quickstart where it fails."""
    result = subprocess.run(command, cwd=ROOT, env={**KEEP_MEMORY, **os.environ}, check=False)
    if result.returncode:
        sys.exit(f"quickstart stopped: {' '.join(command)} ended with exit code {result.returncode}")


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> None:
    """Run several at once, every line of their output behind its name; stop the quickstart where one fails."""
    env = {**KEEP_MEMORY, **NO_BARS, **os.environ}
    started = {
        name: subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for name, command in commands.items()
    }
    width = max(map(len, started))

    def pass_on(name: str, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            print(f"{name:<{width}} | {line.rstrip()}", flush=True)

    readers = [Thread(target=pass_on, args=item, daemon=True) for item in started.items()]
    try:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        failed = [name for name, process in started.items() if process.wait()]
    finally:
        for process in started.values():
            process.kill()
    if failed:
        sys.exit(f"quickstart stopped: training of {', '.join(failed)} failed; what it said stands above")


def recipe_settings(args: argparse.Namespace, name: str) -> tuple[list[str], REXRAGConfig, RetrieverArguments]:
    """A recipe as training will see it, with paths and seed of this run."""
    world = args.output / "world"
    overrides = [
        *("--model_name_or_path", str(args.output / "warm_start")),
        *("--datasets", str(world / "train.jsonl")),
        *("--corpus", str(world / "corpus.jsonl")),
        *("--output_dir", str(args.output / name)),
        *("--seed", str(args.seed)),
        *("--overwrite_output_dir", "true", "--logging_steps", "5"),
        *args.overrides,
    ]
    parser = TrlParser((QuestionArguments, RetrieverArguments, REXRAGConfig, ModelConfig))
    _, retrieval, config, _ = parser.parse_args_and_config(["--config", str(recipe_of(name)), *overrides])
    evaluated = [f"{key}={world / TEST_FILES[hops]}" for key, hops in EVALUATED.items()]
    overrides += ["--eval_benchmarks", *evaluated, "--eval_strategy", "steps", "--eval_steps", "10"]
    overrides += ["--eval_on_start", "true", "--per_device_eval_batch_size", "100"]
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
        tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left", trust_remote_code=False)
        model = load_causal_lm(str(model_path), dtype=torch.float32).eval()
        total = len(self.questions) * (1 + SAMPLES)
        with tqdm(total=total, desc=f"evaluating {name}", unit="rollout", dynamic_ncols=True) as bar:
            runs = {}
            for mode, samples in (("greedy", 1), ("sampled", SAMPLES)):
                temperature = 1.0 if mode == "sampled" else 0.0
                agent = Agent(
                    partial(_generator, model, tokenizer, temperature),
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


def _generator(model: Any, tokenizer: Any, temperature: float, stop: tuple[str, ...]) -> TransformersGenerator:
    return TransformersGenerator(model, tokenizer, temperature=temperature, stop_strings=stop)


def summarize(greedy: list[EvaluatedQuestion], sampled: list[EvaluatedQuestion], seconds: float) -> dict:
    """The figures of one model, by hop count and over all."""

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    figures: dict = {}
    hops = sorted({question.hops for question in sampled if question.hops is not None})
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


def table(figures: Mapping[str, dict]) -> str:
    """Models side by side, as Markdown."""
    lines = [f"| figure | questions | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
    first = next(iter(figures.values()))
    for label, field in ROWS:
        for key in (key for key in first if key != "seconds"):
            values = (one[key][field] for one in figures.values())
            cells = ["-" if value != value else f"{value:.3f}" for value in values]  # NaN: nothing to rate
            lines.append(f"| {label} | {key.replace('_', '-')} ({first[key]['questions']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


# Greedy two-hop exact match over seeds 0 to 4, each with a world and a start of its own.
OVER_SEEDS = {"rescue_replay": ".80 to .92", "grpo": ".00"}


def tolerance(figures: Mapping[str, dict], *, unchanged: bool) -> str:
    """How far the table's figures are from those of another machine or, of unchanged recipes, of another seed."""
    rows = next(iter(figures.values()))
    fewest = min(rows[key]["questions"] for key in rows if key not in ("seconds", "all"))
    known = "; ".join(f"{name} {OVER_SEEDS[name]}" for name in figures if unchanged and name in OVER_SEEDS)
    return (
        "Another machine moves these figures by some hundredths, since it adds numbers up in another order; "
        f"{counted(fewest, 'question')} tell a share to ±{1 / math.sqrt(fewest):.2f} (95 %) at worst."
        + (f" Over seeds 0 to 4, two-hop exact match, greedy: {known}." if known else "")
    )


def draw(histories: Mapping[str, list[dict]], path: Path) -> None:
    """Exact match by hop count, dead ends and rescues over the steps of every run, in one picture."""
    figure = new_figure(8, 8, layout="constrained")
    exact, dead, rescued = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": (2, 1, 1)})
    for color, (name, history) in zip(("C7", "C0", "C1", "C2", "C3"), histories.items(), strict=False):
        for key, hops in EVALUATED.items():
            field = f"eval_{key}_em/originals"
            points = [(row["step"], row[field]) for row in history if field in row]
            style = {"linestyle": "--", "alpha": 0.6} if hops == 1 else {"marker": "o"}
            exact.plot(*zip(*points, strict=True), color=color, label=f"{name}, {hops} hop{'s' * (hops > 1)}", **style)
        for axis, field in ((dead, "dead_end/rate"), (rescued, "dead_end/rescue_rate")):
            points = [(row["step"], row[field]) for row in history if row.get(field) is not None]
            axis.plot(*zip(*points, strict=True), color=color, label=name)
    exact.set_title("HopWorld, from a start in which every two-hop question is a dead end")
    exact.set_ylabel("exact match, held-out, greedy")
    exact.legend(loc="center left")
    dead.set_ylabel("dead ends,\nshare of questions")
    rescued.set_ylabel("rescued,\nshare of dead ends")
    rescued.set_xlabel("step")
    for axis in (exact, dead, rescued):
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    write_figure(figure, path, dpi=110)


def example_records(before: list[EvaluatedQuestion], after: list[EvaluatedQuestion], steps: int) -> list[dict]:
    """A few whole trajectories of multi-hop questions: dead ends, their probes, and what training made of them."""
    records: list[dict] = []
    for old, new in zip(before, after, strict=True):
        if (old.hops or 1) < 2 or not (old.is_dead_end and old.probes):
            continue
        probe = max(old.probes, key=old.is_correct)
        first = len(records)
        for step, question, trajectory in (
            (0, old, old.rollouts[probe.origin]),
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
    os.chdir(ROOT)  # where recipes find their files, wherever this was started
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
        say(
            "1/4 warm start: a tiny policy learns to search from demonstrations, and to stop half-way at two hops; "
            "until it answers questions of one hop"
        )
        command = ["-m", "rex_rag.quickstart.warm_start", "--output", str(warm_start), "--seed", str(args.seed)]
        timed("warm_start", run, sys.executable, *command, "--wrong-rate", "1.0")
    settings = {name: recipe_settings(args, name) for name in args.recipes}
    *_, (_, config, retrieval) = settings.values()
    world = args.output / "world"
    lines = [line for name in TEST_FILES.values() for line in _first_lines(world / name, args.test_questions)]
    examine = Examiner(config, retrieval, [json.loads(line) for line in lines], args.seed)

    say("2/4 before: the warm-started policy on test questions it has never seen")
    figures, runs = {}, {}
    figures["before"], runs["before"] = timed("evaluation_before", examine, "before", warm_start)
    steps = ", ".join(f"{name} {one.max_steps} steps" for name, (_, one, _) in settings.items())
    say(f"3/4 training by recipes/quickstart, side by side: {steps}")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE]
    launch += ["--num_cpu_threads_per_process", str(max(1, torch.get_num_threads() // len(settings)))]
    trainings = {
        name: [*launch, "-m", "rex_rag.train", "--config", str(recipe_of(name)), *overrides]
        for name, (overrides, *_) in settings.items()
    }
    timed("training", run_side_by_side, trainings)
    say("4/4 after")
    histories = {}
    for name, (_, own, _) in settings.items():
        output = Path(own.output_dir)
        figures[name], runs[name] = timed(f"evaluation_{name}", examine, name, output)
        histories[name] = json.loads((output / "trainer_state.json").read_text())["log_history"]

    draw(histories, args.output / "quickstart.png")
    plot_training_curves(histories, args.output / "training_curves.png")
    records = example_records(runs["before"], runs[args.recipes[-1]], config.max_steps)
    write_trajectory_page(records, args.output / "trajectories.html", title="HopWorld: dead ends, probes, and after")
    write_trajectory_text(records, args.output / "trajectories.txt")
    seconds["total"] = time.perf_counter() - started
    summary = {
        "figures": figures,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": args.seed,
        "samples_per_question": SAMPLES,
        "recipes": list(args.recipes),
        "overrides": args.overrides,
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    markdown = f"{table(figures)}\n\n{tolerance(figures, unchanged=not args.overrides)}"
    (args.output / "summary.md").write_text(markdown + "\n", encoding="utf-8")
    print(f"\n{markdown}\n")
    print(f"on this machine: {'  '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}")
    for name in ("quickstart.png", "training_curves.png", "trajectories.html", "trajectories.txt", "summary.json"):
        print(f"wrote {args.output / name}")


def _first_lines(path: Path, count: int) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()[:count]
