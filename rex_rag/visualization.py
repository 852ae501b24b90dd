"""Pictures of a run: whole trajectories as a page or a text file, and training curves as an image.

Reads plain data only: trajectory records and the log history of `trainer_state.json`. No torch, no model, no network;
the page is one static file without scripts. Every text in it is escaped, since questions and passages are untrusted.
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.types import SegmentKind, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

KIND_MEANING = {
    SegmentKind.POLICY: "written by the model",
    SegmentKind.INFORMATION: "retrieved text, inserted",
    SegmentKind.FEEDBACK: "correction after an invalid action, inserted",
    SegmentKind.PROBE: "exploration prompt, inserted",
}

# Kinds differ by label and by border as well as by colour, for readers and printers without colour.
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
article { border-top: 1px solid #ccc; padding: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .8rem; margin: 0 0 .6rem; } dd { margin: 0; }
dt { color: #555; }
.segment { display: grid; grid-template-columns: 7.5rem 1fr; margin: .3rem 0; padding: .3rem .6rem;
  border-left: 5px solid; }
.label { font: bold 11px/2 ui-monospace, monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.policy { border-left-style: solid; border-color: #2b6cb0; background: #ebf4fb; }
.information { border-left-style: dotted; border-color: #5a6b3b; background: #f3f5ec; }
.feedback { border-left-style: dashed; border-color: #9c4221; background: #fdf1ea; }
.probe { border-left-style: double; border-color: #6b46c1; background: #f3eefc; }
.right { color: #22662d; font-weight: bold; } .wrong { color: #9b1c1c; font-weight: bold; }
"""
# The page needs its own style sheet and nothing else; a browser must not run or load anything a text smuggles in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def trajectory_record(
    trajectory: Trajectory,
    question: str,
    golden_answers: Sequence[str],
    reward: float | None,
    *,
    rescue: bool = False,
    step: int | None = None,
) -> dict[str, Any]:
    """A trajectory as a record of plain data that can be stored as JSON and shown by this module.

    Args:
        trajectory: an original, or a probe (it has a `PROBE` segment).
        question: the question it answers.
        golden_answers: the accepted answers.
        reward: its reward, `None` where it has none.
        rescue: whether it is a correct probe of a question all of whose originals were wrong.
        step: the training step it was sampled in.
    """
    return {
        "question": question,
        "golden_answers": list(golden_answers),
        "answer": trajectory.answer,
        "reward": None if reward is None else float(reward),
        "kind": "probe" if trajectory.is_probe else "original",
        "rescue": bool(rescue),
        "parent": trajectory.parent,
        "segments": trajectory.segment_texts(),
        "step": step,
    }


def read_completion_tables(path: str | os.PathLike, step: int | None = None) -> list[dict[str, Any]]:
    """Trajectory records from the completion tables that training writes with `log_completions`.

    Args:
        path: one table (parquet), a folder of them, or a run's output directory.
        step: only rows of this training step; all by default.

    Returns:
        The records in the order of steps and rows: a question's originals, then its probes. `reward` is exact match.

    Raises:
        FileNotFoundError: where there is no table.
        ValueError: for a table that was not written by this package's trainer, or none with the step.
    """
    rows = [row for file in _completion_files(Path(path)) for row in _completion_rows(file)]
    steps = sorted({row["step"] for row in rows})
    if step is not None:
        rows = [row for row in rows if row["step"] == step]
        if not rows:
            known = f"{steps[0]} to {steps[-1]}" if steps else "none"
            raise ValueError(f"{path} has no completions of step {step}; it has those of steps {known}")
    reached = {(row["step"], row["question"]) for row in rows if not row["is_probe"] and row["exact_match_reward"]}
    return [
        {
            "question": row["question"],
            "golden_answers": row["golden_answers"],
            "answer": row["predicted_answer"],
            "reward": row["exact_match_reward"],
            "kind": "probe" if row["is_probe"] else "original",
            "rescue": bool(
                row["is_probe"] and row["exact_match_reward"] and (row["step"], row["question"]) not in reached
            ),
            "parent": None,
            "segments": json.loads(row["segments"]),
            "step": row["step"],
        }
        for row in rows
    ]


def _completion_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for folder in (path / "completions", path):
        if files := sorted(folder.glob("completions_*.parquet")):
            return files
    raise FileNotFoundError(
        f"there are no completion tables at {path}; name a completions_*.parquet or a run's output directory. "
        "Training writes them with log_completions: true"
    )


