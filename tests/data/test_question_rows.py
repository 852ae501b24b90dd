"""Question files are read alike for training and evaluation: the right text, or an error with file and row."""

from __future__ import annotations

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from rex_rag.data.qa import QuestionArguments, QuestionSource, load_questions
from rex_rag.data.question_rows import Columns, QuestionError, read_answers, read_row
from rex_rag.evaluation.benchmarks import load_benchmark

LISTS = [
    '["politician", "political leader"]',
    "['Arlen', 'City of Arlen']",
    "('a', 'b')",
    "{'a', 'b'}",
    "['a', None]",
    "['a', nan]",
    "['a' 'b']",
    "array(['a', 'b'], dtype=object)",
    "[1999, 2000]",
    "[1999 2000]",
    "[]",
    " [null]\n",
    '{"text": ["a"], "answer_start": [3]}',
    "{'text': ['a']}",
    "[\u2018a\u2019, \u2018b\u2019]",
    "[\u201ca\u201d]",
    "[Oslo, Kristiania]",
    "[nan]",
]


def train(path, **keys) -> list[tuple]:
    rows = load_questions(QuestionArguments(datasets=[{"path": str(path), **keys}]))
    return [(row["question"], row["golden_answers"]) for row in rows]


def evaluate(path, **keys) -> list[tuple]:
    rows = load_benchmark({"path": str(path), **keys}).questions
    return [(row.question, list(row.golden_answers)) for row in rows]


@pytest.fixture(params=[train, evaluate])
def read(request):
    return request.param


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("Oslo", ["Oslo"]),
        (["Oslo", " Christiania\n"], ["Oslo", "Christiania"]),
        (("Oslo",), ["Oslo"]),
        (1999, ["1999"]),
        (1999.0, ["1999"]),
        ([42.0, 3.5], ["42", "3.5"]),
        (1e20, ["100000000000000000000"]),
        (1e-7, ["0.0000001"]),
        (100.0, ["100"]),
        (-0.5, ["-0.5"]),
        (-0.0, ["0"]),
        (Decimal("-0.00"), ["0"]),
        (1073741824.0, ["1073741824"]),
        (1234.5678, ["1234.5678"]),
        (np.float32(3.1), ["3.1"]),
        (np.array([3.1, 1e-7], dtype=np.float32), ["3.1", "0.0000001"]),
        (Decimal("1999.00"), ["1999"]),
        (Decimal("1E+2"), ["100"]),
        (np.float64(1999), ["1999"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (np.array([1999.0]), ["1999"]),
        (pandas.Series(["a"]), ["a"]),
        ("\ufeffOslo ", ["Oslo"]),
        (["", None, "Oslo"], ["Oslo"]),
        (None, []),
        ([], []),
        ("[Rec]", ["[Rec]"]),
        ("(500) Days of Summer", ["(500) Days of Summer"]),
        ('("Heroes")', ['("Heroes")']),
        ("{x}", ["{x}"]),
        ("1, 2", ["1, 2"]),
        (["['a']"], ["['a']"]),  # what looks like a list may be an answer if it stands in one
        ("None", ["None"]),
    ],
)
def test_what_gold_answers_are(value, answers):
    assert read_answers(value, "here")[0] == answers


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((text, "is a list written as text") for text in LISTS),
        (True, "True is a bool; write yes or no"),
        (np.bool_(True), "True is a bool"),
        (float("nan"), "nan is a float"),
        ([float("inf")], "inf is a float"),
        (Decimal("NaN"), "is a Decimal"),
        ([["a"]], r"\['a'\] is a list"),
        (np.array([["a"]]), "is a list"),
        ({"a"}, "is a set"),
        ({"value": "a", "aliases": ["b"]}, "is a dict; name the column"),
        (b"Oslo", "is a bytes; decode"),
        (datetime.date(1999, 1, 1), "is a date; write it as text"),
        (datetime.datetime(1999, 1, 1), "is a datetime; write it as text"),
        (pandas.Timestamp("1999-01-01"), "is a Timestamp; write it as text"),
        (pandas.NaT, "write it as text"),
        ("Os\ud800lo", "holds half a surrogate pair"),
        (["Os\0lo"], "holds a NUL character"),
    ],
)
def test_what_gold_answers_are_not(value, reason):
    with pytest.raises(QuestionError, match=rf"^here: .*{reason}"):
        read_answers(value, "here")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Who?", "golden_answers": LISTS[0]}, "is a list written as text"),
        ({"question": "Who?", "golden_answers": [float("nan")]}, "nan is a float"),
        ({"question": "Who?", "golden_answers": ["\ud800"]}, "half a surrogate pair"),
        ({"question": "Who \ud800?", "golden_answers": ["a"]}, "half a surrogate pair"),
        ({"question": 5, "golden_answers": ["a"]}, "the question is 5; it must be a string"),
        ({"question": ["Who?"], "golden_answers": ["a"]}, r"the question is \['Who\?'\]"),
        ({"id": ["x"], "question": "Who?", "golden_answers": ["a"]}, r"the id \['x'\] is a list"),
        ({"id": True, "question": "Who?", "golden_answers": ["a"]}, "the id True is a bool"),
        ({"id": float("nan"), "question": "Who?", "golden_answers": ["a"]}, "the id nan is a float"),
        ({"question": "Who?", "golden_answers": "a", "answer_aliases": ["b"]}, r"\[golden_answers, answer_aliases\]"),
        (["Who?"], "a JSON object is needed, found list"),
    ],
)
def test_a_value_that_cannot_be_read_is_an_error_with_file_and_line(tmp_path, read, row, reason):
    path = write(tmp_path / "qa.jsonl", {"question": "Who?", "golden_answers": ["a"]}, row)
    with pytest.raises(QuestionError, match=rf"qa\.jsonl, line 2: .*{reason}"):
        read(path)


