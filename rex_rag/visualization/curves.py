"""Training curves of one or several runs in one figure, from the log history of `trainer_state.json`."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rex_rag.support.errors import UserError
from rex_rag.support.log_rows import EXACT_MATCH, UNNAMED_SET, evaluated_sets
from rex_rag.support.run_log import LOG_FILE, read_log
from rex_rag.visualization.escape import without_controls
from rex_rag.visualization.files import new_figure, picture_format, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

STATE_FILE = "trainer_state.json"


class _Panel(NamedTuple):
    """metrics: (key, label) of its lines. spikes: what is drawn logarithmically where something towers over it, the
    height of the lowest line ("lines", which may lie orders of magnitude apart) or of the highest ("tallest")."""

    title: str
    hint: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    spikes: str = ""


# What everybody asks of a run; docs/health.md, "Reading the curves", says what answers look like.
_QUESTIONS = (
    _Panel(
        "Does it learn?", "exact match: should rise", "share", ((EXACT_MATCH, "training, sampled"),)
    ),  # and evaluation sets
    _Panel(
        "Does it leave dead ends?",
        "dead ends should fall; rescued ones show the way",
        "share of questions",
        (("dead_end/rate", "dead ends"), ("dead_end/rescue_rate", "rescued, of those probed")),
    ),
    _Panel(
        "Is there something to learn from?",
        "groups neither all right nor all wrong: not near 0",
        "share",
        (("signal/trained", "groups with signal"), ("probes/mixing_share", "probes among rows")),
    ),
    _Panel(
        "Is it healthy?",
        "KL grows slowly, entropy stays above 0; neither jumps",
        "nats a token",
        (("kl", "KL"), ("entropy", "entropy")),
        "lines",
    ),
    _Panel(
        "What does it do?",
        "searches as many as questions need; invalid ones fade",
        "count a rollout",
        (("searches/mean", "searches"), ("invalid_actions/mean", "invalid actions"), ("unanswered/rate", "no answer")),
        "tallest",
    ),
    _Panel(
        "What does it cost?",
        "which part takes the time",
        "seconds a step",
        (("step_time", "step"), ("seconds/generation", "generation"), ("seconds/retrieval", "retrieval")),
        "tallest",
    ),
)
_FURTHER = (
    _Panel("Probes", "what the filter keeps", "count a step", (("probes/made", "made"), ("probes/kept", "kept"))),
    _Panel("Reward", "by kind", "mean", (("reward/originals", "originals"), ("reward/probes", "probes"))),
    _Panel(
        "Importance weight",
        "far above 1: few rows count",
        "weight",
        (("importance_weight/mean", "mean"), ("importance_weight/max", "max")),
        "lines",
    ),
    _Panel("Effective sample size", "near 1: all rows count", "share of rows", (("importance_weight/ess", "ESS"),)),
    _Panel(
        "Clipped",
        "tokens without gradient",
        "share of tokens",
        (("clip_ratio/policy", "policy"), ("clip_ratio/probe", "probe"), ("clip_ratio/region_mean", "all")),
    ),
    _Panel(
        "KL by kind of token",
        "inserted ones are not sampled, and may be far",
        "nats",
        (("kl/policy", "policy"), ("kl/probe", "probe")),
        "lines",
    ),
    _Panel(
        "Completion length",
        "model-written",
        "tokens",
        (
            ("completions/mean_length", "mean"),
            ("completions/min_length", "shortest"),
            ("completions/max_length", "longest"),
        ),
        "tallest",
    ),
    _Panel(
        "Cut short, repetitive, garbled",
        "should stay near 0",
        "share of rollouts",
        (
            ("completions/clipped_ratio", "out of tokens"),
            ("repetitive/rate", "repetitive"),
            ("garbled/rate", "garbled"),
        ),
    ),
    _Panel("Gradient", "norm before clipping", "norm", (("grad_norm", "gradient"),), "tallest"),
)
_SPIKE = 5.0  # times a line's usual height
_LINE_STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (8, 3)))
# Okabe and Ito's colours, told apart with any colour vision; yellow is left out, too pale for a line on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^v*P"
# Single steps of several runs hide each other: they are drawn as running means over a 25th of the longest run's steps.
_WINDOWS = 25


def read_log_history(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The log rows of a training run.

    Args:
        path: a `trainer_state.json`, or a training run's directory: its `log.jsonl`, also while it trains, before the
            first step without rows; in a run without one its state's, or its newest checkpoint's where that has come
            further.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is not a trainer's state.
    """
    path = Path(path)
    if path.is_file():
        return _read_state(path)[1]
    logged = read_log(path)
    if logged:
        return logged
    checkpoints = [(_number(found.parent), found) for found in path.glob(f"checkpoint-*/{STATE_FILE}")]
    files = [path / STATE_FILE] if (path / STATE_FILE).is_file() else []
    files += [max(checkpoints)[1]] if checkpoints else []
    if not files and logged is None:
        raise FileNotFoundError(
            f"there is neither {LOG_FILE} nor {STATE_FILE} in {path}, nor a checkpoint with one; name a training "
            "run's output directory. A run that is still loading its model has none yet"
        )
    if not files:
        return []
    return max(map(_read_state, files), key=lambda state: state[0])[1]


