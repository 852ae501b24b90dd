"""Scripted demonstrations: the expected answers, and ids and labels as the rollout engine would build them."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from rex_rag.answers import exact_match
from rex_rag.protocols import SearchR1
from rex_rag.protocols.inert import ALL_TAGS
from rex_rag.quickstart import warm_start
from rex_rag.quickstart.demonstrations import build_demonstrations, tokenize_demonstrations, write_demonstration
from rex_rag.quickstart.hopworld import HopQuestion, HopWorldConfig, build_hopworld, hopworld_words
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.types import Passage, SegmentKind

QUESTION = HopQuestion("q", "Who is the friend of the mentor of red oak?", ("mentor", "friend"), ("oak", "elm", "fox"))
RANKINGS = [[Passage("0", "oak", "mentor elm")], [Passage("1", "elm", "friend fox")]]
RIGHT = (
    (SegmentKind.POLICY, "<think> I need the mentor of oak</think><search> mentor of oak</search>"),
    (SegmentKind.INFORMATION, "Doc 1(Title: oak) mentor elm"),
    (SegmentKind.POLICY, "<think> the mentor of oak is elm</think><search> friend of elm</search>"),
    (SegmentKind.INFORMATION, "Doc 1(Title: elm) friend fox"),
    (SegmentKind.POLICY, "<think> the friend of elm is fox</think><answer> fox</answer>"),
)


@pytest.fixture(scope="module")
def world():
    return build_hopworld(HopWorldConfig(train_questions=(100, 200, 100), test_questions=(0, 0, 0)))


@pytest.fixture(scope="module")
def retriever(world):
    return BM25Retriever(world.passages)


def test_the_whole_walk():
    demonstration = write_demonstration(QUESTION, RANKINGS)
    assert demonstration.segments == RIGHT
    assert demonstration.answer == "fox"
    assert demonstration.is_correct


def test_a_dead_end_differs_only_after_the_thought():
    demonstration = write_demonstration(QUESTION, RANKINGS, searches=1)
    assert demonstration.segments == (
        *RIGHT[:2],
        (SegmentKind.POLICY, "<think> the mentor of oak is elm</think><answer> elm</answer>"),
    )
    assert not demonstration.is_correct


def test_a_walk_has_at_least_one_search_and_no_more_than_hops():
    for searches in (0, 3):
        with pytest.raises(ValueError, match=f"searches={searches} is outside 1..2"):
            write_demonstration(QUESTION, RANKINGS, searches)


def test_wrong_rate_one_answers_with_the_first_intermediate(world, retriever):
    demonstrations = build_demonstrations(world.train, retriever, wrong_rate=1.0)
    assert len(demonstrations) > 390
    for demonstration in demonstrations:
        question = demonstration.question
        assert demonstration.answer == question.chain[1]
        assert demonstration.is_correct == (question.hops == 1)


def test_wrong_rate_zero_answers_with_the_gold(world, retriever):
    demonstrations = build_demonstrations(world.train, retriever, wrong_rate=0.0)
    assert {demonstration.question.hops for demonstration in demonstrations} == {1, 2, 3}
    for demonstration in demonstrations:
        question = demonstration.question
        assert exact_match(demonstration.answer, question.golden_answers)
        assert sum(kind is SegmentKind.INFORMATION for kind, _ in demonstration.segments) == question.hops


def test_wrong_rate_between(world, retriever):
    demonstrations = build_demonstrations(world.train, retriever, wrong_rate=0.9)
    multi_hop = [demonstration for demonstration in demonstrations if demonstration.question.hops > 1]
    # About 300 draws of probability 0.9: four standard errors are 0.07.
    assert 0.83 < sum(not demonstration.is_correct for demonstration in multi_hop) / len(multi_hop) < 0.97


def test_the_seed_names_the_draws(world, retriever):
    first, again, other = (
        build_demonstrations(world.train, retriever, wrong_rate=0.5, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_wrong_rate_must_be_a_probability(world, retriever):
    with pytest.raises(ValueError, match=r"wrong_rate=1\.5 is not a probability"):
        build_demonstrations(world.train, retriever, wrong_rate=1.5)


def test_every_action_parses_and_every_passage_was_retrieved(world, retriever):
    for demonstration in build_demonstrations(world.train, retriever, wrong_rate=0.3, top_k=2):
        model_turns = [text for kind, text in demonstration.segments if kind is SegmentKind.POLICY]
        shown = [text for kind, text in demonstration.segments if kind is SegmentKind.INFORMATION]
        actions = [SearchR1().parse(text) for text in model_turns]
        assert [len(action.calls) for action in actions] == [1] * len(shown) + [0]
        assert actions[-1].answer == demonstration.answer
        for action, observation in zip(actions[:-1], shown, strict=True):
            for rank, passage in enumerate(retriever.search([action.calls[0].arguments["query"]], 2)[0], start=1):
                assert f"Doc {rank}(Title: {passage.title}) {passage.text}" in observation


def test_questions_whose_passage_is_not_retrieved_are_left_out(world, caplog):
    class Elsewhere:
        description = "a retriever that finds the wrong passage"

        def check(self):
            pass

        def search(self, queries, top_k):
            return [[Passage("0", "elsewhere", "nothing")] for _ in queries]

    with caplog.at_level("INFO"):
        assert build_demonstrations(world.train[:5], Elsewhere()) == []
    assert "left out 5 of 5 demonstrations" in caplog.text


def test_an_empty_ranking_is_an_error(world):
    class Silent:
        description = "silent"

        def check(self):
            pass

        def search(self, queries, top_k):
            return [[] for _ in queries]

    with pytest.raises(RetrievalError):
        build_demonstrations(world.train[:1], Silent())


def test_doubts_come_with_right_and_wrong_alike_and_are_not_learnt(world, retriever, word_tokenizer):
    doubt = "<think> Wait I may be wrong ."
    assert write_demonstration(QUESTION, RANKINGS, 1, doubt).segments[2:] == (
        (SegmentKind.POLICY, "<think> the mentor of oak is elm</think>"),
        (SegmentKind.PROBE, doubt),
        (SegmentKind.POLICY, "</think><answer> elm</answer>"),
    )
    assert write_demonstration(QUESTION, RANKINGS, 2, doubt).segments[2:5] == (
        (SegmentKind.POLICY, "<think> the mentor of oak is elm</think>"),
        (SegmentKind.PROBE, doubt),
        (SegmentKind.POLICY, "</think><search> friend of elm</search>"),
    )
    plain = build_demonstrations(world.train, retriever, wrong_rate=0.5)
    doubting = build_demonstrations(world.train, retriever, wrong_rate=0.5, doubts=[doubt], doubt_rate=0.5)
    # The draws of doubts change no answer.
    assert [item.answer for item in doubting] == [item.answer for item in plain]
    doubted = [any(kind is SegmentKind.PROBE for kind, _ in item.segments) for item in doubting]
    rates = {"wrong_rate": 1.0, "doubts": [doubt], "doubt_rate": 0.5, "doubt_wrong_rate": 0.0}
    for item, has_doubt in zip(build_demonstrations(world.train, retriever, **rates), doubted, strict=True):
        assert item.is_correct == (has_doubt or item.question.hops == 1)
    assert 0.4 < sum(doubted) / len(doubted) < 0.6
    (row,) = tokenize_demonstrations([write_demonstration(QUESTION, RANKINGS, 1, doubt)], word_tokenizer)
    assert word_tokenizer.convert_tokens_to_ids("Wait") in row["input_ids"]
    assert word_tokenizer.convert_tokens_to_ids("Wait") not in row["labels"]
    with pytest.raises(ValueError, match="with 0 doubts"):
        build_demonstrations(world.train, retriever, doubt_rate=0.5)


def test_ids_and_labels_of_a_small_case(word_tokenizer):
    question = HopQuestion("q", "where is red oak ?", ("tree",), ("oak", "elm"))
    demonstration = write_demonstration(question, [[Passage("0", "oak", "tree elm")]])
    (row,) = tokenize_demonstrations([demonstration], word_tokenizer, SearchR1(template="Question : {question}"))
    tokens = word_tokenizer.convert_ids_to_tokens(row["input_ids"])
    prompt = ["Question", ":", "where", "is", "red", "oak", "<unk>"]
    search = ["<think>", "I", "<unk>", "the", "tree", "of", "oak", "</think>"]
    search += ["<search>", "tree", "of", "oak", "</search>"]
    # The pre-tokenizer cuts `1(Title:` into four words of this vocabulary.
    shown = ["<information>", "Doc", "1", "(", "Title", ":", "oak", ")", "tree", "elm", "</information>"]
    answer = ["<think>", "the", "tree", "of", "oak", "is", "elm", "</think>", "<answer>", "elm", "</answer>"]
    assert tokens == prompt + search + shown + answer
    learnt = [0] * 7 + [1] * 13 + [0] * 11 + [1] * 11
    assert [label != -100 for label in row["labels"]] == [bool(flag) for flag in learnt]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert tokens[-1] == "</answer>"


def test_ids_are_those_of_separately_encoded_pieces(bpe_tokenizer, world, retriever):
    """A tokenizer that merges across tags and lines: the pieces must not be encoded together."""
    demonstrations = build_demonstrations(world.train[:20], retriever, wrong_rate=0.0)

    def encode(text):
        return bpe_tokenizer(text, add_special_tokens=False)["input_ids"]

    for demonstration, row in zip(demonstrations, tokenize_demonstrations(demonstrations, bpe_tokenizer), strict=True):
        expected = bpe_tokenizer.apply_chat_template(
            SearchR1().messages(demonstration.question.question), add_generation_prompt=True, return_dict=False
        )
        labels = [-100] * len(expected)
        for kind, text in demonstration.segments:
            if kind is SegmentKind.POLICY:
                ids = encode(text)
                labels += ids
            else:
                ids = encode("\n\n<information>" + text) + encode("</information>\n\n")
                labels += [-100] * len(ids)
            expected += ids
        assert row == {"input_ids": expected, "labels": labels}


def shown(kind, text):
    return f"\n\n<information>{text}</information>\n\n" if kind is SegmentKind.INFORMATION else text


def test_no_demonstrations_no_rows(word_tokenizer):
    assert tokenize_demonstrations([], word_tokenizer) == []


def test_the_warm_starts_tokenizer_survives_autotokenizer(world, retriever, tmp_path):
    tokenizer = warm_start.build_tokenizer(SearchR1(template="Question: {question}"))
    warm_start.build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    demonstrations = build_demonstrations(world.train[:50], retriever, wrong_rate=0.5)
    rows = tokenize_demonstrations(demonstrations, loaded, SearchR1(template="Question: {question}"))
    assert rows == tokenize_demonstrations(demonstrations, tokenizer, SearchR1(template="Question: {question}"))
    for demonstration, row in zip(demonstrations, rows, strict=True):
        # Nothing is lost: the completion decodes to the very text of its segments.
        text = loaded.decode(row["input_ids"], skip_special_tokens=False)
        assert text.endswith("assistant\n" + "".join(shown(*segment) for segment in demonstration.segments))


def test_the_warm_starts_tokenizer_gives_every_word_and_tag_one_token():
    tokenizer = warm_start.build_tokenizer(SearchR1(template="Question: {question}"))
    assert [word for word in hopworld_words() if word[0].isalpha() and len(tokenizer.tokenize(f" {word}")) != 1] == []
    assert [tag for tag in ALL_TAGS if tokenizer.tokenize(tag) != [tag]] == []
    assert set(tokenizer.all_special_tokens).isdisjoint(ALL_TAGS)
    assert tokenizer.decode(tokenizer("Zoë?")["input_ids"]) == "Zoë?"
