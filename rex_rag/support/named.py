"""Objects of a user's own, named as `module:Name` in a recipe."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rex_rag.support.errors import UserError

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_named(name: object) -> bool:
    """Whether a text has the form `module:Name`, as no URL and no path of a drive has."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def load_named(name: str, kind: type | None, what: str) -> Any:
    """Import the object that `module:Name` names, from the working directory or wherever Python looks.

    An error inside the module keeps its traceback: it is the module's author who must mend it.

    Args:
        kind: a class that the object must be a subclass of, or an instance of; None for any object.
        what: what it is to be, for messages: `retriever`, `tool`.

    Raises:
        ValueError: for a name of another form, a module that is not there, one that lacks the name, and an object of
            another kind.
    """
    if not is_named(name):
        raise UserError(f"{what}={name!r} names no object; write module:Name, for example my_module:MyClass")
    module_name, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file of the user's must not hide a library
    top = module_name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise UserError(f"{what}={name!r}: there is no module {top!r}, neither in {here} nor installed")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{what}={name!r}: there is no module {error.name!r} in the package {top!r}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = sorted(entry for entry in vars(found) if not entry.startswith("_"))
            raise UserError(f"{what}={name!r}: {module_name} has no {part!r}; it has {', '.join(known) or 'nothing'}")
        found = getattr(found, part)
    if kind is not None and not (isinstance(found, type) and issubclass(found, kind)) and not isinstance(found, kind):
        raise UserError(f"{what}={name!r} is {found!r}; it must be a {kind.__name__} ({kind.__module__})")
    return found


def choose(name: str, known: Mapping[str, Any], kind: type | None, what: str) -> Any:
    """What a name stands for: one of those that are registered, or an object of a user's own as `module:Name`.

    Raises:
        ValueError: for a name that is neither, and as `load_named`.
    """
    if name in known:
        return known[name]
    if not is_named(name):
        raise UserError(
            f"{what}={name!r} is unknown; use {', '.join(map(repr, known))}, or your own as module:Name, for example "
            "my_module:MyClass"
        )
    return load_named(name, kind, what)
