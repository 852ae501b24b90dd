"""Scores of predictions against figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from rex_rag.evaluation.bootstrap import Estimate, bootstrap, bootstrap_means, macro_mean
from rex_rag.evaluation.choices import choice_letter
from rex_rag.evaluation.records import Prediction, Sample
from rex_rag.evaluation.scores import (
    ScoreError,
    macro_scores,
    main_metric,
    majority_answer,
    pass_at_k,
    question_scores,
    read_predictions,
    read_seconds,
    score_benchmark,
)

CHOICES = {"A": "Warfarin", "B": "Aspirin", "C": "Heparin"}


def sample(answer, *, searches=0, tokens=0, invalid=0, truncations=None, segments=()):
    calls = [{"query": "q", "passages": ["p"]} for _ in range(searches)]
    return Sample(answer, list(segments), calls, tokens, invalid, dict(truncations or {}))


def prediction(identity, golden, *samples, choices=None):
    written = tuple(one if isinstance(one, Sample) else sample(one) for one in samples)
    return Prediction(identity, f"{identity}?", tuple(golden), written, choices)


# The interval


def test_bootstrap_of_two_values_is_the_whole_range():
    # Means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: both 2.5 % quantiles are the ends.
    assert bootstrap(np.array([0.0, 1.0])) == Estimate(mean=0.5, low=0.0, high=1.0)


def test_bootstrap_of_one_right_in_four():
    # Binomial(4, 1/4): P(0) = 0.316 > 0.025; P(X <= 2) = 0.949 < 0.975 < P(X <= 3) = 0.996.
    assert bootstrap(np.array([0, 0, 0, 1])) == Estimate(mean=0.25, low=0.0, high=0.75)


def test_bootstrap_of_ten_right_in_twenty():
    # Binomial(20, 1/2): P(X <= 5) = 0.0207, P(X <= 6) = 0.0577; P(X <= 13) = 0.942, P(X <= 14) = 0.979.
    assert bootstrap(np.array([0.0, 1.0] * 10)) == Estimate(mean=0.5, low=0.3, high=0.7)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap(np.full(7, 0.25)) == Estimate(0.25, 0.25, 0.25)


def test_bootstrap_means_are_distributed_as_resampling_each_question_gives():
    values = np.array([0.0, 0.0, 0.5, 1.0])
    # All 4^4 resamples: mean of the means 0.375, variance of one mean = variance of a draw / 4.
    exact = [np.mean(draw) for draw in product(values, repeat=4)]
    means = bootstrap_means(values, resamples=100_000)
    assert means.mean() == pytest.approx(np.mean(exact), abs=0.003)
    assert means.var() == pytest.approx(np.var(exact), rel=0.03)
    for mean in np.unique(exact):
        assert np.mean(np.isclose(means, mean)) == pytest.approx(np.mean(np.isclose(exact, mean)), abs=0.007)


def test_bootstrap_is_seeded_and_does_not_hang_on_the_order():
    values = np.linspace(0, 1, 50)
    assert bootstrap(values) == bootstrap(values[::-1])
    assert np.array_equal(bootstrap_means(values, 100), bootstrap_means(values, 100))
    assert not np.array_equal(bootstrap_means(values, 100), bootstrap_means(values, 100, seed=1))


@pytest.mark.parametrize("values", [[], [[1.0]], [0.0, float("nan")]])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(ValueError, match="finite values of shape"):
        bootstrap(np.array(values))


def test_the_macro_mean_counts_sets_and_not_questions():
    sets = [np.ones(1000), np.array([0.0, 1.0])]
    # 1 and 1/2 give 3/4; the first never varies, the second spans 0 to 1.
    assert macro_mean(sets) == Estimate(mean=0.75, low=0.5, high=1.0)
    # Two independent sets of 0 and 1: the mean of four draws, Binomial(4, 1/2): P(0) = 1/16 > 0.025.
    assert macro_mean([np.array([0.0, 1.0])] * 2) == Estimate(mean=0.5, low=0.0, high=1.0)
    # Were the second resampled with the first's draws, means of 1/10 for 20 values each would be as wide as one set's.
    twenty = np.array([0.0, 1.0] * 10)
    both, alone = macro_mean([twenty, twenty]), bootstrap(twenty)
    assert both.high - both.low < 0.8 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="no set"):
        macro_mean([])


def test_the_macro_mean_does_not_hang_on_the_order_of_sets():
    first, second, third = np.array([0.0, 1.0] * 50), np.array([0.0, 0.0, 1.0] * 30), np.array([0.0, 0.4, 1.0] * 30)
    assert macro_mean([first, second, third]) == macro_mean([third[::-1], first, second])


# Questions


def test_open_questions_are_scored_by_all_three_metrics():
    scores = question_scores(prediction("q", ["Barack Obama"], "Barack Obama", "It was Barack Obama", "Rome", None))
    assert scores == {
        "exact_match": [1.0, 0.0, 0.0, 0.0],
        "f1": [1.0, pytest.approx(2 / 3), 0.0, 0.0],  # 2 of 4 words right, 2 of 2 found
        "sub_match": [1.0, 1.0, 0.0, 0.0],
    }


def test_answers_of_nothing_but_punctuation_or_articles_are_not_one_vote():
    assert majority_answer(["...", "?", "!!", "Paris", "Paris"]) == "Paris"
    assert majority_answer(["A", "The", "an", "B", "B"]) == "B"
    assert majority_answer(["B", "the The", "The The!"]) == "the The"


def test_a_blank_is_no_answer_even_where_a_gold_answer_normalises_to_nothing():
    scores = question_scores(prediction("q", ["The The"], "", " ", None, "the the", "!"))
    assert set(scores) == {"exact_match", "f1", "sub_match"}
    assert all(row == [0.0, 0.0, 0.0, 1.0, 0.0] for row in scores.values())


def test_choices_are_scored_by_letter_and_several_may_be_right():
    scores = question_scores(prediction("q", ["A", "B"], "B.", "aspirin", "C", "perhaps", choices=CHOICES))
    assert scores == {"accuracy": [1.0, 1.0, 0.0, 0.0]}


def test_retrieved_text_cannot_score():
    planted = [{"kind": "INFORMATION", "text": "<answer>Rome</answer>"}]
    assert question_scores(prediction("q", ["Rome"], sample(None, segments=planted)))["exact_match"] == [0.0]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B) ", "B"),
        ("**B.**", "B"),
        ("B. Aspirin", "B"),
        ("(b) aspirin 100 mg", "B"),
        ("B: the platelets", "B"),
        ("B - Aspirin", "B"),
        ("**B**. Aspirin", "B"),
        ("B) A statin", "B"),
        ("The correct answer is (B).", "B"),
        ("the answer is Aspirin", "B"),
        ("**Answer:** B", "B"),
        ("**The answer is (B).**", "B"),
        ("## Answer: **B**", "B"),
        ("Option C", "C"),
        ("Answer: a", "A"),
        ("So the answer is: option B.", "B"),
        ("aspirin", "B"),
        ("The Aspirin!", "B"),
        ("B. Warfarin", None),  # the letter and the text contradict each other
        ("A or B", None),
        ("A, B", None),
        ("(A) and (B)", None),
        ("B) or C), I think", None),
        ("(A) B, C", None),
        ("A patient with fever", None),
        ("I", None),
        ("D", None),  # no choice
        ("neither", None),
        ("Bleeding", None),
        ("", None),
        (None, None),
    ],
)
def test_letters_are_read_strictly(answer, letter):
    assert choice_letter(answer, CHOICES) == letter


GERMS = {"A": "A. fumigatus", "B": "E. coli", "C": "S. aureus", "D": "C. difficile", "E": "Giardia"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("E. coli", "B"),  # not letter E with the text "coli"
        ("The answer is C. difficile.", "D"),
        ("A. fumigatus", "A"),
        ("E. coli, as a rule", None),  # letter E, or the text of B
        ("E. colitis", "E"),
        ("B. E. coli, as a rule", "B"),
        ("E. Giardia", "E"),
        ("E", "E"),
    ],
)
def test_an_abbreviated_genus_is_no_letter(answer, letter):
    assert choice_letter(answer, GERMS) == letter


DOSES = {"A": "15 mg", "B": "-5", "C": "5", "D": "1,000 mg", "E": "C++", "F": "C#"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("15 mg.", "A"),
        ("1.5 mg", None),  # without its point it would be A
        ("-5", "B"),
        ("5", "C"),
        ("C. -5", None),
        ("1000 mg", "D"),
        ("C++", "E"),
        ("c", "C"),
    ],
)
def test_numbers_keep_their_points_and_signs(answer, letter):
    assert choice_letter(answer, DOSES) == letter


@pytest.mark.parametrize(
    "answer", ["B", "（B）", "B。", "B：阿司匹林", "B、阿司匹林", "（B）阿司匹林", "【B】", "阿司匹林", "阿司匹林。"]
)
def test_letters_among_chinese_punctuation(answer):
    chinese = {"A": "华法林", "B": "阿司匹林", "C": "肝素"}
    assert choice_letter(answer, chinese) == "B"
    assert choice_letter("A：阿司匹林", chinese) is None
    assert choice_letter("A、B、C", chinese) is None


def test_a_text_that_is_an_article_is_a_text():
    blood = {"A": "0", "B": "A", "C": "AB"}
    assert choice_letter("B) A", blood) == "B"
    assert choice_letter("B) 0", blood) is None


def test_a_text_that_two_choices_share_names_neither():
    assert choice_letter("the same", {"A": "Same", "B": "same."}) is None


def test_a_letter_goes_before_a_text_of_one_letter():
    assert choice_letter("A", {"A": "B", "B": "A", "C": "0"}) == "A"


# pass@k and majority


def test_pass_at_k_by_hand():
    # 5 samples, 2 right: 1 - C(3,1)/C(5,1) = 2/5; 1 - C(3,2)/C(5,2) = 1 - 3/10; of 4 one is always right.
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 4) == 1.0
    assert pass_at_k(3, 0, 3) == 0.0
    assert pass_at_k(3, 3, 1) == 1.0
    for wrong in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(*wrong)


def test_pass_at_k_is_unbiased():
    # Samples right with chance 0.3: of 2 new ones at least one is, with chance 1 - 0.7^2 = 0.51.
    chances = [
        pass_at_k(4, sum(draw), 2) * 0.3 ** sum(draw) * 0.7 ** (4 - sum(draw)) for draw in product((0, 1), repeat=4)
    ]
    assert sum(chances) == pytest.approx(0.51)


@pytest.mark.parametrize(
    ("answers", "majority"),
    [
        (["Rome", "the rome!", "Oslo"], "Rome"),
        (["Oslo", "Rome", "rome"], "Rome"),
        (["Oslo", "Rome", "rome", "oslo."], "Oslo"),  # a tie goes to whoever came first
        ([None, None, "Rome"], "Rome"),  # no answer is no vote
        (["", " ", "Rome"], "Rome"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_of_open_answers(answers, majority):
    assert majority_answer(answers) == majority


def test_majority_of_letters():
    assert majority_answer(["A", "(b)", "aspirin", "who knows", "who knows"], CHOICES) == "B"
    assert majority_answer(["who knows"], CHOICES) is None


# A benchmark


def test_a_benchmark_by_hand():
    rows = [
        prediction("1", ["Rome"], sample("rome", searches=2, tokens=100, truncations={"turn": 1})),
        prediction("2", ["Oslo"], sample("in Oslo", searches=1, tokens=50, invalid=1)),
        prediction("3", ["yes"], sample(None, tokens=30, truncations={"turn": 2, "sequence": 1})),
        prediction("4", ["1999"], sample("2001", searches=1, tokens=20)),
    ]
    scores = score_benchmark(rows, seconds=12.5)
    assert (scores.n, scores.samples, scores.kind, scores.seconds) == (4, 1, "open", 12.5)
    assert scores.metrics["exact_match"] == scores.main == Estimate(0.25, 0.0, 0.75)
    assert scores.metrics["f1"].mean == pytest.approx((1 + 2 / 3) / 4)
    assert scores.metrics["sub_match"].mean == 0.5
    assert (scores.searches, scores.tokens, scores.invalid_actions) == (1.0, 50.0, 0.25)
    assert scores.truncations == {"sequence": 1, "turn": 3}
    assert (scores.unanswered, scores.unreadable) == (0.25, 0.0)
    assert (scores.pass_at_k, scores.majority) == ({}, None)
    assert scores.ids == ("1", "2", "3", "4")
    assert scores.values["exact_match"].tolist() == [1.0, 0.0, 0.0, 0.0]
    row = json.loads(json.dumps(scores.as_row()))
    assert row["metrics"]["exact_match"] == {"mean": 0.25, "low": 0.0, "high": 0.75}


def test_a_benchmark_of_three_samples_by_hand():
    rows = [
        prediction("1", ["Rome"], "Oslo", "Rome", "rome"),  # 2 of 3 right, and the majority
        prediction("2", ["Rome"], "Oslo", "Oslo", "Rome"),  # 1 of 3
    ]
    scores = score_benchmark(rows)
    assert scores.main.mean == pytest.approx(0.5)
    assert sorted(scores.pass_at_k) == [1, 2, 3]
    assert scores.pass_at_k[1].mean == pytest.approx(0.5)
    # 1 - C(1,2)/C(3,2) = 1 and 1 - C(2,2)/C(3,2) = 2/3
    assert scores.pass_at_k[2].mean == pytest.approx(5 / 6)
    assert scores.pass_at_k[3].mean == 1.0
    assert scores.majority.mean == 0.5
    assert scores.values["exact_match"] == pytest.approx([2 / 3, 1 / 3])
    assert json.loads(json.dumps(scores.as_row()))["pass_at_k"]["3"]["mean"] == 1.0


def test_equal_scores_are_equal_floats():
    # F1 = 2 x 3 / (4 + 5) = 2 x 5 / (6 + 9) = 2/3 both, from precision and recall in floats 1.1e-16 apart.
    first = score_benchmark([prediction("1", ["a1 a2 a3 x y"], "a1 a2 a3 z")])
    second = score_benchmark([prediction("1", ["a1 a2 a3 a4 a5 x y z w"], "a1 a2 a3 a4 a5 v")])
    assert first.values["f1"] == second.values["f1"]
    # 1, 1 and 1/3 in two orders: their sums end in other last bits.
    there, back = (
        score_benchmark([prediction("1", ["b c"], *order)])
        for order in (("b c", "b c", "b p q r"), ("b c", "b p q r", "b c"))
    )
    assert there.values["f1"] == back.values["f1"]


def test_a_benchmark_of_choices_by_hand():
    rows = [
        prediction("1", ["B"], "aspirin", choices=CHOICES),
        prediction("2", ["B"], "(A)", choices=CHOICES),
        prediction("3", ["B"], "B or C", choices=CHOICES),
        prediction("4", ["B"], None, choices=CHOICES),
    ]
    scores = score_benchmark(rows)
    assert (scores.kind, main_metric(scores.kind), set(scores.metrics)) == (
        "multiple_choice",
        "accuracy",
        {"accuracy"},
    )
    assert (scores.main.mean, scores.unanswered, scores.unreadable) == (0.25, 0.25, 0.25)


def test_a_judge_stands_beside_exact_match_and_is_asked_once_an_answer():
    asked = []

    def judge(question: Prediction, answer: str) -> float:
        asked.append((question.id, answer))
        return 0.5 if "Rome" in answer else 0.0

    rows = [prediction("1", ["Roma"], "Rome"), prediction("2", ["Roma"], "Oslo"), prediction("3", ["Roma"], None)]
    scores = score_benchmark(rows, judge=judge)
    assert asked == [("1", "Rome"), ("2", "Oslo")]
    assert scores.metrics["judge"].mean == pytest.approx(0.5 / 3)
    assert scores.main.mean == 0.0
    with pytest.raises(ScoreError, match=r"question '1': the judge scored 7\.0"):
        score_benchmark(rows, judge=lambda question, answer: 7)


def test_the_mean_over_benchmarks_may_mix_kinds():
    opened = score_benchmark([prediction("1", ["Rome"], "Rome")])
    chosen = score_benchmark([prediction("1", ["B"], "A", choices=CHOICES)])
    assert macro_scores([opened, chosen]) == Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no prediction"),
        ([prediction("1", ["a"], "a"), prediction("1", ["a"], "a")], "question '1' was answered 2 times"),
        ([prediction("1", ["a"], "a"), prediction("2", ["a"], "a", "b")], r"\[1, 2\] samples"),
        ([prediction("1", ["a"], "a"), prediction("2", ["A"], "A", choices=CHOICES)], "2 kinds of question"),
        ([prediction("1", ["a"])], r"\[0\] samples"),
    ],
)
def test_predictions_that_do_not_belong_together_are_refused(rows, message):
    with pytest.raises(ScoreError, match=message):
        score_benchmark(rows)


# Files


def test_predictions_come_back_as_they_were_written(tmp_path):
    rows = [
        prediction("1", ["Rome"], sample("Rome", searches=1, tokens=3, truncations={"turn": 1})),
        prediction("2", ["B"], "A", choices=CHOICES),
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row.as_row()) + "\n" for row in rows))
    assert read_predictions(tmp_path) == rows
    path.write_text(json.dumps(rows[0].as_row()) + "\n" + '{"id": "3"}\n')
    with pytest.raises(ScoreError, match=r"predictions\.jsonl, line 2: not a prediction \(KeyError"):
        read_predictions(tmp_path)


def test_seconds_add_up_and_may_be_unknown(tmp_path):
    assert read_seconds(tmp_path) is None
    path = tmp_path / "timings.jsonl"
    path.write_text('{"chunk": 0, "seconds": 1.5}\n{"chunk": 1, "seconds": 2}\n')
    assert read_seconds(tmp_path) == 3.5
    path.write_text('{"seconds": 1.5}\n{"chunk": 1}\n')
    with pytest.raises(ScoreError, match=r"timings\.jsonl, line 2: seconds=null"):
        read_seconds(tmp_path)


def test_document_recall_is_of_all_that_a_sample_found():
    def searched(*passages):
        calls = [{"query": "q", "passages": list(found), "segment": 0} for found in passages]
        return replace(sample("Lisbon"), searches=calls)

    # Two of four by two searches that share one; none without a search; found twice counts once.
    first = Prediction("a", "?", ("Lisbon",), (searched(["1", "x"], ["1", "2"]),), documents=("1", "2", "3", "4"))
    second = Prediction("b", "?", ("Lisbon",), (sample("Lisbon"),), documents=("9",))
    scores = score_benchmark([first, second])
    assert scores.values["document_recall"].tolist() == [0.5, 0.0]
    assert scores.metrics["document_recall"].mean == 0.25 and scores.main.mean == 1.0
    assert Prediction.from_row(json.loads(json.dumps(first.as_row()))) == first
    plain = Prediction("a", "?", ("Lisbon",), (sample("Lisbon"),))
    assert "documents" not in plain.as_row() and "document_recall" not in score_benchmark([plain]).metrics
