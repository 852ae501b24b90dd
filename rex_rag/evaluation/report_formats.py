"""A report as Markdown, LaTeX or CSV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rex_rag.evaluation.bootstrap import Estimate
from rex_rag.evaluation.report import COLUMNS, WITH_INTERVAL, Cell, Column, Extra, Report, Row
from rex_rag.support.tables import csv_table, latex_table, latex_text, markdown_table, markdown_text

_NOTHING = "–"
_LABEL = "tab:results"


def as_markdown(report: Report) -> str:
    """A GitHub table, published rows last and in italics, then footnotes and remarks."""

    def show(row: Row) -> list[str]:
        def figure(cell: Cell | None, column: Column | None = None) -> str:
            text = _figure(cell, column, ("", ""))
            return f"*{text}*" if row.published and text != _NOTHING else text

        method = markdown_text(row.method) + (" (published)" if row.published else "")
        marks = "".join(f" ({mark})" for mark in row.marks)
        figures = [figure(row.cells.get(column.name), column) for column in report.columns]
        means = [figure(getattr(row, mean)) for mean in report.means]
        extras = [_extra(row, name, markdown_text) or _NOTHING for name in report.extras]
        return [method + marks, markdown_text(_model(row, report)), *figures, *means, *extras]

    table = markdown_table(_header(report, markdown_text), [show(row) for row in report.rows], 2)
    notes = [f"- ({mark}) {markdown_text(text)}" for mark, text in report.notes.items()]
    remarks = [markdown_text(remark) for remark in report.remarks]
    return "\n\n".join([table.rstrip("\n"), *(["\n".join(notes)] if notes else []), *remarks]) + "\n"


def as_latex(report: Report) -> str:
    """A booktabs table; a rule parts the published rows from the others, and footnotes and remarks stand below it."""

    def show(row: Row) -> list[str]:
        method = latex_text(row.method) + (" (published)" if row.published else "")
        marks = f"$^{{{','.join(row.marks)}}}$" if row.marks else ""
        around = (r"{\scriptsize ", "}")
        figures = [_figure(row.cells.get(column.name), column, around, "$^{", "}$") for column in report.columns]
        means = [_figure(getattr(row, mean), None, around, "$^{", "}$") for mean in report.means]
        extras = [_extra(row, name, latex_text) or "--" for name in report.extras]
        cells = [cell.replace(_NOTHING, "--") for cell in (*figures, *means)]
        return [method + marks, latex_text(_model(row, report)), *cells, *extras]

    groups = [[show(row) for row in report.rows if row.published is published] for published in (False, True)]
    caption, *remarks = map(latex_text, report.remarks)
    notes = [f"$^{{{mark}}}${latex_text(text)}." for mark, text in report.notes.items()]
    return latex_table(_header(report, latex_text), groups, caption, 2, label=_LABEL, notes=[*notes, *remarks])


def as_csv(report: Report) -> str:
    """One line a row, figures in per cent; an interval's ends and n in columns of their own."""
    header = ["method", "model", "source", "protocol"]
    for column in report.columns:
        header += [f"{column.name}_{name}" for name in ("n", _metric(column), "low", "high")]
    # The mean's columns stay where there is no mean, so that tables of one and of several sets have the same.
    means = {"mean": "", **report.means}
    header += [f"{mean}{end}" for mean in means for end in ("", "_low", "_high")]
    for name in report.extras:
        header += [name, *([f"{name}_low", f"{name}_high"] if name in WITH_INTERVAL else [])]
    header += ["notes"]
    lines = []
    for row in report.rows:
        line: list[object] = [row.method, row.model, "published" if row.published else row.run, row.protocol]
        for column in report.columns:
            cell = row.cells.get(column.name)
            line += [None if cell is None else cell.n, *_ends(cell)]
        marks = [*row.marks, *filter(None, [row.mean.mark if row.mean else ""])]
        notes = "; ".join(report.notes[mark] for mark in marks)
        extras = [value for name in report.extras for value in _values(name, row.extras.get(name))]
        rounded = [round(value, 4) if isinstance(value, float) else value for value in extras]
        ends = [end for mean in means for end in _ends(getattr(row, mean))]
        lines.append([*line, *ends, *rounded, notes])
    return csv_table(header, lines)


FORMATS: dict[str, Callable[[Report], str]] = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def _metric(column: Column) -> str:
    return "accuracy" if column.kind == "multiple_choice" else "em"


def _header(report: Report, escape: Callable[[str], str]) -> list[str]:
    heads = [escape(f"{column.label}{_asked(column)}") for column in report.columns]
    return ["method", "model", *heads, *report.means.values(), *(COLUMNS[name] for name in report.extras)]


def _asked(column: Column) -> str:
    if column.questions is None:
        return ""
    of = f" of {column.size:,}" if column.size not in (None, column.questions) else ""
    return f" (n={column.questions:,}{of})"


def _model(row: Row, report: Report) -> str:
    """The model, with the run's folder where two rows would look the same."""
    same = [other for other in report.rows if (other.method, other.model) == (row.method, row.model)]
    return f"{row.model}, run {Path(row.run).name}" if len(same) > 1 and row.run else row.model


def _figure(
    cell: Cell | None, column: Column | None, around: tuple[str, str], before: str = " (", after: str = ")"
) -> str:
    """A figure in per cent with its interval between the strings `around`, and n where the head does not say it."""
    if cell is None:
        return _NOTHING
    mark = f"{before}{cell.mark}{after}" if cell.mark else ""
    if not isinstance(cell.estimate, Estimate):
        return f"{100 * cell.estimate:.1f}{mark}"
    interval = f"{around[0]}[{100 * cell.estimate.low:.1f}, {100 * cell.estimate.high:.1f}]{around[1]}"
    asked = cell.n != column.questions if column else False
    return f"{100 * cell.estimate.mean:.1f} {interval}{f' (n={cell.n:,})' if asked else ''}{mark}"


def _extra(row: Row, name: str, escape: Callable[[str], str]) -> str:
    """What an extra column shows; numbers and their intervals need no escape."""
    if name not in row.extras:
        return ""
    extra = row.extras[name]
    return escape(extra.text) if isinstance(extra.value, str) else extra.text


def _values(name: str, extra: Extra | None) -> list[float | str | None]:
    """What the CSV says of an extra column, its interval's ends included."""
    value = None if extra is None else extra.value
    ends = (None, None) if extra is None or extra.interval is None else extra.interval
    return [value, *ends] if name in WITH_INTERVAL else [value]


def _ends(cell: Cell | None) -> list[float | None]:
    if cell is None:
        return [None, None, None]
    if not isinstance(cell.estimate, Estimate):
        return [round(100 * cell.estimate, 4), None, None]
    return [round(100 * value, 4) for value in (cell.estimate.mean, cell.estimate.low, cell.estimate.high)]
