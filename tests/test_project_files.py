"""The files that stand beside the package: what they name exists, and versions agree."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import rex_rag

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_citation_has_what_its_schema_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", rex_rag.__version__)
    [paper] = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"] == "https://arxiv.org/abs/2508.08149"
    for author in citation["authors"] + paper["authors"]:
        assert author.keys() in ({"name"}, {"given-names", "family-names"})


def test_pre_commit_runs_a_ruff_that_setup_cfg_allows():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options.extras_require"]["dev"].splitlines()
    [allowed] = [Requirement(line) for line in lines if line.startswith("ruff")]
    assert allowed.specifier.contains(repository["rev"].removeprefix("v"))


def test_every_file_that_contributing_names_is_there():
    named = re.findall(r"`((?:docs|recipes|rex_rag|tests)/[\w./-]+)`", CONTRIBUTING)
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("place", re.findall(r"`([A-Z_]+)` (?:in|of) `(rex_rag/[\w./]+)`", CONTRIBUTING), ids="-".join)
def test_every_table_that_contributing_names_is_where_it_says(place: tuple[str, str]):
    name, file = place
    assert re.search(rf"^{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "part", re.split(r"^### ", CONTRIBUTING, flags=re.MULTILINE)[1:], ids=lambda part: part.split("\n")[0]
)
def test_how_to_add_a_part_takes_five_lines_and_names_its_test(part: str):
    steps = part.split("\n\n", 1)[1].strip().splitlines()
    assert len(steps) <= 5
    assert re.search(r"`tests/[\w/]+\.py`", steps[-1] + steps[-2])
