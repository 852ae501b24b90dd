"""A dataset handed to the trainer is checked as a file would be, before the first step."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from rex_rag.data.question_rows import QuestionError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.questions import checked_questions
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import Passage

GOOD = {"question": "capital of Norway?", "golden_answers": ["Oslo"]}


def checked(*rows, name="train_dataset") -> list[dict]:
    return checked_questions(Dataset.from_list(list(rows)), name).to_list()


def test_texts_stay_and_a_string_is_a_list_of_one():
    [row] = checked(GOOD)
    assert row == GOOD
    assert [row["golden_answers"] for row in checked(*[{**GOOD, "golden_answers": "Oslo"}] * 2)] == [["Oslo"]] * 2
    assert checked({**GOOD, "golden_answers": ["Oslo", " ", "Kristiania"]})[0]["golden_answers"][1] == "Kristiania"
    arrays = Dataset.from_list([GOOD]).with_format("numpy")
    assert checked_questions(arrays, "train_dataset").with_format(None)[0]["golden_answers"] == ["Oslo"]


@pytest.mark.parametrize(
    "value",
    [None, [], [" "], " ", ["Oslo", None], [5], 5, 1999.0, [["Oslo"]], True, {"text": "Oslo"}, '["Oslo", "b"]'],
)
def test_other_answers_are_refused_with_dataset_and_row(value):
    with pytest.raises(QuestionError, match=r"^eval_dataset\['nq'\]\[0\]: "):
        checked({**GOOD, "golden_answers": value}, name="eval_dataset['nq']")


@pytest.mark.parametrize("value", [None, "", " \n", "half \ud83d"])
def test_so_are_other_questions(value):
    rows = [GOOD, {**GOOD, "question": value}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    seen = iter(checked_questions(stream, "train_dataset"))
    assert next(seen)["golden_answers"] == ["Oslo"]
    with pytest.raises(QuestionError, match=r"^train_dataset\[1\]: "):
        next(seen)


def test_rows_without_the_columns_and_what_is_no_dataset_are_refused():
    for row in ({"question": "Who?"}, {"golden_answers": ["Ann"]}):
        stream = IterableDataset.from_generator(lambda row=row: iter([row]))
        with pytest.raises(QuestionError, match=r"^train_dataset\[0\]: .* is None"):
            next(iter(checked_questions(stream, "train_dataset")))
    with pytest.raises(ValueError, match=r"^train_dataset is a list; make it a datasets\.Dataset"):
        checked_questions([GOOD], "train_dataset")


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_they_are_refused_before_weights_load(tmp_path, part):
    bad = Dataset.from_list([GOOD, {**GOOD, "golden_answers": []}])
    datasets = {"train_dataset": Dataset.from_list([GOOD]), part: bad}
    with pytest.raises(QuestionError, match=rf"^{part}\[1\]: golden_answers is \[\]; it must be a list of strings"):
        REXRAGTrainer(
            model="nowhere/absent",
            args=REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            retriever=BM25Retriever([Passage("1", "Oslo", "Oslo is the capital of Norway.")]),
            **datasets,
        )
