"""How Sphinx builds this folder into a site: `make docs`. Warnings are errors, and nothing is fetched."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import rex_rag

project = "REX-RAG"
author = "the authors of rex_rag"
version = release = rex_rag.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "repository_pages"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "REX-RAG"
html_show_copyright = False

myst_heading_anchors = 3

default_role = "code"  # docstrings are written with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
python_display_short_literal_types = True
