"""Links from a page to a file of the repository: each file gets a page of its own, with its lines numbered.

A link is written so that it also works where the repository is shown: `[keep](../rex_rag/probes/filter.py#keep_best)`.
The name behind `#` is a function, class or method; it becomes the line where that stands, and an error where there is
none. Folders are shown as the list of their files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(?<!\.png)(?:#([\w.-]+))?\)")
PLACE = "repository"


def line_of(path: Path, name: str) -> int:
    """The line on which a dotted name of a Python file is defined.

    Raises:
        ValueError: for a name that the file does not define.
    """
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        named = [node for node in body if getattr(node, "name", None) == part]
        if not named:
            raise ValueError(f"{path.relative_to(ROOT)} defines no {name}; a page links to it")
        body = named[0].body if isinstance(named[0], ast.ClassDef) else []
    return named[0].lineno


def rewrite(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn the links of a page to files of the repository into links to their pages."""

    def link(match: re.Match) -> str:
        path, name = ROOT / match[1], match[2]
        if not path.exists():
            raise ValueError(f"docs/{page}.md links to {match[1]}, which does not exist")
        app.env.repository_files.add(match[1].rstrip("/"))
        line = f"#line-{line_of(path, name)}" if name and path.suffix == ".py" else ""
        return f"](repository:{match[1].rstrip('/')}{line})"

    source[0] = LINK.sub(link, source[0])


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """A page for every file and folder that is linked to."""
    for name in sorted(app.env.repository_files):
        path = ROOT / name
        if path.is_dir():
            text = "\n".join(sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file()))
        else:
            text = path.read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(path.name)
        except ClassNotFound:
            lexer = TextLexer()
        formatter = HtmlFormatter(linenos="inline", linespans="line", cssclass="highlight", wrapcode=True)
        body = f'<div class="repository"><h1>{name}</h1>\n{highlight(text, lexer, formatter)}</div>'
        yield f"{PLACE}/{name}", {"title": name, "body": body}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    schemes = {"http": None, "https": None, "mailto": None}
    app.config.myst_url_schemes = {**schemes, "repository": {"url": PLACE + "/{{path}}.html#{{fragment}}"}}
    app.connect("builder-inited", lambda app: setattr(app.env, "repository_files", set()))
    app.connect("source-read", rewrite)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
