"""HopWorld: reproducible facts, one passage an entity, questions answered by walking their chains."""

from __future__ import annotations

import itertools
import json
import os
import re

import pytest

from rex_rag.data.corpus import read_corpus
from rex_rag.quickstart.hopworld import (
    FIRST_NAMES,
    LAST_NAMES,
    RELATIONS,
    TEST_FILES,
    WORLD_FILES,
    HopWorldConfig,
    build_hopworld,
    hopworld_words,
    write_hopworld,
)
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter

SMALL = {
    "people": 20,
    "cities": 5,
    "organisations": 4,
    "countries": 3,
    "train_questions": (30, 40, 20),
    "test_questions": (10, 15, 5),
}


def words_of(world) -> set[str]:
    texts = [text for passage in world.passages for text in (passage.title, passage.text)]
    texts += [question.question for question in (*world.train, *world.test)]
    return {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}


def test_the_same_seed_gives_the_same_world():
    assert build_hopworld(HopWorldConfig(seed=3, **SMALL)) == build_hopworld(HopWorldConfig(seed=3, **SMALL))


def test_another_seed_gives_other_facts_in_the_same_words():
    first, second = (build_hopworld(HopWorldConfig(seed=seed)) for seed in (0, 1))
    shared = first.facts.keys() & second.facts.keys()
    assert len(shared) > 100
    # Random facts about shared names agree now and then; most must not.
    assert sum(first.facts[key] == second.facts[key] for key in shared) < 0.2 * len(shared)
    assert words_of(first) <= set(hopworld_words())
    assert words_of(second) <= set(hopworld_words())
    assert len(hopworld_words()) == len(set(hopworld_words())) == 187


def test_the_number_of_questions_changes_neither_facts_nor_test_questions():
    few = build_hopworld(HopWorldConfig(**{**SMALL, "train_questions": (1, 1, 1)}))
    many = build_hopworld(HopWorldConfig(**SMALL))
    assert few.facts == many.facts
    assert few.test == many.test


def test_sizes_are_those_asked_for():
    world = build_hopworld(HopWorldConfig(**SMALL))
    assert len(world.passages) == 20 + 5 + 4 + 3
    assert len(world.facts) == 20 * 4 + 4 * 2 + 5
    counts = [[sum(q.hops == hops for q in split) for hops in (1, 2, 3)] for split in (world.train, world.test)]
    assert counts == [[30, 40, 20], [10, 15, 5]]


def test_every_entity_has_one_passage_that_states_its_facts():
    world = build_hopworld(HopWorldConfig(**SMALL))
    assert len({passage.title for passage in world.passages}) == len(world.passages)
    assert [passage.id for passage in world.passages] == [str(index) for index in range(len(world.passages))]
    text_of = {passage.title: passage.text for passage in world.passages}
    assert {entity for entity, _ in world.facts} | set(world.facts.values()) <= set(text_of)
    for (entity, relation), value in world.facts.items():
        assert f"{relation} {value}" in text_of[entity]


def test_answers_follow_from_walking_the_chain():
    world = build_hopworld(HopWorldConfig(**SMALL))
    for question in (*world.train, *world.test):
        assert question.golden_answers == (world.answer(question.chain[0], question.relations),)
        for hop, relation in enumerate(question.relations):
            assert world.facts[question.chain[hop], relation] == question.chain[hop + 1]
        # The tempting answer is a wrong one.
        assert len(set(question.chain)) == len(question.chain) == question.hops + 1
        assert len(question.intermediates) == question.hops - 1


def test_passages_repeat_no_word_of_a_name():
    world = build_hopworld()
    for passage in world.passages:
        named = [passage.title, *(world.facts.get((passage.title, relation.name), "") for relation in RELATIONS)]
        words = [word for name in named for word in name.split()]
        assert len(words) == len(set(words)), passage


def test_the_smallest_world_can_be_built():
    world = build_hopworld(
        HopWorldConfig(
            people=3, cities=1, organisations=1, countries=1, train_questions=(15, 0, 0), test_questions=(0, 0, 0)
        )
    )
    # Three people, each of whom has the two others for mentor and friend.
    people = {entity for entity, relation in world.facts if relation == "mentor"}
    assert all({person, world.facts[person, "mentor"], world.facts[person, "friend"]} == people for person in people)


