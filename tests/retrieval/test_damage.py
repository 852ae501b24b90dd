"""Seeded damage to every file of every kind of index: no answer changes unnoticed under the name of the index.

A small index is hashed when it is opened. A large one is hashed where its name goes on a card; until then what can be
seen is seen, and a library's error is said with the file. Both ways are tried, on the same small indexes.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from rex_rag.data.corpus import write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.index import kinds
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.builder import build_index
from rex_rag.retrieval.load import RetrieverArguments, load_retriever, retriever_identity
from rex_rag.types import Passage
from tests.retrieval.dense_parts import WORDS, save_word_encoder
from tests.retrieval.late_parts import save_colbert

QUERIES = ["oslo river", "rome", "the hill of paris"]
DENSE = ("flat", "flat-fp16", "ivf", "hnsw", "qdrant")
LATE = "late_interaction"
HASHED, LATER = "hashed when opened", "hashed for the card"


def passages(seed: int) -> list[Passage]:
    draws = random.Random(seed)
    texts = (" ".join(draws.choices([*WORDS, *(f"w{n}" for n in range(300))], k=60)) for _ in range(120))
    return [Passage(str(number), f"Title {number}", text) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """name -> index directory, and under `name other` the same of another corpus."""
    folder = tmp_path_factory.mktemp("whole")
    encoder = save_word_encoder(folder / "encoder")
    late = {"kind": LATE, "model": str(save_colbert(folder / "colbert"))}
    made = {}
    for suffix, seed in (("", 0), (" other", 1)):
        corpus = folder / f"corpus{suffix}.jsonl"
        write_corpus(passages(seed), corpus)
        for name in ("bm25", *DENSE, LATE):
            output = folder / f"{name}{suffix}"
            more = {"query_prefix": "", "passage_prefix": "", "model": str(encoder)}
            dense = {"kind": "dense", "index": name, **more}
            kind = {"bm25": {}, LATE: late}.get(name, dense)
            build_index(IndexArguments(corpus=[str(corpus)], output=str(output), **kind), say=lambda _: None)
            made[name + suffix] = output
    return made


def damage(path: Path, other: Path, draws: random.Random) -> str:
    """Damage a file in one of five ways; returns which."""
    content = bytearray(path.read_bytes())
    how = draws.choice(("cut", "zeros", "flips", "removed", "exchanged"))
    path.unlink()  # a link to the whole file
    if how == "removed":
        return how
    if how == "cut":
        del content[draws.randrange(len(content)) :]
    elif how == "zeros":
        place = draws.randrange(max(1, len(content) - 4096 + 1))
        end = min(place + 4096, len(content))
        content[place:end] = bytes(end - place)
    elif how == "flips":
        for _ in range(draws.randint(1, 3)):
            content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    else:
        content = bytearray(other.read_bytes())
    path.write_bytes(content)
    return how


def look(directory: Path):
    """What a run sees: the passages found, and what its card says was searched."""
    arguments = RetrieverArguments(retriever=[str(directory)])
    retriever = load_retriever(arguments)
    try:
        found = retriever.search(QUERIES, 5) + retriever.read(["Title 7", "9"])
        return [[(one.id, one.text, one.score) for one in ranking] for ranking in found], retriever_identity(
            arguments, retriever
        )
    finally:
        retriever.close()


def try_out(indexes, name: str, times: int, folder: Path) -> tuple[int, int]:
    """How many damages were refused, and how many did no harm."""
    whole, other = indexes[name], indexes[f"{name} other"]
    expected = look(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    refused = harmless = 0
    for seed in range(times):
        draws = random.Random(f"{name} {seed}")
        copy = folder / f"{seed}"
        shutil.copytree(whole, copy, copy_function=os.link)
        file = files[seed % len(files)]
        counterpart = other / file
        how = damage(copy / file, counterpart if counterpart.is_file() else other / "manifest.json", draws)
        what = f"{name}, damage {seed}: {file} {how}"
        try:
            seen = look(copy)
        except RetrievalError as error:
            refused += 1
            # A manifest says what the others should be, so that damage to it may show in them.
            names = {str(copy)} if file.name == "manifest.json" else {str(copy), file.name}
            assert all(name in str(error) for name in names), f"{what}: {error}"
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
        else:
            assert seen == expected, f"{what}: other answers under the same name"
            harmless += 1
        shutil.rmtree(copy)
    return refused, harmless


@pytest.mark.parametrize("way", [HASHED, LATER])
@pytest.mark.parametrize(("name", "times"), [("bm25", 260), *((name, 40) for name in (*DENSE, LATE))])
def test_damage_is_named_or_does_no_harm(indexes, name, times, way, tmp_path, monkeypatch):
    pytest.importorskip("faiss") if name in DENSE else None
    if way == LATER:
        monkeypatch.setattr(kinds, "HASHED_AT_OPENING_BYTES", 2_000)
    refused, harmless = try_out(indexes, name, times, tmp_path)
    assert refused > 0.9 * times and refused + harmless == times
