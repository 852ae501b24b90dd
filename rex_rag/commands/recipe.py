"""`rex-rag recipe`: the recipes that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from rex_rag.support.recipes import first_line, recipe_names, recipe_path


def add_recipe(commands: argparse._SubParsersAction) -> None:
    """`rex-rag recipe`: list them, print one, or write it to a file."""
    recipe = commands.add_parser(
        "recipe",
        help="list the recipes, or print one",
        description="List the recipes that come with the package, print one, or write it to a file to change it. "
        "Wherever a recipe is asked for (--config), its name does too.",
    )
    recipe.add_argument("name", nargs="?", metavar="NAME", help="for example Qwen2.5-3B/rex_rag")
    recipe.add_argument("--output", type=Path, metavar="FILE", help="write it there; a file that is there stays")
    recipe.set_defaults(run=_recipe)


def _recipe(options: argparse.Namespace) -> None:
    if options.name is None:
        names = recipe_names()
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {first_line(name)}" for name in names))
        return
    text = recipe_path(options.name).read_text(encoding="utf-8")
    if options.output is None:
        print(text, end="")
        return
    with options.output.open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"wrote {options.output}")