def test_the_same_rows_from_every_kind_of_file(tmp_path, read):
    rows = [
        {"question": "When?", "golden_answers": ["1999"], "metadata": {"n": 1}},
        {"question": "Who?", "golden_answers": ["Ann", "Bo"], "metadata": {"n": 2}},
    ]
    lines = write(tmp_path / "qa.jsonl", *rows)
    (tmp_path / "lines.json").write_bytes(lines.read_bytes())
    (tmp_path / "qa.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "qa.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    marked = [b"\xef\xbb\xbf" + line + b"\r\n" for line in lines.read_bytes().splitlines()]
    (tmp_path / "marked.jsonl").write_bytes(b"".join(marked))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "qa.parquet")
    pandas.DataFrame(rows).to_json(tmp_path / "records.json", orient="records")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    expected = [("When?", ["1999"]), ("Who?", ["Ann", "Bo"])]
    for name in ("qa.jsonl", "lines.json", "qa.json", "qa.jsonl.gz", "marked.jsonl", "qa.parquet", "records.json"):
        assert read(tmp_path / name) == expected, name
    assert read(tmp_path / "saved", split="train") == expected


def test_cells_of_csv_are_text_and_an_empty_one_is_none(tmp_path, read):
    path = tmp_path / "qa.csv"
    path.write_bytes('\ufeffid,question,golden_answers\r\n007,"Which, if any?",1.50\r\n'.encode())
    assert read(path) == [("Which, if any?", ["1.50"])]


