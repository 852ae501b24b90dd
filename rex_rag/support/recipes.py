"""The recipes that come with the package, by name: `Qwen2.5-3B/rex_rag`."""

from __future__ import annotations

import difflib
from pathlib import Path

from rex_rag.support.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Every recipe, accelerate's configurations included."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """A file of the user's, or the recipe of that name.

    Raises:
        ValueError: for neither, with the name that was probably meant.
    """
    if Path(name).is_file():
        return Path(name)
    names = recipe_names()
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    if plain in names:
        return FOLDER / f"{plain}.yaml"
    [near] = difflib.get_close_matches(plain, names, n=1) or [""]
    near = f" (did you mean {near}?)" if near else ""
    raise UserError(
        f"there is no recipe at {name}, neither a file here ({Path.cwd()}) nor one that comes with the package"
        f"{near}; `rex-rag recipe` lists these"
    )


def first_line(name: str) -> str:
    """What a recipe's header says it is."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def with_recipe_path(words: list[str]) -> list[str]:
    """A command line whose `--config NAME` names the recipe's file."""
    place = words.index("--config") + 1 if "--config" in words else len(words)
    return [*words[:place], str(recipe_path(words[place])), *words[place + 1 :]] if place < len(words) else words
