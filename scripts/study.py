"""A study on HopWorld: a grid of starts, cells and seeds, each trained by `rex_rag.train` and watched by hop count.

    python scripts/study.py run recipes/reproduction/NAME.yaml [--jobs 2] [--cells grpo token] [--seeds 0 1 2]
    python scripts/study.py show recipes/reproduction/NAME.yaml

`run` leaves out what is done: every finished run is a line of `recipes/reproduction/results/NAME.jsonl`, known by the
hash of all that it was made of. `show` needs these lines alone: it writes NAME.md and NAME.png beside them.

A study names `starts` (options of `rex_rag.quickstart.warm_start`), `cells` (a recipe and overrides), `settings` of
all of them, `seeds`, and `start_seeds`: seed s trains from the start of seed s modulo that, which is made once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import yaml
from scipy.stats import t as student

from rex_rag.quickstart.hopworld import TEST_FILES

ROOT = Path(__file__).resolve().parents[1]
HOPS = {"one_hop": TEST_FILES[1], "two_hop": TEST_FILES[2]}
# What of the log stands in a line: of training, step by step, and of the evaluation of each hop count.
LOGGED = {
    "em": "em/originals",
    "dead_ends": "dead_end/rate",
    "rescued": "dead_end/rescue_rate",
    "searches": "searches/mean",
    "kl": "kl/policy",
    "tokens": "tokens/generated",
}
LEFT = 0.5  # exact match of two-hop questions at which the dead end counts as left
ONE_CORE = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Run:
    """One run of a study. `config` is all that it is made of but the code."""

    start: str
    cell: str
    seed: int
    config: dict

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


class Study:
    """A study's file, its runs and its results."""

    def __init__(self, path: Path) -> None:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.name = path.stem
        self.title = content["title"]
        self.starts, self.cells = content["starts"], content["cells"]
        self.settings, self.start_seeds = content.get("settings", {}), content["start_seeds"]
        self.seeds = range(content["seeds"])
        self.results = path.parent / "results" / f"{self.name}.jsonl"

    def runs(self, starts: list[str] | None, cells: list[str] | None, seeds: list[int] | None) -> list[Run]:
        """Those asked for, seed by seed, so that a study that is broken off has all cells of its first seeds."""
        found = []
        for seed in seeds or self.seeds:
            for start in starts or self.starts:
                for cell in cells or self.cells:
                    own = dict(self.cells[cell] or {})
                    if start not in own.pop("starts", self.starts):
                        continue
                    config = {
                        "start": {**self.starts[start], "seed": seed % self.start_seeds},
                        "recipe": own.pop("recipe", "quickstart/rex_rag"),
                        "overrides": {**self.settings, **own, "seed": seed},
                    }
                    found.append(Run(start, cell, seed, config))
        return found

    def done(self) -> dict[str, dict]:
        """Hash of a run -> its line, from this study and those beside it, which may have a run in common."""
        files = sorted(self.results.parent.glob("*.jsonl"))
        lines = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
        return {line["hash"]: line for line in lines}


def words(options: dict, dash: str = "_") -> list[str]:
    """Options as a command line's words."""
    found = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        found += [
            f"--{name.replace('_', dash)}",
            *(str(one).lower() if one in (True, False) else str(one) for one in values),
        ]
    return found