def _completion_rows(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table: it would take `step=1` in a folder's name for a column.
        table = pyarrow.parquet.ParquetFile(file).read()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file ({error}); name a completion table") from None
    columns = ["step", "question", "golden_answers", "predicted_answer", "is_probe", "exact_match_reward", "segments"]
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{file} has no column {', '.join(missing)}; only tables written by this package's trainer can be shown"
        )
    return table.select(columns).to_pylist()


def write_trajectory_page(records: Iterable[Mapping[str, Any]], path: str | os.PathLike, title: str) -> Path:
    """Write trajectory records (`trajectory_record`) as one self-contained HTML page and return its path.

    A record's number on the page is its index; `parent` of a probe is the index of its original among the records.

    Raises:
        ValueError: for a record without segments list or with an unknown segment kind, by its index.
    """
    records = list(records)
    legend = "".join(_segment_html(kind, meaning) for kind, meaning in KIND_MEANING.items())
    body = "".join(_record_html(index, record, len(records)) for index, record in enumerate(records))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n<section><h2>Legend</h2>\n{legend}</section>\n"
        f"{body or '<p>No trajectories were recorded.</p>'}</body></html>\n"
    )
    return _write_text(Path(path), page)


def write_trajectory_text(records: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Write trajectory records as a plain text file, each segment behind its kind, and return its path.

    Raises:
        ValueError: as `write_trajectory_page`.
    """
    blocks = []
    for index, record in enumerate(records):
        facts = "\n".join(f"{name}: {' '.join(str(value).split())}" for name, value in _facts(record))
        segments = "\n".join(
            # Indented, so that no text can pass for the label of a segment.
            f"[{kind.name}]\n" + "\n".join(f"    {line}" for line in text.strip().splitlines())
            for kind, text in _segments(index, record)
        )
        blocks.append(f"=== #{index} {_headline(record)}\n{facts}\n{segments}\n")
    return _write_text(Path(path), "\n".join(blocks) or "No trajectories were recorded.\n")


def _record_html(index: int, record: Mapping[str, Any], count: int) -> str:
    segments = "".join(_segment_html(kind, text.strip()) for kind, text in _segments(index, record))
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in _facts(record)
    )
    parent = record.get("parent")
    if isinstance(parent, int) and 0 <= parent < count:
        facts += f'<dt>original</dt><dd><a href="#t{parent}">see #{parent}</a></dd>'
    verdict = "right" if (record.get("reward") or 0) > 0 else "wrong"
    return (
        f'<article id="t{index}"><h2>#{index} <span class="{verdict}">{html.escape(_headline(record))}</span></h2>'
        f"<dl>{facts}</dl>{segments}</article>\n"
    )


def _segment_html(kind: SegmentKind, text: str) -> str:
    name = kind.name
    return (
        f'<div class="segment {name.lower()}"><span class="label">{name}</span>'
        f'<span class="text">{html.escape(text)}</span></div>\n'
    )


def _headline(record: Mapping[str, Any]) -> str:
    if record.get("kind") != "probe":
        kind = "original"
    elif record.get("parent") is None:
        kind = "probe"
    else:
        kind = f"probe of #{record['parent']}"
    reward = record.get("reward")
    outcome = "not scored" if reward is None else "rewarded" if reward > 0 else "not rewarded"
    return f"{kind}, {outcome}" + (", a rescue" if record.get("rescue") else "")


def _facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    answer, reward, step = record.get("answer"), record.get("reward"), record.get("step")
    facts = [
        ("question", record.get("question", "")),
        ("gold", " | ".join(map(str, record.get("golden_answers", ())))),
        ("answer", "(none)" if answer is None else answer),
        ("reward", "(none)" if reward is None else f"{reward:g}"),
    ]
    return facts if step is None else [*facts, ("step", step)]


def _segments(index: int, record: Mapping[str, Any]) -> list[tuple[SegmentKind, str]]:
    if "segments" not in record:
        raise ValueError(f"trajectory record {index} has no 'segments'; make records with trajectory_record()")
    segments = []
    for segment in record["segments"]:
        name = segment.get("kind")
        if name not in SegmentKind.__members__:
            raise ValueError(
                f"trajectory record {index} has a segment of kind {name!r}; it must be one of "
                f"{', '.join(SegmentKind.__members__)}"
            )
        segments.append((SegmentKind[name], str(segment.get("text", ""))))
    return segments


# One panel: title, unit of the vertical axis, (metric key, label) of its lines.
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Exact match", "share", (("em/originals", "originals"), ("em/probes", "probes"))),
    ("Dead ends", "share", (("dead_end/rate", "dead ends"), ("dead_end/rescue_rate", "rescued"))),
    ("Probes", "count a step", (("probes/made", "made"), ("probes/kept", "kept"))),
    ("Mixing share a", "share", (("probes/mixing_share", "a"),)),
    (
        "Importance weight",
        "weight",
        (("importance_weight/mean", "mean"), ("importance_weight/max", "max"), ("importance_weight/ess", "ESS share")),
    ),
    ("Clipped", "share of tokens", (("clip_ratio/policy", "policy"), ("clip_ratio/probe", "probe"))),
    ("KL", "nats", (("kl", "all"), ("kl/policy", "policy"), ("kl/probe", "probe"))),
    ("Completion length", "tokens", (("completions/mean_length", "mean"),)),
    ("Actions a rollout", "count", (("searches/mean", "searches"), ("invalid_actions/mean", "invalid"))),
    (
        "Time a step",
        "seconds",
        (("step_time", "step"), ("seconds/generation", "generation"), ("seconds/retrieval", "retrieval")),
    ),
    ("Reward", "mean", (("reward", "reward"),)),
    ("Entropy", "nats", (("entropy", "entropy"),)),
)
_LINE_STYLES = ("-", "--", ":")


def plot_training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike, title: str = "Training"
) -> Path:
    """Draw the training curves of one or several runs into one PNG and return its path.

    Args:
        runs: {name: rows}, rows as in `log_history` of trainer_state.json. Runs are told apart by colour and marker,
            metrics of a panel by line style. Rows without a step, and values that are not finite, are left out.
        path: the image.
        title: above all panels.

    A panel none of whose metrics was logged says so instead of showing an empty plot.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing training curves needs matplotlib, one of this package's requirements: `pip install matplotlib`"
        ) from error
    columns = 3
    rows = math.ceil(len(_PANELS) / columns)
    # A Figure of its own, not pyplot's: no global state and no choice of backend forced on the caller.
    figure = Figure(figsize=(5 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, unit, metrics) in zip(figure.subplots(rows, columns).flat, _PANELS, strict=True):
        _draw_panel(axes, runs, metrics)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
    return _write_aside(Path(path), lambda aside: figure.savefig(aside, format="png", dpi=110))


def curve(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and finite values of a metric in log rows, in the order logged."""
    points = [
        (float(row["step"]), float(row[key]))
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _draw_panel(axes: Axes, runs: Mapping[str, Sequence[Mapping]], metrics: Sequence[tuple[str, str]]) -> None:
    markers = "osD^v*"
    drawn = False
    for number, (run, rows) in enumerate(runs.items()):
        for (key, label), style in zip(metrics, _LINE_STYLES, strict=False):
            steps, values = curve(rows, key)
            if steps:
                drawn = True
                axes.plot(
                    steps,
                    values,
                    style,
                    color=f"C{number}" if len(runs) > 1 else f"C{_LINE_STYLES.index(style)}",
                    marker=markers[number % len(markers)],
                    markersize=3,
                    # Few markers, so that the line style can still be seen.
                    markevery=max(1, len(steps) // 8),
                    linewidth=1.4,
                    label=f"{run}: {label}" if len(runs) > 1 else label,
                )
    if drawn:
        axes.legend(fontsize=7, framealpha=0.6)
        axes.grid(alpha=0.3)
        # From zero up, or a constant line would be magnified into noise.
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.dataLim.ymin < 0 else 0.0)
    else:
        keys = "\n".join(key for key, _ in metrics)
        axes.text(0.5, 0.5, f"not logged:\n{keys}", ha="center", va="center", transform=axes.transAxes, color="0.4")
        axes.set_xticks([])
        axes.set_yticks([])


def _write_text(path: Path, text: str) -> Path:
    return _write_aside(path, lambda aside: Path(aside).write_text(text, encoding="utf-8"))


def _write_aside(path: Path, write: Callable[[str], Any]) -> Path:
    """Let `write` fill a file beside `path`, then rename it, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(aside)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path
