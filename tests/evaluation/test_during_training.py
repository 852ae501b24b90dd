"""Benchmarks that training evaluates on: which questions, and what is refused."""

import json

import pytest
from transformers.trainer_utils import IntervalStrategy

from rex_rag.data.qa import QuestionError
from rex_rag.evaluation.benchmarks import load_benchmark, subset
from rex_rag.evaluation.during_training import (
    EvaluationSetArguments,
    check_best_metric,
    check_strategy,
    load_evaluation_sets,
)


@pytest.fixture
def questions(tmp_path):
    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def open_rows(count):
    return [{"id": f"q{n}", "question": f"Where is {n}?", "golden_answers": [f"at {n}", str(n)]} for n in range(count)]


def test_benchmarks_become_sets_by_name_with_the_questions_that_evaluate_takes(questions):
    ours, other = questions("ours", open_rows(9)), questions("other", open_rows(2))
    sets = load_evaluation_sets(
        EvaluationSetArguments([f"{ours},{other}"], eval_subset=4, eval_subset_seed=3), "steps"
    )
    assert list(sets) == ["ours", "other"]
    assert sets["ours"]["question"][:] == [row.question for row in subset(load_benchmark(ours), 4, 3).questions]
    assert sets["ours"].info.description.startswith("4 of 9 questions, seed 3")
    assert sets["other"].info.description == ""
    assert sets["other"][:] == {
        "id": ["q0", "q1"],
        "question": ["Where is 0?", "Where is 1?"],
        "golden_answers": [["at 0", "0"], ["at 1", "1"]],
    }


def test_nothing_named_is_nothing_to_evaluate_on():
    assert load_evaluation_sets(EvaluationSetArguments(), "no") is None


def test_what_would_never_be_looked_at_is_refused_and_what_has_nothing_to_see_too(questions):
    with pytest.raises(
        QuestionError, match=r"eval_benchmarks is \['nq'\], but eval_strategy is 'no'.*set eval_strategy"
    ):
        check_strategy(EvaluationSetArguments(["nq"]), "no")
    for epoch in ("epoch", IntervalStrategy.EPOCH):  # the trainer's arguments hold the latter
        with pytest.raises(QuestionError, match=r"eval_strategy is 'epoch', but eval_benchmarks names nothing"):
            load_evaluation_sets(EvaluationSetArguments(), epoch)
    assert (
        load_evaluation_sets(EvaluationSetArguments(["none"]), IntervalStrategy.NO) is None
    )  # a word on a command line


def test_sets_that_do_not_fit_are_refused(questions, tmp_path):
    choice = {"question": "Which?", "key": "A", "options": ["x", "y"]}
    description = {
        "path": questions("choice", [choice]),
        "kind": "multiple_choice",
        "answers_column": "key",
        "choices_column": "options",
    }
    with pytest.raises(QuestionError, match="choice is multiple choice, which training's reward, exact match"):
        load_evaluation_sets(EvaluationSetArguments([description]), "steps")
    ours = questions("ours", open_rows(1))
    with pytest.raises(QuestionError, match="two of eval_benchmarks are called 'ours'; name one as NAME=FILE"):
        load_evaluation_sets(EvaluationSetArguments([ours, ours]), "steps")
    with pytest.raises(QuestionError, match="eval_subset=0; it must be an integer of at least 1"):
        EvaluationSetArguments([ours], eval_subset=0)


def test_the_metric_of_the_best_model_names_a_set():
    for metric in (None, "eval_nq_em/originals", "own_em/originals"):
        check_best_metric(["nq", "own"], metric)
    for metric in ("loss", "eval_em/originals", "eval_popqa_em/originals"):
        with pytest.raises(QuestionError, match=r"which no evaluation set has \(nq, own\).*eval_nq_em/originals or"):
            check_best_metric(["nq", "own"], metric)
