"""Tables and escaping: text that others chose is shown, never obeyed."""

from __future__ import annotations

import csv
import io

import pytest

from rex_rag.support.tables import csv_table, latex_table, latex_text, markdown_table, markdown_text, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("rex_rag", "rex_rag"),
        ("_em_", r"\_em\_"),
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a&b", "a&amp;b"),
        ("[x](y) *b* `c` $d$ ~~e~~", r"\[x\](y) \*b\* \`c\` \$d\$ \~\~e\~\~"),
        ("two\nlines\tand\x1b[31m red", r"two lines and \[31m red"),
        ("a\\|b", r"a\\\|b"),
    ],
)
def test_markdown_text(text: str, shown: str):
    assert markdown_text(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("rex_rag", r"rex\_rag"),
        ("50% & $1 #2 {x}", r"50\% \& \$1 \#2 \{x\}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("a~b^c<d>e|f", r"a\textasciitilde{}b\textasciicircum{}c\textless{}d\textgreater{}e\textbar{}f"),
        ("a\n%b", r"a \%b"),
    ],
)
def test_latex_text(text: str, shown: str):
    assert latex_text(text) == shown


def test_one_line_shows_no_control_and_no_invisible_character():
    assert one_line("a\x00b\u202ec\u200bd  e\r\n") == "a b c d e"


def test_markdown_table_reads_well_as_text_too():
    assert markdown_table(("method", "EM"), [("REX-RAG", "43.9"), ("x", "1")]) == (
        "| method  |   EM |\n| ------- | ---: |\n| REX-RAG | 43.9 |\n| x       |    1 |\n"
    )


def test_latex_table():
    groups = [[("a", "1.0")], [("b", "2.0"), ("c", "3.0")], []]
    text = latex_table(("method", "EM"), groups, "What.", label="tab:a", notes=["One.", "Two."])
    assert text == (
        "% \\usepackage{booktabs}\n\\begin{table*}\n\\centering\n\\caption{What.}\n\\label{tab:a}\n"
        "\\begin{tabular}{lr}\n\\toprule\n"
        "method & EM \\\\\n\\midrule\na & 1.0 \\\\\n\\midrule\nb & 2.0 \\\\\nc & 3.0 \\\\\n\\bottomrule\n"
        "\\end{tabular}\n\n\\smallskip\n\\parbox{\\linewidth}{\\footnotesize One. Two.}\n\\end{table*}\n"
    )
    bare = latex_table(("a", "b"), [[("1", "2")]])
    assert "caption" not in bare and "label" not in bare and "parbox" not in bare


def test_csv_table_comes_back_as_it_went():
    rows = [['a,"b"\nc', 1.5, None]]
    text = csv_table(("name", "value", "none"), rows)
    assert list(csv.reader(io.StringIO(text))) == [["name", "value", "none"], ['a,"b"\nc', "1.5", ""]]
