"""Command lines made from dataclasses, with a section of a YAML recipe as defaults; unknown keys are refused."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from rex_rag.support.errors import UserError, from_the_user
from rex_rag.support.options import OptionParser, with_lists_joined
from rex_rag.support.recipes import recipe_path
from rex_rag.support.wording import describe_unknown

_UNSET = ("none", "null")


def parse_section(
    command: str,
    description: str,
    section: str,
    types: Sequence[type],
    words: Sequence[str],
    add_arguments: Any = None,
) -> tuple[Any, ...]:
    """Parse `words` into one object of each dataclass in `types`, and a namespace of what `add_arguments` added.

    `--config FILE` gives defaults from the mapping under `section` in a YAML file; the command line goes over them.
    `--key none` unsets a setting that may be left out: a command line has no other word for YAML's `null`.

    Raises:
        ValueError: for a file without that section or with keys that no dataclass has, and for unknown options.
    """
    from transformers import HfArgumentParser

    class SectionParser(OptionParser, HfArgumentParser):
        pass

    parser = SectionParser(  # type: ignore[misc]  # the arguments are HfArgumentParser's
        types,  # type: ignore[arg-type]
        prog=f"rex-rag {command}",
        description=description,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,  # some fifty options, shown before the one line that matters
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help=f"defaults from the part `{section}:` of this file")
    if add_arguments is not None:
        add_arguments(parser)
    optional = {name for kind in types for name in _optional_fields(kind)}
    lists = {
        entry.name for kind in types for entry in fields(kind) if get_origin(get_type_hints(kind)[entry.name]) is list
    }
    words = with_lists_joined(words, lists)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    given, _ = config.parse_known_args(words)
    if given.config:
        known = {entry.name for kind in types for entry in fields(kind)}
        named = read_section(recipe_path(given.config), section, known)
        parser.set_defaults(
            **{key: None if key in optional and value in _UNSET else value for key, value in named.items()}
        )
    words, unset = _without_unset(words, optional)
    parser.set_defaults(**dict.fromkeys(unset))
    with from_the_user():
        _, unread = parser.parse_known_args(words)
    if unread:
        raise UserError(_describe_unread(unread, parser))
    with from_the_user():
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)


def _describe_unread(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """An error text for words that no option reads; what stands behind an unknown option is its value."""
    unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not unknown:
        return f"unexpected {', '.join(map(repr, words))}: options begin with --, see --help"
    known = [option for action in parser._actions for option in action.option_strings]
    described = []
    for option in dict.fromkeys(unknown):
        near = next(iter(difflib.get_close_matches(option, known, n=1)), None)
        described.append(f"{option} (did you mean {near}?)" if near else f"{option} (see --help)")
    return f"unknown option{'s' if len(described) > 1 else ''} {', '.join(described)}"


def _optional_fields(kind: type) -> set[str]:
    return {name for name, hint in get_type_hints(kind).items() if NoneType in get_args(hint)}


def _without_unset(words: Sequence[str], optional: set[str]) -> tuple[list[str], set[str]]:
    """The words without optional keys that end as `none`, and these keys; the last value of a key counts."""
    options: list[tuple[str, list[str]]] = []  # the name of each, and its words
    for word in words:
        if word.startswith("--") or not options:
            options.append((word.partition("=")[0].removeprefix("--").replace("-", "_"), [word]))
        else:
            options[-1][1].append(word)
    is_unset = [
        name in optional and (given[-1] if len(given) > 1 else given[0].partition("=")[2]) in _UNSET
        for name, given in options
    ]
    ends_unset = {name: unset for (name, _), unset in zip(options, is_unset, strict=True)}
    kept = [
        given for (name, given), unset in zip(options, is_unset, strict=True) if not unset and not ends_unset[name]
    ]
    return [word for given in kept for word in given], {name for name, unset in ends_unset.items() if unset}


def read_section(path: Path, section: str, known: set[str]) -> dict[str, Any]:
    """The mapping under `section` of a YAML file, every key one of `known`.

    Raises:
        ValueError: for anything else, naming the key and the one that was probably meant.
    """
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get(section), dict):
        raise UserError(f"{path} has no part `{section}:` with settings under it")
    # YAML reads a bare `no` as false, and 1 as a number.
    unknown = sorted(str(key) for key in content[section] if key not in known)
    if unknown:
        raise UserError(f"{path}, under `{section}:`: {describe_unknown(unknown, sorted(known))}")
    return content[section]