def test_a_column_with_a_gap_keeps_its_years(tmp_path, read):
    frame = pandas.DataFrame({"question": ["When?", "Then?"], "golden_answers": [1999, 2001], "year": [1, None]})
    frame["golden_answers"] = frame["golden_answers"].astype(float)
    frame.to_json(tmp_path / "qa.json", orient="records")
    frame.to_parquet(tmp_path / "qa.parquet")
    for name in ("qa.json", "qa.parquet"):
        assert read(tmp_path / name) == [("When?", ["1999"]), ("Then?", ["2001"])], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qa.jsonl", "", r"qa\.jsonl: the file is empty"),
        ("qa.json", "[]", r"qa\.json: there is no question in it"),
        ("qa.jsonl", '{"question": "q", "golden_answers": "a"}\n{"question"', "line 2: broken JSON"),
        ("qa.jsonl", '[\n{"question": "q"}\n]', "line 1: broken JSON .*this is a JSON array: write one object a line"),
        ("qa.json", "[{]", r"qa\.json: broken JSON"),
        ("qa.json", '[{"question": "q"}, 3]', "row 2: an object is needed, found 3"),
        ("qa.json", '[["q", "a"]]', "row 1: an object is needed"),
        ("qa.jsonl", '{"question": "q", "question": "r", "golden_answers": "a"}', "'question' stands there twice"),
        ("qa.json", '{"version": "1", "data": [{"question": "q"}]}', "keys version, data; the rows are under 'data'"),
        ("qa.json", '{\n"data": [\n{"question": "q"}]}', "the rows are under 'data': save that list"),
        ("qa.jsonl", '{"data": [{"question": "q"}]}', "the rows are under 'data'"),
        ("qa.json", '{"question": {"0": "q"}, "golden_answers": {"0": ["a"]}}', r"to_json\(orient=\"records\"\)"),
        ("qa.json", '{"0": {"question": "q", "golden_answers": ["a"]}}', "rows by name"),
        ("qa.json", '{"columns": ["question"], "index": [0], "data": [["q"]]}', r"to_json\(orient=\"records\"\)"),
        ("qa.json", '{"question": ["q"], "golden_answers": [["a"]]}', "one JSON object of columns"),
        ("qa.parquet", "PAR1", r"qa\.parquet: not a readable parquet file"),
        ("qa.csv", "id,question,golden_answers\n1,Who?,Jane,Austen\n", "line 2: the row has not 3 cells"),
        ("qa.csv", "question,golden_answers,question\nWho?,Ann,Why?\n", "a column's name stands there twice"),
        ("qa.csv", "id,question,golden_answers\n", "there is no question in it"),
        ("qa.csv", "question,golden_answers\nWho?,Andr\xe9\n", "not readable CSV in UTF-8"),
        ("qa.jsonl", '{"question": "Andr\xe9?"}', "line 1: not UTF-8"),
        ("qa.txt", "question", r"neither a \.jsonl, .* nor a folder nor a dataset's name"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_for_what_it_is(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(QuestionError, match=message):
        read(tmp_path / name, **({"split": "train"} if name == "qa.txt" else {}))


def test_dates_of_parquet_are_refused_and_named(tmp_path, read):
    rows = [{"question": "When?", "golden_answers": [datetime.date(1999, 1, 1)]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "qa.parquet")
    with pytest.raises(QuestionError, match=r"qa\.parquet, row 1: the gold answer .* is a date; write it as text"):
        read(tmp_path / "qa.parquet")


def test_aliases_in_a_second_column_are_read_if_it_is_named(tmp_path, read):
    path = write(
        tmp_path / "qa.jsonl",
        {"question": "Where?", "answer": "Oslo", "answer_aliases": ["Christiania", "Kristiania"], "s_aliases": ["x"]},
        {"question": "Who?", "answer": "Ann", "answer_aliases": []},
    )
    with pytest.raises(QuestionError, match=r"line 1: the column 'answer_aliases' holds more gold answers"):
        read(path, answers_column="answer")
    both = read(path, answers_column=["answer", "answer_aliases"])
    assert both == [("Where?", ["Oslo", "Christiania", "Kristiania"]), ("Who?", ["Ann"])]
    assert read(path, answers_column=["answer"]) == [("Where?", ["Oslo"]), ("Who?", ["Ann"])]
    path.write_text(path.read_text().replace('["Christiania", "Kristiania"]', '"[]"'))
    assert read(path, answers_column="answer") == [("Where?", ["Oslo"]), ("Who?", ["Ann"])]
    for none in ("NaN", '[""]', "[null]", "{}", '["Oslo"]', '"Oslo"'):
        path.write_text(f'{{"question": "Where?", "answer": "Oslo", "answer_aliases": {none}}}\n')
        assert read(path, answers_column="answer") == [("Where?", ["Oslo"])], none
    write(path, {"question": "Where?", "answer": "Oslo", "Answer Aliases": ["Christiania"]})
    with pytest.raises(QuestionError, match="the column 'Answer Aliases' holds more"):
        read(path, answers_column="answer")
    with pytest.raises(QuestionError, match=r"no column 'answer_alias'; .*Set answers_column"):
        read(path, answers_column=["answer", "answer_alias"])


def test_aliases_in_a_folder_are_seen_though_other_columns_are_not_decoded(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", {"question": "Where?", "answer": "Oslo", "o_aliases": ["Christiania"]})
    with pytest.raises(QuestionError, match=r"row 1: the column 'o_aliases' holds more gold answers"):
        load_questions(QuestionArguments(datasets=[QuestionSource(str(tmp_path / "set"), answers_column="answer")]))


@pytest.mark.parametrize(
    ("value", "identity"), [(1.0, "1"), (7, "7"), (" x ", "x"), (" ", None), ("", None), (None, None), ("007", "007")]
)
def test_ids(value, identity):
    row = {"id": value, "question": "Who?", "golden_answers": ["a"]}
    assert read_row(row, Columns(), "here").id == identity


def test_what_is_absent_is_dropped_in_training_and_an_error_in_evaluation(tmp_path):
    path = write(
        tmp_path / "qa.jsonl",
        {"question": "Who?", "golden_answers": ["a"]},
        {"question": "When?", "golden_answers": []},
        {"question": None, "golden_answers": ["a"]},
    )
    assert train(path) == [("Who?", ["a"])]
    with pytest.raises(QuestionError, match=r"line 2: the gold answers are \[\]"):
        evaluate(path)
