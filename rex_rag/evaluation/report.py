"""One table over several runs, the paper's published rows beside them.

Invariant: rows of one table were made under one protocol and from whole runs. What differs is refused, or, on request,
stands in a footnote of the row that differs; rows without one can be compared with each other, and the first is one of
them. Published rows always carry a footnote, which says where they are from and how their protocol differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rex_rag.evaluation.bootstrap import RESAMPLES, Estimate, macro_mean
from rex_rag.evaluation.finished import FinishedRun, read_run, run_directories, unlike_judges, unread_verdicts
from rex_rag.evaluation.published import (
    BENCHMARKS,
    SETTING,
    SIZES,
    SMALL_SET,
    PublishedRow,
    label,
    ordered,
    published_rows,
)
from rex_rag.evaluation.run_card import comparable
from rex_rag.evaluation.scores import ACCURACY, BenchmarkScores
from rex_rag.support.errors import UserError

# Extra columns, with what stands at their head.
COLUMNS = {
    "f1": "F1",
    "sub_match": "sub-match",
    "judge": "judged",
    "document_recall": "documents",
    "pass_at_k": "pass@k",
    "majority": "majority",
    "searches": "searches",
    "tokens": "tokens",
    "seconds": "seconds",
    "invalid": "invalid",
    "truncations": "truncations",
    "unanswered": "unanswered",
    "unreadable": "unreadable",
}
# Those that are means over questions.
WITH_INTERVAL = ("f1", "sub_match", "judge", "document_recall")
_EXPLAINED = {
    "f1": "F1: token F1, per cent, mean over sets",
    "sub_match": "sub-match: a gold answer stands in the answer, per cent, mean over sets",
    "judge": "judged: right in the opinion of a model, per cent, mean over sets",
    "document_recall": "documents: gold documents among all that the searches gave, per cent, mean over sets",
    "pass_at_k": "pass@k: a right answer among k samples, per cent, mean over sets",
    "majority": "majority: the vote of all samples is right, per cent, mean over sets",
    "searches": "searches: a sample",
    "tokens": "tokens: written by the model, a sample",
    "seconds": "seconds: of all sets and processes together",
    "invalid": "invalid: invalid actions a sample",
    "truncations": "truncations: how often text was cut, by cause",
    "unanswered": "unanswered: samples without an answer, per cent",
    "unreadable": "unreadable: samples whose answer names no choice, per cent of the multiple-choice sets",
}
_SIZE = re.compile(r"(?<![\w.])(\d+B)(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Column:
    """One benchmark: `size` questions in the whole set, of which `questions` were asked; `None` if runs differ."""

    name: str
    label: str
    kind: str
    questions: int | None
    size: int | None


@dataclass(frozen=True, slots=True)
class Cell:
    """A score in [0, 1]. `n` is `None` for published cells."""

    estimate: Estimate | float
    n: int | None = None
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Extra:
    """What an extra column says of a run: a number in the unit of `COLUMNS`, or text, and how a table shows it.

    interval: 95 %, in the same unit, for those of `WITH_INTERVAL`.
    """

    value: float | str
    text: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One run, or one published row. `extras` lacks what a run cannot say.

    mean_of_large: over the sets but the small one, where there are others beside it.
    """

    method: str
    model: str
    cells: dict[str, Cell]
    mean: Cell | None
    mean_of_large: Cell | None = None
    published: bool = False
    run: str = ""
    protocol: str = ""
    marks: tuple[str, ...] = ()
    extras: dict[str, Extra] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """A table, its footnotes (mark -> text) and the sentences below it; the first says what the figures are."""

    columns: tuple[Column, ...]
    extras: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: dict[str, str]
    remarks: tuple[str, ...]

    @property
    def means(self) -> dict[str, str]:
        """The columns of means, each an attribute of a row with what stands at its head."""
        large = _large([column.name for column in self.columns])
        return {
            **({"mean": "mean"} if len(self.columns) > 1 else {}),
            **({"mean_of_large": f"mean without {label(SMALL_SET)}"} if large else {}),
        }


