"""HopWorld: a seeded synthetic world of people, places and organisations: a passage each, and multi-hop questions.

It is small enough to train on with a CPU and written in the FlashRAG layout, so that it goes through the same data and
retrieval code as a real corpus. Invariants:

- the same config gives the same world, and the number of questions asked for never changes its facts;
- every world uses the words of `hopworld_words()` and no others, whatever its seed: a model can learn the language of
  all worlds from a few of them, but it can know the facts of a new one only by searching;
- every relation is a function, every entity of a chain is distinct, so a question has one answer, and each
  intermediate entity of its chain is a wrong one (the tempting dead end of a two-hop question).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError
from rex_rag.types import Passage

MAX_HOPS = 3


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# BM25 must tell all of these apart after English stemming and stop-word removal; a test holds the lists to that.
FIRST_NAMES = _words(
    "Ada Boris Clara Diego Elsa Farid Greta Hugo Irma Jonas Kira Ludwig Mabel Nadia Oscar Paula Quentin Rosa "
    "Stefan Tessa Umberto Vera Walter Xenia Yusuf Zelda Anton Bianca Cedric Dorothy Emil Flora Gustav Helga Ivan "
    "Judith"
)
LAST_NAMES = _words(
    "Abbott Brandt Castro Dalton Eriksen Foster Gruber Hobbs Ingram Jacobi Keller Lambert Moreno Novak Osborn "
    "Pavlov Quimby Rossi Schubert Tanaka Ulrich Vogel Watanabe Xavier Yamada Zimmer Archer Becker Conrad Draper "
    "Egan Fuchs Gorman Huxley Ibsen Jensen"
)
CITY_NAMES = _words(
    "Aldora Belmar Corvento Drunmoor Eastvale Falken Garonda Hathmar Ilverton Jorvik Kelstad Lormont Medina "
    "Northam Ostrava Pellagor Quarrel Ravenna Selkirk Tormund Ulverston Valmere Westrun Yarrow Zandvoort Arkona "
    "Bramblet Cordoba Dunkeld Elmsgate Fenwick Glimmar Hollin Istria Junovar Kirkwall Lindero Marzipol Nimbus "
    "Orvieto Pontarel Rimini Skagen Trieste Umbra Vintar Wolmar Zermat"
)
COUNTRY_NAMES = _words(
    "Avaria Borgund Cathay Drakonia Elvaria Florinda Gellonia Hestria Illyria Karelia Lusitan Moravia Numidia "
    "Ordosia Parthia Rosmark Sarmatia Thule Utgard Wendland Yperion Zembria Bactria Cimmer"
)
ORGANISATION_NAMES = _words(
    "Amber Bluebell Cobalt Dolphin Emerald Falcon Granite Heron Indigo Jasper Lantern Meteor Orchid Pelican "
    "Saffron Thistle"
)
ORGANISATION_KINDS = ("Academy", "Bank", "Clinic", "Institute", "Museum", "Theatre")


class EntityType(StrEnum):
    PERSON = "person"
    CITY = "city"
    ORGANISATION = "organisation"
    COUNTRY = "country"


@dataclass(frozen=True, slots=True)
class Relation:
    """A function from entities of one type to entities of another; its name is the word used in all texts."""

    name: str
    subject: EntityType
    object: EntityType


RELATIONS = (
    Relation("mentor", EntityType.PERSON, EntityType.PERSON),
    Relation("friend", EntityType.PERSON, EntityType.PERSON),
    Relation("birthplace", EntityType.PERSON, EntityType.CITY),
    Relation("employer", EntityType.PERSON, EntityType.ORGANISATION),
    Relation("headquarters", EntityType.ORGANISATION, EntityType.CITY),
    Relation("founder", EntityType.ORGANISATION, EntityType.PERSON),
    Relation("country", EntityType.CITY, EntityType.COUNTRY),
)


@dataclass(frozen=True)
class HopWorldConfig:
    """Size and seed of a world.

    Attributes:
        seed: names one world; every other field equal, different seeds give different facts.
        people: number of people, 3 to 1,296.
        cities: number of cities, 1 to 48.
        organisations: number of organisations, 1 to 96.
        countries: number of countries, 1 to 24.
        train_questions: how many training questions with 1, 2 and 3 hops.
        test_questions: how many test questions with 1, 2 and 3 hops; none is a training question.
    """

    seed: int = 0
    people: int = 300
    cities: int = 40
    organisations: int = 40
    countries: int = 20
    train_questions: tuple[int, int, int] = (400, 800, 400)
    test_questions: tuple[int, int, int] = (100, 200, 100)

    def __post_init__(self) -> None:
        problems = []
        # Three people at least: a mentor and a friend are two others.
        for name, low, high in (
            ("people", 3, len(FIRST_NAMES) * len(LAST_NAMES)),
            ("cities", 1, len(CITY_NAMES)),
            ("organisations", 1, len(ORGANISATION_NAMES) * len(ORGANISATION_KINDS)),
            ("countries", 1, len(COUNTRY_NAMES)),
        ):
            if not low <= getattr(self, name) <= high:
                problems.append(f"{name}={getattr(self, name)} is outside {low}..{high}, what the fixed names allow")
        for name in ("train_questions", "test_questions"):
            counts = getattr(self, name)
            if len(counts) != MAX_HOPS or min(counts) < 0:
                problems.append(f"{name}={counts!r} must be {MAX_HOPS} counts >= 0, for 1, 2 and 3 hops")
        if problems:
            raise UserError("HopWorldConfig: " + "; ".join(problems))


@dataclass(frozen=True, slots=True)
class HopQuestion:
    """A question and the walk that answers it: `chain[i + 1]` is the `relations[i]` of `chain[i]`."""

    id: str
    question: str
    relations: tuple[str, ...]
    chain: tuple[str, ...]

    @property
    def hops(self) -> int:
        return len(self.relations)

    @property
    def golden_answers(self) -> tuple[str, ...]:
        return (self.chain[-1],)

    @property
    def intermediates(self) -> tuple[str, ...]:
        """The entities between the one named in the question and the answer: `hops - 1` of them."""
        return self.chain[1:-1]


@dataclass(frozen=True)
class HopWorld:
    """A world: its passages (one an entity), its questions, and its facts as {(entity, relation): entity}."""

    config: HopWorldConfig
    passages: tuple[Passage, ...]
    train: tuple[HopQuestion, ...]
    test: tuple[HopQuestion, ...]
    facts: Mapping[tuple[str, str], str] = field(repr=False)

    def answer(self, start: str, relations: Iterable[str]) -> str:
        """Walk from `start` along `relations`."""
        for relation in relations:
            start = self.facts[start, relation]
        return start


def build_hopworld(config: HopWorldConfig | None = None) -> HopWorld:
    """Build the world that `config` names.

    Raises:
        ValueError: when more questions of a hop count are asked for than the world holds.
    """
    config = config or HopWorldConfig()
    entities = _draw_entities(config, random.Random(f"hopworld/{config.seed}/names"))
    facts = _draw_facts(entities, random.Random(f"hopworld/{config.seed}/facts"))
    names = [(name, kind) for kind in EntityType for name in entities[kind]]
    passages = tuple(
        Passage(id=str(index), title=name, text=_passage_text(name, kind, facts))
        for index, (name, kind) in enumerate(names)
    )
    train, test = _draw_questions(config, names, facts)
    return HopWorld(config=config, passages=passages, train=train, test=test, facts=facts)


TEST_FILES = {hops: f"test_{hops}_hop.jsonl" for hops in range(1, MAX_HOPS + 1)}
WORLD_FILES = ("corpus.jsonl", "train.jsonl", "test.jsonl", *TEST_FILES.values())


def write_hopworld(world: HopWorld, directory: str | os.PathLike) -> Path:
    """Write `corpus.jsonl`, `train.jsonl` and `test.jsonl` in the FlashRAG layout and return the directory.

    The test questions of a hop count stand once more in a file of their own (`TEST_FILES`).

    Each file is written aside and renamed, so a reader never sees half of one.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_jsonl(
        directory / "corpus.jsonl",
        ({"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'} for passage in world.passages),
    )
    of_hops = {name: [one for one in world.test if one.hops == hops] for hops, name in TEST_FILES.items()}
    for name, questions in {"train.jsonl": world.train, "test.jsonl": world.test, **of_hops}.items():
        _write_jsonl(
            directory / name,
            (
                {
                    "id": question.id,
                    "question": question.question,
                    "golden_answers": list(question.golden_answers),
                    "metadata": {"hops": question.hops, "chain": list(question.chain)},
                }
                for question in questions
            ),
        )
    return directory


def hopworld_words() -> list[str]:
    """Every word and mark that the titles, passages and questions of any world are made of, in a fixed order."""
    wording = [_question_text(("x",), "x"), _question_text(("mentor",), "x")]
    wording += [_passage_text("x", kind, _Placeholder()) for kind in EntityType]
    names = (
        *FIRST_NAMES,
        *LAST_NAMES,
        *CITY_NAMES,
        *COUNTRY_NAMES,
        *ORGANISATION_NAMES,
        *ORGANISATION_KINDS,
    )
    words = dict.fromkeys(names)
    words.update(dict.fromkeys(word for text in wording for word in re.findall(r"\w+|[^\w\s]", text) if word != "x"))
    return list(words)


class _Placeholder(dict):
    """Facts of a nameless world, to list the wording around the names."""

    def __missing__(self, key: tuple[str, str]) -> str:
        return "x"


def _draw_entities(config: HopWorldConfig, draw: random.Random) -> dict[EntityType, list[str]]:
    pools = {
        EntityType.PERSON: [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES],
        EntityType.CITY: list(CITY_NAMES),
        EntityType.ORGANISATION: [f"{name} {kind}" for name in ORGANISATION_NAMES for kind in ORGANISATION_KINDS],
        EntityType.COUNTRY: list(COUNTRY_NAMES),
    }
    counts = {
        EntityType.PERSON: config.people,
        EntityType.CITY: config.cities,
        EntityType.ORGANISATION: config.organisations,
        EntityType.COUNTRY: config.countries,
    }
    return {kind: draw.sample(pool, counts[kind]) for kind, pool in pools.items()}


def _draw_facts(entities: Mapping[EntityType, list[str]], draw: random.Random) -> dict[tuple[str, str], str]:
    facts: dict[tuple[str, str], str] = {}
    for kind in EntityType:
        for name in entities[kind]:
            named = [name]
            for relation in RELATIONS:
                if relation.subject is kind:
                    facts[name, relation.name] = _draw_other(entities[relation.object], named, draw)
                    named.append(facts[name, relation.name])
    return facts


def _draw_other(pool: list[str], named: list[str], draw: random.Random) -> str:
    """An entity that the passage does not name yet; so a person's mentor and friend are two different others.

    If it can be had in a few draws, one that shares no word with those named: a passage that repeats the words of
    another entity's name could outrank that entity's own.
    """
    words = {word for name in named for word in name.split()}
    for _ in range(20):
        value = draw.choice(pool)
        if words.isdisjoint(value.split()):
            return value
    return draw.choice([value for value in pool if value not in named])


def _passage_text(name: str, kind: EntityType, facts: Mapping[tuple[str, str], str]) -> str:
    article = "an" if kind is EntityType.ORGANISATION else "a"
    known = ", ".join(f"{rel.name} {facts[name, rel.name]}" for rel in RELATIONS if rel.subject is kind)
    return f"{name} is {article} {kind.value} with {known}." if known else f"{name} is {article} {kind.value}."


def _question_text(relations: tuple[str, ...], start: str) -> str:
    """The last relation of the walk is the first word of the question: `friend of the mentor of Ada Abbott`."""
    asked = next((relation.object for relation in RELATIONS if relation.name == relations[-1]), None)
    word = "Who" if asked is EntityType.PERSON else "What"
    return f"{word} is the {' of the '.join(reversed(relations))} of {start}?"


def _walks(names: Iterable[tuple[str, EntityType]], facts: Mapping, hops: int) -> Iterator[tuple[tuple, tuple]]:
    """All (relations, chain) of a length whose entities are distinct."""
    for name, kind in names:
        stack: list[tuple[tuple[str, ...], tuple[str, ...], EntityType]] = [((), (name,), kind)]
        while stack:
            relations, chain, kind_now = stack.pop()
            if len(relations) == hops:
                yield relations, chain
                continue
            for relation in RELATIONS:
                if relation.subject is kind_now:
                    value = facts[chain[-1], relation.name]
                    if value not in chain:
                        stack.append(((*relations, relation.name), (*chain, value), relation.object))


def _draw_questions(
    config: HopWorldConfig, names: list[tuple[str, EntityType]], facts: Mapping[tuple[str, str], str]
) -> tuple[tuple[HopQuestion, ...], tuple[HopQuestion, ...]]:
    drawn: dict[str, list[tuple[tuple, tuple]]] = {"train": [], "test": []}
    for hops in range(1, MAX_HOPS + 1):
        train, test = config.train_questions[hops - 1], config.test_questions[hops - 1]
        walks = list(_walks(names, facts, hops))
        if train + test > len(walks):
            raise UserError(
                f"{train} training and {test} test questions with {hops} hops were asked for, but this world holds "
                f"only {len(walks)}; ask for fewer, or enlarge it with more people"
            )
        chosen = random.Random(f"hopworld/{config.seed}/questions/{hops}").sample(walks, len(walks))
        # Test questions come first, so that they stay the same when more training questions are asked for.
        drawn["test"] += chosen[:test]
        drawn["train"] += chosen[test : test + train]
    result = []
    for split in ("train", "test"):
        random.Random(f"hopworld/{config.seed}/order/{split}").shuffle(drawn[split])
        result.append(
            tuple(
                HopQuestion(f"{split}_{index}", _question_text(relations, chain[0]), relations, chain)
                for index, (relations, chain) in enumerate(drawn[split])
            )
        )
    return result[0], result[1]


def _write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with written_whole(path, alone=False) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
