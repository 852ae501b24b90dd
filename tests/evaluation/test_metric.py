"""Normalisation held against SQuAD's rules, case by case, and the `evaluate` module that uses it."""

from __future__ import annotations

import evaluate
import pytest

from rex_rag.answers import normalize_answer, sub_match
from rex_rag.evaluation.metric import METRIC_PATH

# By hand, in SQuAD v1.1's order: lower case; the 32 ASCII punctuation characters go, leaving no blank behind; the
# words a, an, the go, leaving one; white space becomes single blanks.
NORMALISATION = [
    # articles
    ("The Beatles", "beatles"),
    ("a Tale of the Two Cities", "tale of two cities"),
    ("an", ""),
    ("The The", ""),
    ("Vitamin A", "vitamin"),  # SQuAD's rule has no exception for letters
    ("Theatre of Athens", "theatre of athens"),
    ("a-ha", "aha"),  # the hyphen goes first, so no article is left
    ("Le Monde", "le monde"),  # English articles alone
    ("and then another", "and then another"),
    ("the\u00a0Hague", "hague"),  # a no-break space bounds a word as well
    # punctuation
    ("Washington, D.C.", "washington dc"),
    ("AC/DC", "acdc"),
    ("Spider-Man", "spiderman"),
    ("it's", "its"),
    ('"Heroes"', "heroes"),
    ("rock & roll", "rock roll"),
    ("snake_case", "snakecase"),
    ("Mr. & Mrs. Smith", "mr mrs smith"),
    ("user@example.com", "userexamplecom"),
    ("(the) [end]", "end"),
    ("C++", "c"),
    ("...", ""),
    ("\\^`{|}~<=>", ""),
    # unicode: only ASCII punctuation goes, accents stay, composed and decomposed forms stay apart
    ("Müller", "müller"),
    ("São Paulo", "são paulo"),
    ("caf\u00e9", "caf\u00e9"),
    ("cafe\u0301", "cafe\u0301"),
    ("rock \u2019n\u2019 roll", "rock \u2019n\u2019 roll"),
    ("1914\u20131918", "1914\u20131918"),
    ("\u201cHamlet\u201d", "\u201chamlet\u201d"),
    ("ÉCOLE", "école"),
    ("İzmir", "i\u0307zmir"),  # Python lowers the dotted capital I to two characters
    ("Straße", "straße"),  # lowered, not case-folded
    ("東京 タワー", "東京 タワー"),
    ("Москва", "москва"),
    # numbers
    ("1,234,567", "1234567"),
    ("-5", "5"),
    ("98.6 %", "986"),
    ("$1.5 million", "15 million"),
    ("7:30 a.m.", "730 am"),
    ("the 1990's", "1990s"),
    ("two", "two"),  # words are not turned into digits
    # yes and no
    ("Yes, it is.", "yes it is"),
    ("No!", "no"),
    ("NO.", "no"),
    ("yes\n", "yes"),
    # white space
    ("\t New   York\r\nCity ", "new york city"),
    ("", ""),
]

# gold answers, aliases among them, and what matches exactly or as a part
ALIASES = [
    ("JFK", ["John F. Kennedy", "J.F.K."], True, True),
    ("John F Kennedy", ["John F. Kennedy", "JFK"], True, True),
    ("President John F. Kennedy", ["John F. Kennedy", "JFK"], False, True),
    ("John Kennedy", ["John F. Kennedy", "JFK"], False, False),
    ("no, I do not know", ["no"], False, True),
    ("I do not know", ["no"], False, False),  # "no" is a part of "not" and "know", but no word here
    ("Annapolis", ["Ann"], False, False),
    ("an answer", ["the"], False, False),  # a gold answer of nothing is not a part of everything
    ("the", ["a"], False, False),
    ("the", ["The", "a"], True, True),
    ("York New", ["New York"], False, False),
]


def test_there_are_forty_cases_and_none_twice():
    assert len({raw for raw, _ in NORMALISATION}) == len(NORMALISATION) >= 40


@pytest.mark.parametrize(("raw", "expected"), NORMALISATION)
def test_normalisation(raw, expected):
    assert normalize_answer(raw) == expected


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(METRIC_PATH, cache_dir=str(tmp_path_factory.mktemp("metric")))


def test_the_module_scores_by_the_same_normalisation(metric):
    raw = [case for case, normal in NORMALISATION if normal]
    expected = [[normal] for _, normal in NORMALISATION if normal]
    assert metric.compute(predictions=raw, references=expected) == {"exact_match": 1, "f1": 1, "sub_match": 1}


def test_exact_and_sub_match_over_aliases(metric):
    for prediction, golden, exact, part in ALIASES:
        assert sub_match(prediction, golden) is part, prediction
        scores = metric.compute(predictions=[prediction], references=[golden])
        assert (scores["exact_match"], scores["sub_match"]) == (exact, part), prediction


def test_means_over_questions_by_hand(metric):
    # exact: 1, 0, 0, 0. F1: 1; "barack hussein obama" against "barack obama" 0.8; 0; 0. Sub-match: 1, 0, 0, 0.
    scores = metric.compute(
        predictions=["The Louvre", "Barack Hussein Obama", "Oslo", None],
        references=[["Prado", "Louvre"], ["Barack Obama"], ["Rome"], ["Rome"]],
    )
    assert scores == {"exact_match": 0.25, "f1": pytest.approx(1.8 / 4), "sub_match": 0.25}


def test_a_gold_answer_may_be_a_string_and_batches_add_up(metric):
    metric.add_batch(predictions=["Rome", "Oslo"], references=["rome", "Bergen"])
    metric.add(prediction="in Paris", reference="Paris")
    assert metric.compute() == {
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((1 + 2 / 3) / 3),
        "sub_match": pytest.approx(2 / 3),
    }


def test_the_module_holds_no_scoring_of_its_own(metric):
    module = __import__(type(metric).__module__, fromlist=["exact_match"])
    assert module.exact_match.__module__ == module.sub_match.__module__ == "rex_rag.answers"


def test_a_prediction_too_many_is_refused(metric):
    with pytest.raises(ValueError, match="predictions"):
        metric.compute(predictions=["a", "b"], references=[["a"]])


def test_rows_of_different_form_are_scored_each_for_itself(metric):
    references = ["Lisbon", ["b", "x"], "Oslo"]
    assert metric.compute(predictions=["Lisbon", "x", "Bergen"], references=references)["exact_match"] == 2 / 3
    assert metric.compute(predictions=[None, "b"], references=[["a"], "b"])["exact_match"] == 1 / 2
    metric.add(prediction=None, reference="a")
    metric.add(prediction="b", reference=["b"])
    assert metric.compute()["exact_match"] == 1 / 2


def test_a_prediction_that_is_no_text_is_refused(metric):
    with pytest.raises(ValueError, match=r"a prediction is \['a', 'b'\], a list; give a string, or None"):
        metric.compute(predictions=[["a", "b"]], references=["a"])