def test_question_wording():
    world = build_hopworld(HopWorldConfig())
    by_relations = {question.relations: question for question in world.train}
    two = by_relations["mentor", "employer"]
    assert two.question == f"What is the employer of the mentor of {two.chain[0]}?"
    one = by_relations[("founder",)]
    assert one.question == f"Who is the founder of {one.chain[0]}?"
    three = by_relations["friend", "birthplace", "country"]
    assert three.question == f"What is the country of the birthplace of the friend of {three.chain[0]}?"


def test_train_and_test_questions_are_disjoint():
    world = build_hopworld()
    train, test = ({question.question for question in split} for split in (world.train, world.test))
    assert len(train) == 1600
    assert len(test) == 400
    assert not train & test


def test_files_are_in_the_flashrag_layout(tmp_path):
    world = build_hopworld(HopWorldConfig(**SMALL))
    directory = write_hopworld(world, tmp_path / "world")
    assert sorted(path.name for path in directory.iterdir()) == sorted(WORLD_FILES)
    parts = [(directory / name).read_text() for name in TEST_FILES.values()]
    assert [len(part.splitlines()) for part in parts] == list(world.config.test_questions)
    assert sorted("".join(parts).splitlines()) == sorted((directory / "test.jsonl").read_text().splitlines())
    rows = [json.loads(line) for line in (directory / "corpus.jsonl").read_text().splitlines()]
    first = world.passages[0]
    assert rows[0] == {"id": "0", "contents": f'"{first.title}"\n{first.text}'}
    # The package's own reader gets back what was written.
    assert [(p.id, p.title, p.text) for p in read_corpus([directory / "corpus.jsonl"])] == [
        (p.id, p.title, p.text) for p in world.passages
    ]
    for split, questions in (("train", world.train), ("test", world.test)):
        rows = [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"{split}_{index}" for index in range(len(questions))]
        assert rows[0] == {
            "id": f"{split}_0",
            "question": questions[0].question,
            "golden_answers": [questions[0].chain[-1]],
            "metadata": {"hops": questions[0].hops, "chain": list(questions[0].chain)},
        }


def test_a_world_can_be_written_over_an_older_one(tmp_path):
    write_hopworld(build_hopworld(HopWorldConfig(seed=1, **SMALL)), tmp_path)
    write_hopworld(build_hopworld(HopWorldConfig(seed=2, **SMALL)), tmp_path)
    write_hopworld(build_hopworld(HopWorldConfig(seed=2, **SMALL)), tmp_path / "fresh")
    for name in WORLD_FILES:
        assert (tmp_path / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_files_are_for_whom_the_umask_admits(tmp_path):
    before = os.umask(0o007)
    try:
        write_hopworld(build_hopworld(HopWorldConfig(seed=1, **SMALL)), tmp_path)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o660"}


def test_more_questions_than_the_world_holds_are_refused():
    # 20 people x 4 relations + 4 organisations x 2 + 5 cities x 1 = 93 one-hop questions.
    with pytest.raises(ValueError, match=r"94 training and 0 test questions with 1 hops.*only 93"):
        build_hopworld(HopWorldConfig(**{**SMALL, "train_questions": (94, 0, 0), "test_questions": (0, 0, 0)}))


def test_sizes_beyond_the_names_are_reported_together():
    with pytest.raises(ValueError, match=r"people=2 is outside 3\.\.1296.*cities=49 is outside 1\.\.48"):
        HopWorldConfig(people=2, cities=49)
    with pytest.raises(ValueError, match=r"train_questions=\(1, -1, 0\)"):
        HopWorldConfig(train_questions=(1, -1, 0))


def test_no_two_words_look_alike_to_bm25():
    terms = TermSplitter(BM25Options()).terms
    words = sorted({word.lower() for word in hopworld_words() if word.isalpha()})
    stems = [term for [term] in filter(None, terms(words))]
    assert len(set(stems)) == len(stems) >= 0.9 * len(words)
    assert all(terms([*FIRST_NAMES, *LAST_NAMES]))


@pytest.mark.parametrize("seed", range(9))
def test_the_gold_query_finds_the_entitys_passage_first(seed):
    world = build_hopworld(HopWorldConfig(seed=seed))
    facts = list(world.facts)
    rankings = BM25Retriever(world.passages).search([f"{relation} of {entity}" for entity, relation in facts], 1)
    found = sum(ranking[0].title == entity for ranking, (entity, _) in zip(rankings, facts, strict=True))
    assert found / len(facts) >= 0.99


def test_relations_are_named_apart_and_lead_on():
    assert len({relation.name for relation in RELATIONS}) == 7
    pairs = [(a.name, b.name) for a, b in itertools.product(RELATIONS, repeat=2) if a.object is b.subject]
    assert len(pairs) == 16
