"""How Sphinx builds this folder into a site: `make docs`. Warnings are errors, and nothing is fetched."""

import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import rex_rag  # noqa: E402 (from beside this folder)

project = "REX-RAG"
author = "the authors of rex_rag"
version = release = rex_rag.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "repository_pages"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "REX-RAG"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
highlight_language = "none"

myst_heading_anchors = 3

default_role = "code"  # docstrings are written with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_display_short_literal_types = True


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """What docstrings hold of Markdown (TRL's manner), in reStructuredText."""
    text = "\n".join(lines).replace("|", r"\|")
    text = re.sub(r"\[`~?([^`]+)`\]", r"`\1`", text)
    text = re.sub(r"\[([^]]+)\]\((http[^)]+)\)", r"`\1 <\2>`__", text, flags=re.DOTALL)
    text = re.sub(r"```python\n(.*?)```", lambda block: _code(block[1]), text, flags=re.DOTALL)
    text = re.sub(r"^> \[!NOTE\]\n((?:>.*\n?)+)", lambda block: _note(block[1]), text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def _code(text: str) -> str:
    body = [re.sub(r"^(>>>|\.\.\.) ?", "", line) for line in text.splitlines()]
    return "\n".join([".. code-block:: python", "", *(f"    {line}" for line in body), ""])


def _note(text: str) -> str:
    return ".. note::\n\n" + re.sub(r"^>( ?)", r"   \1", text, flags=re.MULTILINE)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