def call(arguments: list[str], log: Path) -> None:
    env = {
        **os.environ,
        **ONE_CORE,
        **OFFLINE,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=env, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(
            f"python -m {' '.join(arguments)}\nended with {done.returncode}; its last words, of {log}:\n"
            + log.read_text(encoding="utf-8")[-2000:]
        )


def make_start(options: dict, folder: Path) -> Path:
    """The warm start of these options, made where it is not there."""
    known = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / known
    if not (place / "warm_start").is_dir():  # written whole, behind the world
        place.mkdir(parents=True, exist_ok=True)
        call(
            ["rex_rag.quickstart.warm_start", "--output", str(place / "warm_start"), *words(options, "-")],
            place / "log.txt",
        )
    return place


def train(run: Run, start: Path, log: Path) -> dict:
    """One run; returns its line."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        fixed = {
            "config": f"recipes/{run.config['recipe']}.yaml",
            "model_name_or_path": start / "warm_start",
            "datasets": start / "world" / "train.jsonl",
            "corpus": start / "world" / "corpus.jsonl",
            "output_dir": f"{scratch}/run",
            "eval_benchmarks": [f"{name}={start / 'world' / file}" for name, file in HOPS.items()],
            **{
                "eval_strategy": "steps",
                "eval_on_start": True,
                "per_device_eval_batch_size": 100,
                "num_generations_eval": 1,
            },
            **{"save_strategy": "no", "log_completions": False, "logging_steps": 1},
        }
        call(["rex_rag.train", *words({**fixed, **run.config["overrides"]})], log)
        state = json.loads(Path(scratch, "run", "trainer_state.json").read_text(encoding="utf-8"))
    steps, evaluated = [], {}
    for row in state["log_history"]:
        if "loss" in row:
            steps.append([row["step"], *(_short(row.get(name)) for name in LOGGED.values())])
        for hop in HOPS:
            if f"eval_{hop}_em/originals" in row:
                evaluated.setdefault(row["step"], {})[hop] = _short(row[f"eval_{hop}_em/originals"])
    return {
        **{"hash": run.hash, "start": run.start, "cell": run.cell, "seed": run.seed, "config": run.config},
        "columns": ["step", *LOGGED],
        "steps": steps,
        "evaluated": [[step, *(found[hop] for hop in HOPS)] for step, found in sorted(evaluated.items())],
        "seconds": round(time.perf_counter() - began),
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def run_study(study: Study, options: argparse.Namespace) -> None:
    """Everything that is not done yet, `jobs` runs at once, one core each."""
    done = study.done()
    waiting = [run for run in study.runs(options.starts, options.cells, options.seeds) if run.hash not in done]
    starts = {json.dumps(run.config["start"], sort_keys=True): run.config["start"] for run in waiting}
    logs = options.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    study.results.parent.mkdir(parents=True, exist_ok=True)
    lock, began, finished = Lock(), time.perf_counter(), 0

    def one(run: Run) -> None:
        nonlocal finished
        line = train(run, made[json.dumps(run.config["start"], sort_keys=True)], logs / f"{run.hash}.txt")
        with lock, study.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            finished += 1
            left = (time.perf_counter() - began) / finished * (len(waiting) - finished) / 60
            figures = summary(line)
            print(
                f"{finished}/{len(waiting)}  {run.start} {run.cell} seed {run.seed}: two hops "
                f"{figures['two_hop_last']:.2f}, one hop at least {figures['one_hop_lowest']:.2f}, "
                f"{line['seconds']} s; {left:.0f} min left",
                flush=True,
            )

    with ThreadPoolExecutor(options.jobs) as pool:
        print(f"{len(starts)} starts and {len(waiting)} runs to do, {options.jobs} at once", flush=True)
        made = dict(
            zip(
                starts,
                pool.map(lambda start: make_start(start, options.work / "starts"), starts.values()),
                strict=True,
            )
        )
        list(pool.map(one, waiting))


def spent(line: dict) -> dict[int, float]:
    """Tokens generated by a run up to a step."""
    place, total, found = line["columns"].index("tokens"), 0.0, {0: 0.0}
    for row in line["steps"]:
        total += row[place] or 0.0  # none in a step of a batch that an earlier one generated
        found[row[0]] = total
    return found


def summary(line: dict, budget: float = math.inf) -> dict[str, float]:
    """A run's figures: what the tables show of it, up to the last evaluation within a budget of tokens."""
    tokens = spent(line)
    steps, one, two = zip(*(row for row in line["evaluated"] if tokens[row[0]] <= budget), strict=True)
    left = next((step for step, value in zip(steps, two, strict=True) if value >= LEFT), math.inf)
    return {
        "two_hop_last": two[-1],
        "two_hop_mean": statistics.mean(two),
        "one_hop_lowest": min(one),
        "left_at": left,
        "step": steps[-1],
        "tokens": tokens[steps[-1]],
    }


def interval(values: list[float], digits: int = 2) -> str:
    """Mean and half width of its 95 % interval over seeds (Student's t); of one or two seeds, their values."""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


TABLE = (
    *("cell", "seeds", "left the dead end", "2-hop EM at the end", "mean on the way", "lowest 1-hop EM of a run"),
    *("2-hop EM at the end less the first cell's, same seeds", "steps", "tokens"),
)


def columns(figures: dict[int, dict], first: dict[int, dict]) -> list[str]:
    """What the table says of a cell, from its figures by seed and those of the first cell."""
    rows = list(figures.values())
    left = sorted(row["left_at"] for row in rows if row["left_at"] < math.inf)
    paired = [figures[seed]["two_hop_last"] - first[seed]["two_hop_last"] for seed in figures if seed in first]
    return [
        str(len(rows)),
        f"{len(left)} of {len(rows)}" + (f", median step {statistics.median(left):g}" if left else ""),
        interval([row["two_hop_last"] for row in rows]),
        interval([row["two_hop_mean"] for row in rows]),
        " to ".join(f"{end(row['one_hop_lowest'] for row in rows):.2f}" for end in (min, max)),
        interval(paired) if paired else "",
        f"{statistics.mean(row['step'] for row in rows):.0f}",
        f"{statistics.mean(row['tokens'] for row in rows):,.0f}",
    ]


def show_study(study: Study) -> None:
    """A table a start, and a picture of exact match over generated tokens.

    A run's figures end where it has spent the tokens of the first cell's run from the same seed.
    """
    runs = {run.hash: run for run in study.runs(None, None, None)}
    done = study.done()
    lines = [{**done[known], "start": run.start, "cell": run.cell} for known, run in runs.items() if known in done]
    text = [f"# {study.title}", ""]
    for start in study.starts:
        text += [f"## Start {start}", "", f"| {' | '.join(TABLE)} |", "|---" * len(TABLE) + "|"]
        first: dict[int, dict] = {}
        for cell in study.cells:
            figures = {
                line["seed"]: summary(line, first[line["seed"]]["tokens"] if line["seed"] in first else math.inf)
                for line in lines
                if (line["start"], line["cell"]) == (start, cell)
            }
            if figures:
                text.append(f"| {cell} | {' | '.join(columns(figures, first))} |")
                first = first or figures
        text.append("")
    (study.results.parent / f"{study.name}.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    draw(study, lines)


def draw(study: Study, lines: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = plt.get_cmap("tab10" if len(study.cells) <= 10 else "tab20").colors
    figure, axes = plt.subplots(
        len(HOPS), len(study.starts), figsize=(4.2 * len(study.starts) + 2, 6), sharex=True, sharey=True, squeeze=False
    )
    for column, start in enumerate(study.starts):
        axes[0][column].set_title(start)
        for row, hop in enumerate(HOPS):
            for cell in study.cells:
                own = [line for line in lines if (line["start"], line["cell"]) == (start, cell)]
                color = colors[[*study.cells].index(cell)]
                curves = [
                    ([spent(line)[point[0]] / 1000 for point in line["evaluated"]], _column(line, row + 1))
                    for line in own
                ]
                for tokens, values in curves:
                    axes[row][column].plot(tokens, values, color=color, alpha=0.25, linewidth=0.8)
                if curves:
                    tokens, mean = (
                        [statistics.mean(at) for at in zip(*part, strict=True)] for part in zip(*curves, strict=True)
                    )
                    axes[row][column].plot(tokens, mean, color=color, label=f"{cell} ({len(own)})")
            axes[row][0].set_ylabel(f"exact match, {hop.replace('_', ' ')}")
        axes[-1][column].set_xlabel("tokens generated, thousands")
    axes[0][-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(study.results.parent / f"{study.name}.png", dpi=120)


def _column(line: dict, index: int) -> list[float]:
    return [row[index] for row in line["evaluated"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=("run", "show"))
    parser.add_argument("study", type=Path, help="a file of recipes/reproduction")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one core each")
    parser.add_argument("--starts", nargs="+", help="only these")
    parser.add_argument("--cells", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "studies", help="starts and logs")
    options = parser.parse_args()
    study = Study(options.study)
    if options.verb == "run":
        run_study(study, options)
    show_study(study)


if __name__ == "__main__":
    main()
