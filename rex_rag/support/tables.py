"""Tables as Markdown, LaTeX and CSV, and the escaping of text that others chose. Plain text in, plain text out."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from rex_rag.support.wording import visible

# An underscore inside a word is no emphasis in GitHub's Markdown; escaping it would only make names hard to read.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    # Behind the end of a row these would be taken for its options.
    "[": "{[}",
    "*": "{*}",
}


def one_line(text: str) -> str:
    """Text without line breaks, control sequences and invisible characters: what a table cell or terminal may show."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, inside a table too; HTML in it stays text."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda match: "\\" + match.group(), text)


def latex_text(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A GitHub table of cells that are Markdown already, padded so that it reads well as text too.

    Args:
        text_columns: how many columns from the left are text; the others are set flush right.
    """
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < text_columns else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def latex_table(
    header: Sequence[str],
    groups: Sequence[Sequence[Sequence[str]]],
    caption: str = "",
    text_columns: int = 1,
    *,
    label: str = "",
    notes: Sequence[str] = (),
) -> str:
    r"""A `table*` in the style of booktabs, of cells that are LaTeX already; needs `\usepackage{booktabs}`.

    Args:
        groups: rows between which a rule is drawn.
        caption: above the table. label: what `\ref` names it by. notes: sentences below it. All are LaTeX already.
    """
    columns = "l" * text_columns + "r" * (len(header) - text_columns)
    body = "\n\\midrule\n".join("\n".join(" & ".join(row) + r" \\" for row in group) for group in groups if group)
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering",
        *([rf"\caption{{{caption}}}"] if caption else []),
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if notes:
        lines += ["", r"\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize {' '.join(notes)}}}"]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def csv_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a header line; `None` is an empty field, and no text is a spreadsheet's formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_csv_cell, header))
    writer.writerows([_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _csv_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    cell = visible(cell)
    return f"'{cell}" if cell.lstrip().startswith(("=", "+", "-", "@")) else cell
