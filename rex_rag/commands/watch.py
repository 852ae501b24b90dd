"""`rex-rag watch`: how a training run is doing, on this machine or from a copied folder."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rex_rag.commands.terminal import positive
from rex_rag.support.numbers import clock, is_number

_SHOWN = 600  # characters of a segment

# What is shown of a step: title, logged figure, format.
_COLUMNS = (
    *(("step", "step", "d"), ("EM", "em/originals", ".2f"), ("probe EM", "em/probes", ".2f")),
    *(("dead ends", "dead_end/rate", ".2f"), ("rescued", "dead_end/rescue_rate", ".2f")),
    *(("searches", "searches/mean", ".2f"), ("KL", "kl", ".3f"), ("entropy", "entropy", ".2f")),
    *(("length", "completions/mean_length", ".0f"), ("grad", "grad_norm", ".2g"), ("seconds", "step_time", ".1f")),
)


def add_watch(commands: argparse._SubParsersAction) -> None:
    """`rex-rag watch`: the last steps, health, some trajectories."""
    watch = commands.add_parser(
        "watch",
        help="show how a training run is doing",
        description="Show the last steps of a training run, its health, and some of its newest trajectories (with "
        "log_completions: true). It reads the run's folder alone, so a copied one does too.",
    )
    watch.add_argument("folder", metavar="RUN_DIRECTORY", type=Path, help="output_dir of a training run")
    watch.add_argument("--steps", type=positive, default=10, metavar="N", help="how many steps (default: 10)")
    watch.add_argument("--trajectories", type=int, default=2, metavar="N", help="how many of them (default: 2)")
    watch.add_argument("--every", type=positive, metavar="SECONDS", help="again and again; Ctrl-C ends it")
    watch.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> None:
    while True:
        print(describe(options.folder, options.steps, options.trajectories))
        if options.every is None:
            return
        time.sleep(options.every)


def describe(run: Path, steps: int, trajectories: int) -> str:
    """A run in the words of the terminal.

    Raises:
        FileNotFoundError: where the folder holds no training run.
    """
    from rex_rag.visualization.curves import read_log_history

    rows = read_log_history(run)
    trained = [row for row in rows if "loss" in row]
    blocks = [f"{run}: {_progress(rows, trained)}"]
    blocks += [_table(trained[-steps:]), _health(trained)] if trained else []
    blocks += _evaluations(rows)
    return "\n\n".join([*blocks, *_newest(run, trajectories)]) + "\n"


def _progress(rows: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]) -> str:
    if not trained:
        return "no step is logged yet"
    last = trained[-1]
    said = f"step {last['step']}"
    if total := last.get("max_steps"):
        said += f" of {total}"
        left = (total - last["step"]) * _median([row["step_time"] for row in trained[-20:] if "step_time" in row])
        said += f", about {clock(left)} of training left" if left else ", done" if "train_runtime" in rows[-1] else ""
    if when := rows[-1].get("time"):
        said += f"; last logged {clock(max(time.time() - when, 0))} ago"
    return said


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [column for column in _COLUMNS if any(is_number(row.get(column[1])) for row in rows)]
    cells = [[title for title, _, _ in shown]]
    cells += [[format(row[key], form) if is_number(row.get(key)) else "" for _, key, form in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _health(rows: Sequence[Mapping[str, Any]]) -> str:
    from rex_rag.training.health_figures import Figures

    figures = Figures()
    for row in rows:
        figures.add(row["step"], row)
    if not figures.out:
        return "health: all figures within bounds"
    return f"health: OUT OF BOUNDS since step {figures.out_since}: {figures}"


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    from rex_rag.support.log_rows import EXACT_MATCH, UNNAMED_SET, evaluated_sets

    newest: dict[str, str] = {}
    for row in rows:
        for name, prefix in evaluated_sets(row).items():
            newest[name or UNNAMED_SET] = f"{row[prefix + EXACT_MATCH]:.3f} (step {row['step']})"
    said = ", ".join(f"{name} {value}" for name, value in newest.items())
    return [f"exact match in evaluation: {said}"] if said else []


def _newest(run: Path, count: int) -> list[str]:
    from rex_rag.visualization.records import completion_files, read_completion_tables
    from rex_rag.visualization.text import trajectory_text

    files = completion_files(run)
    if not files or count < 1:
        return []
    records = read_completion_tables(files[-1])
    chosen = sorted(records, key=lambda record: not record["rescue"])[:count]  # rescues first
    for record in chosen:
        record["parent"] = None  # a place in the table, which is not shown
        record["segments"] = [{**one, "text": _shortened(one["text"])} for one in record["segments"]]
    return [trajectory_text(chosen)]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"
