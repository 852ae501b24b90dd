"""Question sets: mixtures, columns, subsets by seed, and every refusal."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from trl import TrlParser

from rex_rag.data.qa import QuestionArguments, QuestionError, QuestionSource, load_questions

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
COLUMNS = ["id", "question", "golden_answers", "source"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def _rows(count, prefix="q"):
    return [{"id": f"{prefix}{n}", "question": f"question {n}?", "golden_answers": [f"a{n}"]} for n in range(count)]


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _load(*datasets, **options):
    return load_questions(QuestionArguments(datasets=list(datasets), **options))


def test_one_layout_whatever_the_source_holds(tmp_path):
    rows = [
        {"id": 3, "question": " Who? ", "golden_answers": "one", "metadata": {"type": "bridge"}},
        {"question": "When?", "golden_answers": ["1999", 2000, " ", None], "metadata": {}, "extra": [1]},
    ]
    dataset = _load(_write(tmp_path / "set" / "qa.jsonl", rows))
    assert dataset.column_names == COLUMNS
    assert dataset.to_list() == [
        {"id": "3", "question": "Who?", "golden_answers": ["one"], "source": "set/qa"},
        {"id": "set/qa/2", "question": "When?", "golden_answers": ["1999", "2000"], "source": "set/qa"},
    ]


def test_jsonl_json_parquet_folder_and_saved_dataset_hold_the_same_rows(tmp_path):
    rows = [{**row, "metadata": {"n": n}} for n, row in enumerate(_rows(3))]
    _write(tmp_path / "folder" / "train.jsonl", rows)
    _write(tmp_path / "lines.json", rows)
    (tmp_path / "qa.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved_split")
    expected = [(row["id"], row["question"], row["golden_answers"]) for row in rows]
    for name in ("folder/train.jsonl", "qa.json", "lines.json", "qa.parquet", "folder", "saved", "saved_split"):
        dataset = _load(str(tmp_path / name))
        assert [(row["id"], row["question"], row["golden_answers"]) for row in dataset] == expected, name


def test_builder_with_data_files_and_split(tmp_path):
    path = _write(tmp_path / "x.jsonl", _rows(4))
    dataset = _load({"path": "json", "data_files": path, "split": "train[1:3]"})
    assert dataset["id"] == ["q1", "q2"]


def test_mixture_keeps_order_and_names_its_sources(tmp_path):
    first = _write(tmp_path / "nq" / "train.jsonl", _rows(2))
    second = _write(
        tmp_path / "hotpotqa" / "train.jsonl",
        [{"id": "q1", "q": "other?", "a": "b"}, {"id": "z", "q": "c?", "a": "d"}],
    )
    dataset = _load(first, {"path": second, "question_column": "q", "answers_column": "a"})
    # "q1" is in both, so it takes its source's name; the others stay
    assert dataset["id"] == ["q0", "nq/train:q1", "hotpotqa/train:q1", "z"]
    assert dataset["source"] == ["nq/train", "nq/train", "hotpotqa/train", "hotpotqa/train"]
    assert dataset["golden_answers"][3] == ["d"]


def test_repeated_ids_are_numbered_with_a_warning(tmp_path, caplog):
    rows = _rows(4)
    for row, identity in zip(rows, ("x", "x", "x#2", "x"), strict=True):
        row["id"] = identity
    dataset = _load(_write(tmp_path / "qa.jsonl", rows))
    assert len(set(dataset["id"])) == 4 and dataset["id"][:2] == ["x", "x#2"]
    assert "repeat an earlier id (x, " in caplog.text


def test_the_same_file_twice_has_two_labels(tmp_path):
    path = _write(tmp_path / "s" / "qa.jsonl", _rows(1))
    dataset = _load(path, path)
    assert dataset["source"] == ["s/qa", "s/qa#2"] and dataset["id"] == ["s/qa:q0", "s/qa#2:q0"]


def test_unusable_rows_are_counted_and_named(tmp_path, caplog):
    rows = _rows(9)
    rows[1]["question"] = " "
    rows[2]["question"] = None
    del rows[3]["question"]
    rows[4]["golden_answers"] = []
    rows[5]["golden_answers"] = ["", None]
    rows[6]["golden_answers"] = None
    path = _write(tmp_path / "qa.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="rex_rag"):
        assert _load(path)["id"] == ["q0", "q7", "q8"]
    [record] = [record for record in caplog.records if record.name == "rex_rag.data.qa"]
    assert record.getMessage() == (
        f"{path}: dropped 6 of 9 rows: 3 without a question (q1, q2, q3); 3 without an answer (q4, q5, q6)"
    )


def test_only_the_first_ids_are_named(tmp_path, caplog):
    rows = _rows(8)
    for row in rows[1:]:
        row["question"] = ""
    _load(_write(tmp_path / "qa.jsonl", rows))
    assert "7 without a question (q1, q2, q3, q4, q5, …)" in caplog.text


def test_nothing_left_is_an_error(tmp_path):
    rows = [{"id": "x", "question": "", "golden_answers": ["a"]}, {"id": "y", "question": "b", "golden_answers": []}]
    with pytest.raises(QuestionError, match=r"none of its 2 rows.*1 without a question \(x\); 1 without an answer"):
        _load(_write(tmp_path / "qa.jsonl", rows))


def test_a_missing_column_lists_those_that_exist(tmp_path):
    path = _write(tmp_path / "qa.jsonl", [{"id": "1", "query": "q", "answers": ["a"]}])
    with pytest.raises(
        QuestionError, match=r"no column 'question'; the columns are id, query, answers. Set question_col"
    ):
        _load(path)
    with pytest.raises(QuestionError, match=r"no column 'golden_answers'.*Set answers_column"):
        _load(path, question_column="query")
    assert len(_load(path, question_column="query", answers_column="answers")) == 1


def test_a_missing_file_a_wrong_split_and_no_source(tmp_path):
    with pytest.raises(QuestionError, match=r"absent\.jsonl: no such file"):
        _load(str(tmp_path / "absent.jsonl"))
    path = _write(tmp_path / "folder" / "train.jsonl", _rows(1))
    with pytest.raises(QuestionError, match=r"split='nope'.*cannot be loaded: ValueError"):
        _load({"path": str(tmp_path / "folder"), "split": "nope"})
    with pytest.raises(QuestionError, match="split='test': a file has none of these"):
        _load({"path": path, "split": "test"})
    with pytest.raises(QuestionError, match="no question set was given"):
        _load()


def test_an_unreachable_dataset_is_named():
    code = (
        "from rex_rag.data.qa import *\n"
        "try:\n    load_questions(QuestionArguments(datasets=['example-org/absent']))\n"
        "except QuestionError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root, timeout=60
    )
    assert run.stdout.startswith("example-org/absent (name=None, data_files=None, split='train') cannot be loaded: ")


def test_subsets_depend_on_the_seed_and_are_nested(tmp_path):
    path = _write(tmp_path / "a" / "qa.jsonl", _rows(50))
    other = _write(tmp_path / "b" / "qa.jsonl", _rows(50, prefix="r"))

    def subset(count, seed):
        return _load({"path": path, "max_questions": count}, subset_seed=seed)["id"]

    ten = subset(10, 0)
    assert len(ten) == 10 and ten == subset(10, 0) and ten != subset(10, 1)
    assert ten == sorted(ten, key=lambda identity: int(identity[1:]))
    assert set(ten) < set(subset(20, 0))
    assert ten == _load({"path": path, "fraction": 0.2})["id"]
    mixed = _load({"path": other, "max_questions": 3}, {"path": path, "max_questions": 10})["id"]
    assert mixed[3:] == ten


def test_limit_of_the_whole_mixture_and_shuffling(tmp_path, caplog):
    paths = [_write(tmp_path / name / "qa.jsonl", _rows(30, prefix=name)) for name in "ab"]
    few = _load(*paths, max_questions=20)["id"]
    assert len(few) == 20 and {identity[0] for identity in few} == {"a", "b"}
    assert few == _load(*paths, max_questions=20)["id"] and few != _load(*paths, max_questions=20, subset_seed=1)["id"]
    shuffled = _load(*paths, max_questions=20, shuffle_questions=True)["id"]
    assert shuffled != few and sorted(shuffled) == sorted(few)
    assert shuffled == _load(*paths, max_questions=20, shuffle_questions=True)["id"]
    assert len(_load(*paths, max_questions=100)) == 60
    assert "100 questions were asked for, but only 60 exist" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"datasets": [{"path": "x", "answers_column": []}]}, r"x: answers_column=\[\]; it must be the name of"),
        (
            {"datasets": [{"path": "x", "slpit": "train"}]},
            r"unknown keys \['slpit'\]; known keys are path, name, data_f",
        ),
        ({"datasets": [{"name": "nq"}]}, "has no 'path'"),
        ({"datasets": [{"path": " "}]}, "path=' '"),
        ({"datasets": [{"path": "x", "split": None}]}, "split=None"),
        ({"datasets": [3]}, "3 is a int"),
        ({"datasets": [{"path": "x", "fraction": 0}]}, "fraction=0; it must be in"),
        ({"datasets": [{"path": "x", "fraction": 1.2}]}, r"fraction=1\.2"),
        ({"datasets": [{"path": "x", "max_questions": 0}]}, "x: max_questions=0"),
        ({"datasets": [{"path": "x", "max_questions": 1, "fraction": 0.5}]}, "set one of them"),
        ({"max_questions": -1}, "max_questions=-1"),
        ({"max_questions": 2.5}, "max_questions=2.5"),
        ({"subset_seed": "a"}, "subset_seed='a'"),
        ({"question_column": ""}, "question_column=''"),
    ],
)
def test_odd_arguments_are_refused(values, message):
    with pytest.raises(QuestionError, match=message):
        QuestionArguments(**values)


def test_recipe_and_command_line_give_the_same_arguments(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "datasets:\n"
        "- {path: RUC-NLPIR/FlashRAG_datasets, name: nq, split: train}\n"
        "- {path: RUC-NLPIR/FlashRAG_datasets, name: hotpotqa, max_questions: 10}\n"
        "max_questions: 100\nsubset_seed: 3\n"
    )
    [arguments] = TrlParser(QuestionArguments).parse_args_and_config(["--config", str(recipe)])
    hub = "RUC-NLPIR/FlashRAG_datasets"
    assert arguments.datasets == [
        QuestionSource(path=hub, name="nq"),
        QuestionSource(path=hub, name="hotpotqa", max_questions=10),
    ]
    assert [source.label for source in arguments.datasets] == ["nq", "hotpotqa"]
    assert (arguments.max_questions, arguments.subset_seed) == (100, 3)
    command_line = ["--config", str(recipe), "--datasets", "a.jsonl", "b.jsonl", "--max_questions", "7"]
    [arguments] = TrlParser(QuestionArguments).parse_args_and_config(command_line)
    assert arguments.datasets == [QuestionSource(path="a.jsonl"), QuestionSource(path="b.jsonl")]
    assert (arguments.max_questions, arguments.subset_seed) == (7, 3)


@pytest.mark.parametrize("value", ["datasets: one.jsonl", "datasets: {path: one.jsonl}", "datasets: [one.jsonl]"])
def test_a_lone_entry_in_a_recipe(tmp_path, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(value)
    [arguments] = TrlParser(QuestionArguments).parse_args_and_config(["--config", str(recipe)])
    assert arguments.datasets == [QuestionSource(path="one.jsonl")]


def test_an_unknown_key_in_a_recipe_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("datasets: [{path: x, colunm: y}]")
    with pytest.raises(QuestionError, match="colunm"):
        TrlParser(QuestionArguments).parse_args_and_config(["--config", str(recipe)])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real questions are not at ../shared/data")
def test_real_sets_mix():
    dataset = _load(
        str(REAL_DATA / "hotpotqa_sample" / "qa.jsonl"),
        str(REAL_DATA / "bamboogle" / "qa.jsonl"),
        {"path": str(REAL_DATA / "hotpotqa_dev" / "qa.jsonl"), "max_questions": 50},
    )
    assert len(dataset) == 100 + 125 + 50 and len(set(dataset["id"])) == 275
    assert dataset[0] == {
        "id": "5a77ec115542992a6e59dff7",
        "question": "If Gallu is a demon Lilu is what?",
        "golden_answers": ["a spirit"],
        "source": "hotpotqa_sample/qa",
    }