def load_runs(
    paths: Sequence[str | Path],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    say: Callable[[str], object] | None = None,
) -> list[FinishedRun]:
    """Read and score the runs that `paths` name.

    Args:
        say: see `run_directories`.

    Raises:
        ReportError, ScoreError: see `run_directories` and `read_run`.
    """
    return [read_run(path, resamples=resamples, seed=seed) for path in run_directories(paths, say)]


def build_report(
    runs: Sequence[FinishedRun],
    *,
    extras: Sequence[str] = (),
    published: Sequence[str] | None = None,
    mark: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Put runs into one table.

    Args:
        extras: extra columns, of `COLUMNS`.
        published: model sizes of the published rows to show, none if empty. Default: the sizes in the models' names,
            or all if there is none; none if the runs share no set with the paper.
        mark: show runs of different protocols and runs that are not whole, with footnotes.

    Raises:
        ValueError: no run, an unknown column or size; without `mark`, protocols that differ or incomplete runs, each
            named with what differs or is missing.
    """
    if not runs:
        raise UserError("there is no run to report; name at least one directory")
    check_choices(extras, published)
    if not mark:
        _check_comparable(runs, extras)
    names = ordered(name for run in runs for name in run.benchmarks)
    notes = _Notes()
    rows = []
    unmarked: list[FinishedRun] = []
    for run, row, found in _against_others(runs, extras):
        marks = [notes.mark(f"not comparable with row {row + 1}: {'; '.join(found)}")] if found else []
        if not found:
            unmarked.append(run)
        rows.append(_row(run, marks, names, extras, notes, resamples, seed))
    shown = _published_sizes(runs, names) if published is None else published
    whole = set(names) >= set(BENCHMARKS)
    theirs = [row for row in published_rows(shown) if (whole and not row.em) or not row.em.keys().isdisjoint(names)]
    rows += [_published(row, names, notes) for row in theirs]
    columns = tuple(_column(name, runs) for name in names)
    remarks = _remarks(columns, runs, extras, unmarked)
    if theirs:
        remarks.append(f"Published rows: {SETTING}.")
    return Report(columns, tuple(extras), tuple(rows), notes.texts, tuple(remarks))


def check_choices(extras: Sequence[str], published: Sequence[str] | None) -> None:
    """Raise a ValueError for an extra column or a size of published rows that does not exist."""
    unknown = [name for name in extras if name not in COLUMNS]
    if unknown:
        raise UserError(f"there is no column {unknown[0]!r}; choose from {', '.join(COLUMNS)}")
    published_rows(published or ())


def _check_comparable(runs: Sequence[FinishedRun], extras: Sequence[str]) -> None:
    problems = [f"{run.path} is not whole: {run.missing_text}" for run in runs if run.missing]
    problems += [
        f"{run.path} is not comparable with {runs[row].path}: {'; '.join(found)}"
        for run, row, found in _against_others(runs, extras)
        if found
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(
            f"these runs cannot stand in one table:\n  {listed}\nfinish them or report them apart, or show them with "
            "footnotes (--mark)"
        )


def _obstacles(first: FinishedRun, second: FinishedRun, extras: Sequence[str]) -> list[str]:
    """What keeps the figures that a table shows from being compared."""
    return comparable(first.card, second.card) + (unlike_judges(first, second) if "judge" in extras else [])


def _against_others(
    runs: Sequence[FinishedRun], extras: Sequence[str]
) -> Iterator[tuple[FinishedRun, int, list[str]]]:
    """Each run, with the place of the first that it cannot be compared with, and what keeps it from that.

    The first run sets the protocol; where it never searches, the first that does sets the rest of it. A run that
    differs is no measure for those after it.
    """
    alike: list[int] = []
    for place, run in enumerate(runs):
        obstacles = ((other, _obstacles(runs[other], run, extras)) for other in alike)
        other, found = next(((other, found) for other, found in obstacles if found), (place, []))
        if not found:
            alike.append(place)
        yield run, other, found


class _Notes:
    """Footnotes: equal texts share a mark, in the order of first use."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def mark(self, text: str) -> str:
        for mark, known in self.texts.items():
            if known == text:
                return mark
        number = len(self.texts)
        mark = (chr(ord("a") + number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
        self.texts[mark] = text
        return mark


def _row(
    run: FinishedRun,
    marks: list[str],
    names: Sequence[str],
    extras: Sequence[str],
    notes: _Notes,
    resamples: int,
    seed: int,
) -> Row:
    if run.missing:
        marks = [*marks, notes.mark(f"not whole, so without a mean: {run.missing_text}")]
    cells = {name: Cell(scores.main, scores.n) for name, scores in run.scores.items()}
    mean = run.mean(names, resamples=resamples, seed=seed)
    large = run.mean(_large(names), resamples=resamples, seed=seed)
    return Row(
        method=run.method,
        model=run.model,
        cells=cells,
        mean=None if mean is None else Cell(mean),
        mean_of_large=None if large is None else Cell(large),
        run=str(run.path),
        protocol=run.protocol,
        marks=tuple(marks),
        extras=_extras(extras, list(run.scores.values()), resamples, seed),
    )


def _extras(names: Sequence[str], scores: Sequence[BenchmarkScores], resamples: int, seed: int) -> dict[str, Extra]:
    """The extra columns over all whole sets of a run; without those that mean nothing for one of the sets."""
    if not scores:
        return {}
    found = {name: _quality(name, scores, resamples, seed) or _cost(name, scores) for name in names}
    return {name: extra for name, extra in found.items() if extra is not None}


def _quality(name: str, scores: Sequence[BenchmarkScores], resamples: int, seed: int) -> Extra | None:
    """Means over sets."""
    if name in WITH_INTERVAL and all(name in one.values for one in scores):
        mean = macro_mean([one.values[name] for one in scores], resamples=resamples, seed=seed)
        value, low, high = (100 * share for share in (mean.mean, mean.low, mean.high))
        return Extra(value, f"{value:.1f} [{low:.1f}, {high:.1f}]", (low, high))
    if name == "pass_at_k" and all(one.pass_at_k for one in scores):
        k = max(set.intersection(*(set(one.pass_at_k) for one in scores)))
        share = 100 * sum(one.pass_at_k[k].mean for one in scores) / len(scores)
        return Extra(share, f"{share:.1f} (k={k})")
    if name == "majority" and len(majorities := [one.majority for one in scores if one.majority]) == len(scores):
        share = 100 * sum(one.mean for one in majorities) / len(scores)
        return Extra(share, f"{share:.1f}")
    return None


def _cost(name: str, scores: Sequence[BenchmarkScores]) -> Extra | None:
    """Means over samples, and sums."""
    samples = [one.n * one.samples for one in scores]

    def a_sample(values: Iterable[float]) -> float:
        return sum(value * count for value, count in zip(values, samples, strict=True)) / sum(samples)

    if name == "searches":
        return _shown(a_sample(one.searches for one in scores), ".2f")
    if name == "tokens":
        return _shown(a_sample(one.tokens for one in scores), ",.0f")
    if name == "invalid":
        return _shown(a_sample(one.invalid_actions for one in scores), ".2f")
    if name == "unanswered":
        return _shown(100 * a_sample(one.unanswered for one in scores), ".1f")
    if name == "unreadable" and (choosing := [one for one in scores if ACCURACY in one.metrics]):
        asked = sum(one.n * one.samples for one in choosing)
        return _shown(100 * sum(one.unreadable * one.n * one.samples for one in choosing) / asked, ".1f")
    timed = [one.seconds for one in scores if one.seconds is not None]
    if name == "seconds" and len(timed) == len(scores):
        seconds = sum(timed)
        return _shown(seconds, ",.0f" if seconds >= 100 else ".1f")
    if name == "truncations":
        causes = sorted({cause for one in scores for cause in one.truncations})
        counts = [f"{cause} {sum(one.truncations.get(cause, 0) for one in scores):,}" for cause in causes]
        return Extra(", ".join(counts) or "none", ", ".join(counts) or "none")
    return None


def _shown(value: float, form: str) -> Extra:
    return Extra(value, format(value, form))


def _published_sizes(runs: Sequence[FinishedRun], names: Sequence[str]) -> list[str]:
    if not set(names) & set(BENCHMARKS):
        return []
    named = {size.upper() for run in runs for size in _SIZE.findall(run.model)}
    return [size for size in SIZES if size in named] or list(SIZES)


def _large(names: Sequence[str]) -> list[str]:
    """The sets without the small one; none where it is not there, or stands beside a single other."""
    large = [name for name in names if name != SMALL_SET]
    return large if 1 < len(large) < len(names) else []


def _published(row: PublishedRow, names: Sequence[str], notes: _Notes) -> Row:
    other = f"; of another protocol than the published rows without this footnote: {row.deviation}"
    told = f"as published in {row.source}; not produced under the protocol of the runs"
    marks = [notes.mark(told + (other if row.deviation else ""))]
    cells = {name: Cell(row.em[name] / 100) for name in names if name in row.em}
    mean = large = None
    if list(names) == list(BENCHMARKS):
        odd = "" if row.mean_follows else f"as printed; the cells of this row have the mean {row.mean_of_cells:.1f}"
        mean = Cell(row.mean / 100, mark=notes.mark(odd) if odd else "")
        if row.em:
            large = Cell(sum(row.em[name] for name in _large(names)) / len(_large(names)) / 100)
    return Row(row.method, f"Qwen2.5-{row.size}", cells, mean, large, published=True, marks=tuple(marks))


def _column(name: str, runs: Sequence[FinishedRun]) -> Column:
    rows = [run.benchmarks[name] for run in runs if name in run.benchmarks]
    asked = {row["questions"] for row in rows if row["name"] == name}
    sizes = {row.get("size") for row in rows}
    kind = rows[0].get("kind", "open")
    return Column(
        name=name,
        label=label(name),
        kind=kind,
        questions=asked.pop() if len(asked) == 1 else None,
        size=sizes.pop() if len(sizes) == 1 else None,
    )


def _remarks(
    columns: Sequence[Column], runs: Sequence[FinishedRun], extras: Sequence[str], unmarked: Sequence[FinishedRun]
) -> list[str]:
    choice = [column.label for column in columns if column.kind == "multiple_choice"]
    accuracy = f" ({', '.join(choice)}: accuracy of the letter)" if choice else ""
    remarks = [
        f"Exact match in per cent{accuracy}, in brackets the 95 % bootstrap interval over questions.",
        *(["Mean: over sets, each counting alike, only where a row has all of them."] if len(columns) > 1 else []),
    ]
    if _large([column.name for column in columns]):
        remarks.append(
            f"{label(SMALL_SET)} has 125 questions, each worth 0.8 points of its cell: the mean without it is the "
            "steadier one. Of published rows it is worked out from their cells."
        )
    samples = sorted({scores.samples for run in runs for scores in run.scores.values()})
    if samples not in ([], [1]):
        remarks.append(f"Samples a question: {', '.join(map(str, samples))}; scores are means over them.")
    if any(scores.main.mean in (0.0, 1.0) for run in runs for scores in run.scores.values()):
        remarks.append(
            "Where none or all of n answers are right, the bootstrap's interval has no width; a true rate up to 3/n "
            "away remains plausible (rule of three)."
        )
    if extras:
        remarks.append("; ".join(_EXPLAINED[name] for name in extras) + ".")
    if "judge" in extras and (judges := sorted({run.judge["model"] for run in runs if run.judge})):
        remarks.append(f"Judged by {', '.join(judges)}. {unread_verdicts(runs)}")
    return [*remarks, _protocol(unmarked)]


def _protocol(runs: Sequence[FinishedRun]) -> str:
    """What a reader must know to set the rows without a footnote beside figures from elsewhere."""
    run = next((run for run in runs if run.card["retriever"] is not None), runs[0])
    card = run.card
    budget = card["budget"]
    facts = [f"scorer {card['scorer']['name']} {card['scorer']['sha256'][:12]}"]
    facts.append(f"{budget['max_turn_tokens']} tokens a turn, {budget['max_sequence_length']} in all")
    if card["retriever"] is not None:
        facts.append(
            f"{card['retriever']['description']}, top {budget['top_k']}, at most {budget['max_turns']} searches"
        )
    temperature = card["decoding"]["temperature"]
    facts.append("greedy" if temperature == 0 else f"temperature {temperature:g}")
    return f"Protocol ({run.protocol}): {'; '.join(facts)}."
