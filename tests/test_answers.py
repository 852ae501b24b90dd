"""Answer scoring, case by case."""

import pytest

from rex_rag.answers import answer_key, exact_match, normalize_answer, sub_match, token_f1


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("Ana Thea Anthem", "ana thea anthem"),  # articles are whole words only
        ("  New \t York\n City ", "new york city"),
        ("U.S.A.", "usa"),
        ("rock-'n'-roll!", "rocknroll"),
        ("(2001) A Space Odyssey", "2001 space odyssey"),
        ("1,000", "1000"),
        ("3.5", "35"),
        ("$5 & 10%", "5 10"),
        ("Yes.", "yes"),
        ("NO", "no"),
        ("Beyoncé", "beyoncé"),
        ("ÅSA", "åsa"),
        ("O\u2019Neill", "o\u2019neill"),  # only ASCII punctuation goes
        ("東京", "東京"),
        ("the", ""),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text, normalized):
    assert normalize_answer(text) == normalized
    assert normalize_answer(normalized) == normalized


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("the Beatles", ["Beatles"], True),
        ("Beatles", ["Stones", "The Beatles!"], True),
        ("James Madison", ["james madison"], True),
        ("1999", ["1999"], True),
        ("1999", ["in 1999"], False),
        ("yes", ["no"], False),
        ("Yes", ["yes"], True),
        ("Paris, France", ["Paris"], False),
        ("", ["Paris"], False),
        ("Paris", [], False),
        (None, ["Paris"], False),
        (None, [], False),
        (None, [""], False),
    ],
)
def test_exact_match(prediction, gold, expected):
    assert exact_match(prediction, gold) is expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Barack Obama", ["Barack Obama"], 1.0),
        # 2 of 3 predicted words are right, both gold words are found: 2 * (2/3) * 1 / (2/3 + 1)
        ("Barack Hussein Obama", ["Barack Obama"], 0.8),
        # precision 1, recall 1/4: 2 * 0.25 / 1.25
        ("Obama", ["President Barack Hussein Obama"], 0.4),
        # a repeated word counts once: 2/3 and 1 again
        ("new new york", ["New York"], 0.8),
        # the best gold counts: 0 and 2 * (1/2) * 1 / (3/2)
        ("Lake Como", ["Garda", "Como"], 2 / 3),
        ("the Louvre", ["Louvre"], 1.0),
        ("Oslo", ["Rome"], 0.0),
        ("", ["Rome"], 0.0),
        ("Rome", [], 0.0),
        (None, ["Rome"], 0.0),
    ],
)
def test_token_f1(prediction, gold, expected):
    assert token_f1(prediction, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "gold", "same"),
    [
        ("The The", "The The", True),  # the band: SQuAD's normalisation leaves nothing of it
        ("the  THE!", "The The", True),
        ("The", "The The", False),
        (".", "The The", False),
        ("", "The The", False),
        ("A", "A", True),
        ("a.", "A", True),
        ("an", "A", False),
        ("B", "A", False),
        ("!!!", "!!!", True),
        ("! !", "!!!", False),
        ("the", "!!!", False),
        ("", "", False),  # nothing is no answer
        (" ", "\n", False),
    ],
)
def test_answers_that_normalise_to_nothing_are_equal_only_as_they_stand(prediction, gold, same):
    scores = exact_match(prediction, [gold]), token_f1(prediction, [gold]), sub_match(prediction, [gold])
    assert scores == (same, float(same), same)


def test_no_answer_shares_the_key_of_one_that_normalises_to_something():
    assert [answer_key(text) for text in ("The Owl!", "The", "a!", "?!", " ")] == ["owl", "the", "a", "?!", ""]


def test_gold_answers_may_be_any_iterable():
    assert exact_match("b", iter(["x", "b"])) is True
    assert token_f1("b", iter(["x", "b"])) == 1.0