def _read_state(file: Path) -> tuple[int, list[dict[str, Any]]]:
    """Steps done, and the log rows."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); name a {STATE_FILE} that training wrote") from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise UserError(f"{file} has no list `log_history`; name a {STATE_FILE} that training wrote")
    steps = state.get("global_step")
    return steps if isinstance(steps, int) else 0, history


def _number(checkpoint: Path) -> int:
    suffix = checkpoint.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdecimal() else -1


def labelled_runs(runs: Sequence[str]) -> dict[str, Path]:
    """`DIR` or `LABEL=DIR` of each run as {label: path}; without a label, the end of the path that tells it apart.

    Raises:
        ValueError: for a label or a directory given twice.
    """
    given: list[tuple[str | None, Path]] = []
    for run in runs:
        label, equals, path = run.partition("=")
        # A directory may have an equals sign in its own name.
        given.append((label, Path(path)) if equals and label and not Path(run).exists() else (None, Path(run)))
    unlabelled = [path.resolve().parts for label, path in given if label is None]
    depth = 1
    while len({parts[-depth:] for parts in unlabelled}) < len(unlabelled) and depth < max(map(len, unlabelled)):
        depth += 1
    labelled: dict[str, Path] = {}
    for own, folder in given:
        name = own if own is not None else "/".join(folder.resolve().parts[-depth:])
        if name in labelled:
            raise UserError(f"two runs are called {name!r}; name each once, and tell them apart by LABEL=DIR")
        labelled[name] = folder
    return labelled


def plot_training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike,
    title: str = "Training",
    every_panel: bool = False,
) -> Path:
    """Draw the training curves of one or several runs into one PNG or SVG, as the name ends; return its path.

    Six panels answer a question each; the first one shows the evaluation sets beside the training questions.

    Args:
        runs: {name: rows}, rows as in `log_history` of trainer_state.json. Runs are told apart by colour and marker,
            metrics of a panel by line style. Several runs, if long, are drawn as running means, single steps faint
            behind. Rows without a step, and values that are not finite, are left out.
        path: the image.
        title: above all panels.
        every_panel: draw what is asked more seldom too.

    A panel none of whose metrics has a finite value says so instead of showing an empty plot.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
        ValueError: for a name that ends neither in .png nor in .svg.
    """
    picture_format(path)
    learns, *others = _QUESTIONS
    panels = (learns._replace(metrics=learns.metrics + _evaluated(runs)), *others, *(_FURTHER if every_panel else ()))
    columns = 3
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(5 * columns, 3.1 * rows, layout="constrained")
    figure.suptitle(without_controls(title), parse_math=False)
    longest = max((row["step"] for log in runs.values() for row in log if "step" in row), default=0)
    window = max(1, int(longest) // _WINDOWS) if len(runs) > 1 else 1
    for axes, panel in zip(figure.subplots(rows, columns).flat, panels, strict=True):
        _draw_panel(axes, runs, panel.metrics, window)
        axes.set_title(panel.title, fontsize=11, pad=18)
        axes.text(0.5, 1.02, panel.hint, ha="center", va="bottom", transform=axes.transAxes, fontsize=8, color="0.35")
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(panel.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        if panel.spikes:
            _compress_spikes(axes, min if panel.spikes == "lines" else max)
    if len(runs) > 1:
        handles = [_line("-", without_controls(name), _look(number)) for number, name in enumerate(runs)]
        legend = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(runs), 4),
            fontsize=9,
            title=f"running means over {window} steps, single steps behind" if window > 1 else None,
            title_fontsize=9,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return write_figure(figure, path, dpi=110)


def curve(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and finite values of a metric in log rows, by step; of a step logged twice, the later value."""
    points = {
        float(row["step"]): float(row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    }
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def running_mean(steps: Sequence[float], values: Sequence[float], window: int) -> list[float]:
    """The mean of the values around each one, as many as there are within `window` steps, at ends and gaps fewer.

    Counted in steps and not in values, so that a metric of every hundredth step is not smoothed over the whole run.
    """
    before, after = (window - 1) // 2, window // 2
    means = []
    for step in steps:
        part = values[bisect_left(steps, step - before) : bisect_right(steps, step + after)]
        means.append(sum(part) / len(part))
    return means


def _evaluated(runs: Mapping[str, Sequence[Mapping]]) -> tuple[tuple[str, str], ...]:
    """(metric key, label) of exact match in the evaluation sets that training looked at."""
    prefixes: dict[str, str] = {}
    for rows in runs.values():
        for row in rows:
            prefixes |= evaluated_sets(row)
    return tuple((prefix + EXACT_MATCH, name or UNNAMED_SET) for name, prefix in sorted(prefixes.items()))


def _draw_panel(
    axes: Axes, runs: Mapping[str, Sequence[Mapping]], metrics: Sequence[tuple[str, str]], window: int
) -> None:
    drawn: dict[str, Any] = {}  # label: line style
    overlaid = len(runs) > 1
    for number, rows in enumerate(runs.values()):
        for place, (key, label) in enumerate(metrics):
            steps, values = curve(rows, key)
            if not steps:
                continue
            style = _LINE_STYLES[place % len(_LINE_STYLES)]
            drawn.setdefault(label, style)
            # With one run colour is free to tell metrics apart as well.
            look = _look(number if overlaid else place)
            if window > 1:
                axes.plot(steps, values, linestyle=style, color=look["color"], linewidth=0.6, alpha=0.3)
                values = running_mean(steps, values, window)
            # Few markers, so that the line style can still be seen.
            every = max(1, len(steps) // 8)
            axes.plot(steps, values, linestyle=style, linewidth=1.4, label=label, markevery=every, **look)
    if drawn:
        if overlaid:
            axes.legend(handles=[_line(style, label, {"color": "0.3"}) for label, style in drawn.items()], fontsize=7)
        else:
            axes.legend(fontsize=7, framealpha=0.6)
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", integer=True)
        # From zero up, or a constant line would be magnified into noise.
        low, high = min(0.0, axes.dataLim.ymin), max(0.0, axes.dataLim.ymax)
        room = 0.05 * ((high - low) or 1.0)
        axes.set_ylim(low - room if low < 0 else 0.0, high + room)
    else:
        keys = "\n".join(key for key, _ in metrics)
        axes.text(0.5, 0.5, f"no value:\n{keys}", ha="center", va="center", transform=axes.transAxes, color="0.4")
        axes.set_xticks([])
        axes.set_yticks([])


def _compress_spikes(axes: Axes, of_lines: Callable[..., float]) -> None:
    """Where something towers over the usual height of the lowest or the highest line, draw it logarithmically.

    The usual height of a line is the 90th percentile of its values, of a kind that a few spikes do not move.
    """
    import numpy as np

    lines = [sorted(abs(value) for value in np.asarray(line.get_ydata())) for line in axes.get_lines()]
    heights = [values[int(0.9 * (len(values) - 1))] for values in lines]
    usual = of_lines((height for height in heights if height > 0), default=0.0)
    if usual and max(map(max, lines)) > _SPIKE * usual:
        from matplotlib.ticker import SymmetricalLogLocator

        axes.set_yscale("symlog", linthresh=usual, linscale=2.0)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=usual, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic above {usual:.2g}", fontsize=8)


def _look(run: int) -> dict[str, Any]:
    # The eighth run has the first one's colour again, and the second one's marker.
    marker = _MARKERS[(run + run // len(_COLOURS)) % len(_MARKERS)]
    return {"color": _COLOURS[run % len(_COLOURS)], "marker": marker, "markersize": 3}


def _line(style: Any, label: str, look: Mapping[str, Any]) -> Line2D:
    """A line for a legend alone."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle=style, linewidth=1.4, label=label, **look)
