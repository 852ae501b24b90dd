"""Paired statistics, against figures worked out by hand and against full enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rex_rag.evaluation.bootstrap import Estimate
from rex_rag.evaluation.paired import compare_scores, sign_test


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 x 1/2
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (1, 7, 2 * (1 + 8) / 256),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),  # 2 x (1 + 6 + 15 + 20) / 64 is above 1
    ],
)
def test_sign_test_by_hand(first: int, second: int, p: float):
    assert sign_test(first, second) == p
    assert sign_test(second, first) == p


def test_sign_test_of_many_disagreements_neither_overflows_nor_underflows_early():
    # Normal approximation with continuity correction: z = (5200 - 4800 - 1) / sqrt(10000) = 3.99, p = 6.61e-05.
    assert sign_test(4800, 5200) == pytest.approx(6.61e-05, rel=0.01)
    assert sign_test(0, 1000) == 2.0**-999


def test_negative_wins_are_refused():
    with pytest.raises(ValueError, match="-1 and 3 cannot be counted"):
        sign_test(-1, 3)


# Ten questions: A alone right on 1, B alone on 4, both on 3, neither on 2.
A = [1, 0, 0, 0, 0, 1, 1, 1, 0, 0]
B = [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]


def test_one_set_by_hand():
    sets, overall = compare_scores({"nq": A}, {"nq": B})
    found = sets["nq"]
    assert (found.n, found.a_only, found.b_only, found.both, found.neither) == (10, 1, 4, 3, 2)
    assert (found.mean_a, found.mean_b) == (0.4, 0.7)
    assert found.difference.mean == pytest.approx(0.3)
    assert found.p == 2 * (1 + 5) / 32
    assert overall == found


def test_the_interval_is_that_of_full_enumeration():
    a, b = [1, 0, 0, 0], [0, 0, 1, 1]
    every = [sum(draw) / 4 for draw in itertools.product([-1, 0, 1, 1], repeat=4)]  # 256 equally likely samples
    sets, _ = compare_scores({"nq": a}, {"nq": b}, resamples=20_000)
    found = sets["nq"].difference
    assert found.mean == 0.25
    assert (found.low, found.high) == tuple(np.quantile(every, [0.025, 0.975])) == (-0.5, 1.0)


def test_equal_runs_differ_by_nothing():
    sets, overall = compare_scores({"nq": A, "own": [0.5]}, {"nq": A, "own": [0.5]})
    assert overall.difference == Estimate(0.0, 0.0, 0.0)
    assert overall.p == 1.0
    assert (sets["own"].both, sets["own"].neither) == (1, 0)


def test_overall_every_set_counts_alike_and_the_counts_add_up():
    sets, overall = compare_scores({"nq": A, "own": [0, 0]}, {"nq": B, "own": [0, 1]})
    assert sets["own"].difference.mean == 0.5
    assert overall.difference.mean == pytest.approx((0.3 + 0.5) / 2)  # over questions it would be 4/12
    assert (overall.mean_a, overall.mean_b) == pytest.approx((0.2, 0.6))
    assert (overall.n, overall.a_only, overall.b_only, overall.both, overall.neither) == (12, 1, 5, 3, 3)
    assert overall.p == 2 * (1 + 6) / 64
    assert overall.difference.low < 0.4 < overall.difference.high


def test_the_overall_interval_is_narrower_than_those_of_two_alike_sets():
    # Independent halves: the standard error of their mean is 1/sqrt(2) of each one's.
    sets, overall = compare_scores({"a": A * 10, "b": A * 10}, {"a": B * 10, "b": B * 10}, resamples=20_000)
    width = overall.difference.high - overall.difference.low
    single = sets["a"].difference.high - sets["a"].difference.low
    # The differences have variance 0.41 (4 of +1 and 1 of -1 in ten): 2 x 1.96 x sqrt(0.41 / 100) = 0.251.
    assert single == pytest.approx(0.251, abs=0.015)
    assert width == pytest.approx(0.251 / 2**0.5, abs=0.015)


def test_the_same_seed_gives_the_same_interval_whatever_other_sets_there_are():
    a, b = [1, 0, 0] * 30, [0, 0.3, 0.9] * 30
    alone, _ = compare_scores({"nq": a}, {"nq": b}, seed=5, resamples=500)
    beside, _ = compare_scores({"own": [1], "nq": a}, {"own": [0], "nq": b}, seed=5, resamples=500)
    other, _ = compare_scores({"nq": a}, {"nq": b}, seed=6, resamples=500)
    assert alone["nq"] == beside["nq"]
    assert alone["nq"].difference != other["nq"].difference


def test_graded_scores_count_by_who_has_more():
    sets, _ = compare_scores({"nq": [0.5, 0.25, 0.0, 0.75]}, {"nq": [0.25, 1.0, 0.0, 0.75]})
    found = sets["nq"]
    assert (found.a_only, found.b_only, found.both, found.neither) == (1, 1, 1, 1)
    assert found.difference.mean == pytest.approx((-0.25 + 0.75) / 4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"nq": [1]}, {"own": [1]}, r"\['nq'\] and \['own'\] cannot be paired"),
        ({}, {}, "one at least"),
        ({"nq": [1, 0]}, {"nq": [1]}, "nq: 2 scores cannot be paired with 1"),
        ({"nq": []}, {"nq": []}, "nq: 0 scores"),
    ],
)
def test_what_cannot_be_paired_is_refused(a: dict, b: dict, message: str):
    with pytest.raises(ValueError, match=message):
        compare_scores(a, b)


def test_too_few_resamples_are_refused():
    with pytest.raises(ValueError, match="99 resamples are too few"):
        compare_scores({"nq": A}, {"nq": B}, resamples=99)
