"""Options are spelled alike everywhere, and a list given in pieces is not lost."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from rex_rag import cli
from rex_rag.commands import sections
from rex_rag.support.options import OptionParser, with_lists_joined
from rex_rag.support.recipes import FOLDER
from rex_rag.training.preflight import read_settings


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(found for action in below for one in action.choices.values() for found in parsers(one))]


class Seen(Exception):
    pass


def made_by(monkeypatch, run, *arguments) -> argparse.ArgumentParser:
    """The parser that a function is about to parse with."""
    seen = []

    def stop(self, *_, **__):
        if len(self._actions) > 3:  # not the one that looks for --config first
            seen.append(self)
            raise Seen
        return argparse.Namespace(config=None), []

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(Seen):
            run(*arguments)
    return seen[0]


def test_every_option_of_every_command_takes_both_spellings(monkeypatch):
    found = parsers(cli._parser())
    found += [made_by(monkeypatch, run, []) for run, _ in cli._FORWARDED.values()]
    for name in ("warm_start", "tiny_model", "gemma_start"):
        found.append(made_by(monkeypatch, importlib.import_module(f"rex_rag.quickstart.{name}").parse_args, []))
    found.append(made_by(monkeypatch, importlib.import_module("rex_rag.quickstart.run").parse_args))
    assert len(found) > 20
    options = {(parser.prog, one) for parser in found for one in parser._option_string_actions if one.startswith("--")}
    assert ("rex-rag search", "--top_k") in options and ("rex-rag evaluate", "--top-k") in options
    for prog, option in options:
        words = option[2:]
        for other in (words.replace("_", "-"), words.replace("-", "_")):
            assert (prog, f"--{other}") in options, f"{prog} takes {option} and not --{other}"


def test_an_option_means_the_same_in_either_spelling():
    parser = OptionParser()
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--keep_it", action="store_true")
    assert vars(parser.parse_args(["--top_k", "3", "--keep-it"])) == {"top_k": 3, "keep_it": True}
    recipe = str(FOLDER / "quickstart" / "grpo.yaml")
    dashed = read_settings(["--config", recipe, "--max-steps", "3", "--use-cpu=false"])
    assert dashed == read_settings(["--config", recipe, "--max_steps", "3", "--use_cpu=false"])
    assert (dashed["max_steps"], dashed["use_cpu"]) == (3, False)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("--corpus a --seed 3 --corpus b c", "--seed 3 --corpus a b c"),
        ("--corpus=a --corpus=b", "--corpus a b"),
        ("--corpus a --corpus none", "--corpus none"),
        ("--corpus none --corpus a", "--corpus a"),
        ("--seed 3 --seed 4 word", "--seed 3 --seed 4 word"),
    ],
)
def test_a_list_in_pieces_is_the_list(words, joined):
    assert with_lists_joined(words.split(), {"corpus"}) == joined.split()


def test_an_index_is_built_of_every_corpus_named(tmp_path: Path):
    from rex_rag.retrieval.index.arguments import IndexArguments

    words = ["--corpus", "a.jsonl", "--corpus", "b.jsonl", "--output", str(tmp_path / "index")]
    [arguments] = sections.parse_section("index", "…", "index", (IndexArguments,), words)[:1]
    assert arguments.corpus == ["a.jsonl", "b.jsonl"]
