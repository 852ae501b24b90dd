"""Benchmarks: what loads, what is refused and how it says so, and which questions a subset holds."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from pathlib import Path

import pytest
import yaml

from rex_rag.data.question_rows import QuestionError
from rex_rag.evaluation.benchmarks import (
    FLASHRAG_SETS,
    BenchmarkSource,
    benchmark_specs,
    load_benchmark,
    subset,
)

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real questions are not at ../shared/data")

ROWS = [
    {"id": "x", "question": " Who wrote Emma? ", "golden_answers": ["Jane Austen", "Austen"]},
    {"id": 7, "question": "When?", "golden_answers": 1815, "metadata": {"hops": 2, "context": {"docs": ["long"]}}},
    {"question": "Is it a novel?", "golden_answers": ["yes", " "]},
]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_seven_sets_are_those_of_the_paper():
    assert sum(size for _, size in FLASHRAG_SETS.values()) == 51_713
    assert {name for name, (split, _) in FLASHRAG_SETS.items() if split == "dev"} == {
        "hotpotqa",
        "2wikimultihopqa",
        "musique",
    }


def test_every_row_is_kept_in_order(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        benchmark = load_benchmark(write(tmp_path / "novels.jsonl", ROWS))
    assert (benchmark.name, benchmark.kind, benchmark.size, len(benchmark)) == ("novels", "open", 3, 3)
    assert [question.id for question in benchmark.questions] == ["x", "7", "2"]
    assert [question.question for question in benchmark.questions] == ["Who wrote Emma?", "When?", "Is it a novel?"]
    assert [question.golden_answers for question in benchmark.questions] == [
        ("Jane Austen", "Austen"),
        ("1815",),
        ("yes",),
    ]
    assert [question.metadata for question in benchmark.questions] == [{}, {"hops": 2}, {}]
    assert "1 blank gold answers stand beside others" in caplog.text


def test_cells_of_csv_are_text_as_they_stand_there(tmp_path):
    path = tmp_path / "codes.csv"
    path.write_text('id,question,a,A,B,C\n007,"Which, if any?",B,None,1.50,\n')
    source = {"path": str(path), "kind": "multiple_choice", "answers_column": "a", "choices_column": ["A", "B", "C"]}
    [question] = load_benchmark(source).questions
    assert (question.id, question.question) == ("007", "Which, if any?")
    assert question.choices == {"A": "None", "B": "1.50"}


def test_a_file_that_is_called_qa_or_test_is_named_after_its_folder(tmp_path):
    assert load_benchmark(write(tmp_path / "novels" / "qa.jsonl", ROWS)).name == "novels"
    assert load_benchmark(write(tmp_path / "plays" / "test.jsonl", ROWS)).name == "plays"


def test_the_hash_is_of_the_canonical_questions_alone(tmp_path):
    path = write(tmp_path / "one.jsonl", [{"id": "a", "question": "Wer? \u00fc", "golden_answers": ["b"]}])
    canonical = '["a","Wer? \u00fc",["b"],null]\n'
    assert load_benchmark(path).sha256 == hashlib.sha256(canonical.encode()).hexdigest()
    described = [{"id": "a", "question": "Wer? \u00fc", "golden_answers": ["b"], "metadata": {"level": "easy"}}]
    assert load_benchmark(write(tmp_path / "two.jsonl", described)).sha256 == load_benchmark(path).sha256
    other = [{"id": "a", "question": "Wer? \u00fc", "golden_answers": ["b", "c"]}]
    assert load_benchmark(write(tmp_path / "three.jsonl", other)).sha256 != load_benchmark(path).sha256


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "1", "question": "Who?"},
            r"line 2: there is no column 'golden_answers'; the columns are id, question",
        ),
        ({"question": "", "golden_answers": ["a"]}, r"line 2: the question is ''"),
        ({"question": 5, "golden_answers": ["a"]}, r"line 2: the question is 5"),
        ({"question": "Who?", "golden_answers": []}, r"line 2: the gold answers are \[\]"),
        ({"question": "Who?", "golden_answers": ["", None]}, r"line 2: the gold answers are \['', None\]"),
        ({"id": "x", "question": "Who?", "golden_answers": ["a"]}, r"line 2: the id 'x' already occurs at .*line 1"),
    ],
)
def test_a_row_that_cannot_be_used_fails_the_load_and_is_named(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", [ROWS[0], row])
    with pytest.raises(QuestionError, match=rf"bad\.jsonl, {message}"):
        load_benchmark(path)


def test_a_column_of_ids_that_was_named_must_be_there(tmp_path):
    path = write(tmp_path / "mine.jsonl", [ROWS[0] | {"key": "k"}, ROWS[1]])
    source = {"path": str(path), "id_column": "key"}
    assert [question.id for question in load_benchmark(source).questions] == ["k", "1"]
    with pytest.raises(QuestionError, match=r"mine\.jsonl: there is no column 'kee'; .*Set id_column"):
        load_benchmark(source | {"id_column": "kee"})


def test_metadata_is_what_json_can_hold(tmp_path):
    metadata = {"score": float("nan"), "level": float("inf"), "hops": 2, "share": 0.5}
    path = write(tmp_path / "mine.jsonl", [ROWS[0] | {"metadata": metadata}])
    assert load_benchmark(path).questions[0].metadata == {"hops": 2, "share": 0.5}


def test_a_set_of_another_size_than_its_name_claims_is_refused(tmp_path):
    rows = [{"question": f"Question {number}?", "golden_answers": ["a"]} for number in range(125)]
    whole = write(tmp_path / "whole.jsonl", rows)
    part = write(tmp_path / "part.jsonl", rows[:-1])
    assert len(load_benchmark(f"bamboogle={whole}")) == 125
    for spec, files in ((f"bamboogle={part}", None), ("bamboogle", {"bamboogle": part})):
        with pytest.raises(QuestionError, match=r"holds 124 questions, but bamboogle has 125"):
            load_benchmark(spec, files=files)
    with pytest.raises(QuestionError, match=r"holds 124 questions, but Bamboogle has 125"):
        load_benchmark(f"Bamboogle={part}")
    folder = write(tmp_path / "hotpotqa" / "dev.jsonl", rows)
    with pytest.raises(QuestionError, match=r"holds 125 questions, but hotpotqa has 7,405"):
        load_benchmark(folder)
    assert load_benchmark(f"bamboogle_part={part}").size == 124
    with pytest.raises(QuestionError, match=r"holds 124 questions, but mine has 125"):
        load_benchmark({"path": str(part), "name": "mine", "size": 125})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hotpot", r"no benchmark 'hotpot': it is neither one of nq, triviaqa, .*NAME=FILE"),
        ("some/where.jsonl", r"some/where\.jsonl: no such file"),
        ("nq=some/where.jsonl", r"some/where\.jsonl: no such file"),
        ("mine.yaml", r"mine\.yaml: no such description"),
        ({"name": "mine"}, r"no 'path'; the keys of a benchmark are path, name, kind"),
        ({"path": "a.jsonl", "colum": "x"}, r"unknown keys: 'colum'"),
        (
            {"path": "a.jsonl", "kindd": "open", 1: 2},
            r"'kindd' \(did you mean kind\?\), '1'; correct or remove them; the",
        ),
        ({"path": "a.jsonl", "kind": "essay"}, r"kind='essay'; it must be one of open, multiple_choice"),
        ({"path": "a.jsonl", "kind": "multiple_choice"}, r"needs it"),
        ({"path": "a.jsonl", "choices_column": "options"}, r"do not go together"),
        ({"path": "a.jsonl", "size": 0}, r"size=0"),
        ({"path": "a.jsonl", "answers_are": "words"}, r"use letter, index or text"),
        ({"path": "a.jsonl", "name": 2024}, r"name=2024; it must be a string"),
        (
            {"path": "a.jsonl", "kind": "multiple_choice", "choices_column": 5},
            r"choices_column=5; it must be a column",
        ),
        ({"path": "a.jsonl", "split": "test"}, r"a file has none of these"),
        ({"path": "someone/questions"}, r"a dataset of the Hub needs `split:`"),
        ({"path": "./nothing.txt"}, r"nothing\.txt: neither a \.jsonl"),
        ("../x/..=some.jsonl", r"cannot name a folder|no such file"),
        ("results.json=some.jsonl", r"could be that of a run's own file.*call it 'results'"),
        ("RUN.JSON=some.jsonl", r"could be that of a run's own file"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuestionError, match=message):
        load_benchmark(spec)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kind: essay", r"^\S+mine\.yaml: kind='essay'; it must be one of open, multiple_choice$"),
        ("answers_are: words", r"^\S+mine\.yaml: answers_are='words'"),
        ("qestion_column: q", r"^\S+mine\.yaml: unknown keys: 'qestion_column' \(did you mean question_column\?\)"),
    ],
)
def test_what_is_wrong_in_a_description_is_told_under_its_name(tmp_path, line, message):
    write(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "mine.yaml").write_text(f"path: data.jsonl\n{line}\n")
    with pytest.raises(QuestionError, match=message):
        load_benchmark(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("name", "near"),
    [("bambogle", "bamboogle"), ("Hotpot_QA", "hotpotqa"), ("triviqa", "triviaqa"), ("novels", None), ("nq2", None)],
)
def test_a_name_that_is_nearly_one_of_the_seven_gets_a_warning(tmp_path, caplog, name, near):
    loaded = load_benchmark(f"{name}={write(tmp_path / 'data.jsonl', ROWS)}")
    assert (loaded.name, len(loaded)) == (name, 3)
    said = [record.getMessage() for record in caplog.records if "the benchmark" in record.getMessage()]
    assert len(said) == (near is not None)
    assert near is None or said[0].startswith(f"the benchmark {name!r} is not {near}: it may have any size")


def test_a_set_that_cannot_be_fetched_names_the_way_out():
    # The tests run offline, and the seven sets are in nobody's cache under this revision.
    with pytest.raises(QuestionError, match=r"nq/test\.jsonl of RUC-NLPIR/FlashRAG_datasets .*nq=FILE\.jsonl"):
        load_benchmark("nq", revision="no-such-revision")


def test_a_set_of_the_hub_names_its_commit(tmp_path, monkeypatch):
    """The Hub's own client reads a cache laid out as it lays it out itself."""
    commit = "5eb464920f16249636739594a12691f4ad4295f7"
    cache = tmp_path / "datasets--RUC-NLPIR--FlashRAG_datasets"
    rows = [{"id": f"test_{n}", "question": f"Question {n}?", "golden_answers": ["a"]} for n in range(125)]
    write(cache / "snapshots" / commit / "bamboogle" / "test.jsonl", rows)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    benchmark = load_benchmark("bamboogle")
    assert (benchmark.name, len(benchmark)) == ("bamboogle", 125)
    assert benchmark.source == f"RUC-NLPIR/FlashRAG_datasets@{commit}/bamboogle/test.jsonl"
    write(cache / "snapshots" / commit / "bamboogle" / "test.jsonl", rows[1:])
    with pytest.raises(QuestionError, match="holds 124 questions, but bamboogle has 125"):
        load_benchmark("bamboogle", revision=commit)


def test_what_a_command_line_names_is_cut_at_commas():
    assert benchmark_specs("nq, popqa,") == ["nq", "popqa"]
    assert benchmark_specs(["nq,popqa", {"path": "a.jsonl"}, "x=y.jsonl"]) == [
        "nq",
        "popqa",
        {"path": "a.jsonl"},
        "x=y.jsonl",
    ]
    assert benchmark_specs(None) == []


MEDICAL = {"question": "Which thins blood?", "answer_idx": "b", "options": {"A": "Iron", "B": "Warfarin", "C": "Salt"}}


def test_multiple_choice_described_in_yaml(tmp_path):
    write(tmp_path / "data" / "medqa.jsonl", [MEDICAL])
    description = tmp_path / "medqa.yaml"
    description.write_text(
        "path: data/medqa.jsonl\nkind: multiple_choice\nanswers_column: answer_idx\nchoices_column: options\n"
    )
    benchmark = load_benchmark(description)
    [question] = benchmark.questions
    assert (benchmark.name, benchmark.kind) == ("medqa", "multiple_choice")
    assert question.golden_answers == ("B",)
    assert question.choices == {"A": "Iron", "B": "Warfarin", "C": "Salt"}


@pytest.mark.parametrize(
    ("row", "choices_column", "answers_are"),
    [
        ({"a": "B", "options": ["Iron", "Warfarin"]}, "options", "letter"),
        ({"a": 1, "options": ["Iron", "Warfarin"]}, "options", "index"),
        ({"a": "Warfarin", "options": ["Iron", "Warfarin"]}, "options", "text"),
        ({"a": "B", "options": {"label": ["A", "B"], "text": ["Iron", "Warfarin"]}}, "options", "letter"),
        ({"a": "B", "A": "Iron", "B": "Warfarin", "C": None}, ["A", "B", "C"], "letter"),
        ({"a": "b", "en_1": "Iron", "en_2": "Warfarin"}, {"A": "en_1", "B": "en_2"}, "letter"),
    ],
)
def test_the_layouts_of_choices(tmp_path, row, choices_column, answers_are):
    path = write(tmp_path / "mine.jsonl", [{"question": "Which?"} | row])
    source = BenchmarkSource(
        path=str(path),
        kind="multiple_choice",
        answers_column="a",
        choices_column=choices_column,
        answers_are=answers_are,
    )
    [question] = load_benchmark(source).questions
    assert question.golden_answers == ("B",)
    assert question.choices == {"A": "Iron", "B": "Warfarin"}


def test_a_choice_that_one_row_lacks_is_a_choice_less_and_a_column_that_all_lack_an_error(tmp_path):
    four = {"question": "Which?", "a": "C", "A": "x", "B": "y", "C": "z", "D": "w"}
    path = write(tmp_path / "mine.jsonl", [four, four | {"question": "Whose?", "a": "E", "E": "v"}])
    mapping = {"path": str(path), "kind": "multiple_choice", "answers_column": "a"}
    first, second = load_benchmark(mapping | {"choices_column": ["A", "B", "C", "D", "E"]}).questions
    assert (first.golden_answers, list(first.choices)) == (("C",), ["A", "B", "C", "D"])
    assert (second.golden_answers, second.choices["E"]) == (("E",), "v")
    with pytest.raises(QuestionError, match=r"there is no column 'F'; the columns are .*, D, E\. Set choices_column"):
        load_benchmark(mapping | {"choices_column": ["A", "B", "C", "D", "E", "F"]})


ANAESTHESIA = {"id": "91b5", "question": "Which thins blood?", "A": "Iron", "B": "Warfarin", "choice_num": 2}
MEDICAL_SETS = {
    # Rows in the shape that the sets' own pages show.
    "anesbench_en": ANAESTHESIA | {"target": "B"} | dict.fromkeys("CDEFGHI"),
    "medqa": {"answer": "Warfarin", "meta_info": "step1", "metamap_phrases": ["blood"]} | MEDICAL,
}


@pytest.mark.parametrize("name", MEDICAL_SETS)
def test_the_descriptions_that_come_along_fit_the_sets_they_describe(tmp_path, name):
    description = Path(__file__).parents[2] / "recipes" / "evaluation" / "benchmarks" / f"{name}.yaml"
    mapping = yaml.safe_load(description.read_text(encoding="utf-8"))
    hub = {key: mapping.pop(key) for key in ("path", "split", "size", "config") if key in mapping}
    assert hub["split"] == "test" and hub["size"] in (4343, 1273) and hub["path"].count("/") == 1
    path = write(tmp_path / "rows.jsonl", [MEDICAL_SETS[name]])
    [question] = load_benchmark(mapping | {"path": str(path)}).questions
    assert question.golden_answers == ("B",)
    assert question.choices["B"] == "Warfarin"
    with pytest.raises(QuestionError, match=rf"holds 1 questions, but {name} has {hub['size']:,}"):
        load_benchmark(mapping | {"path": str(path), "size": hub["size"]})


def test_the_description_of_frames_fits_its_rows(tmp_path):
    mapping = yaml.safe_load(Path("recipes/evaluation/benchmarks/frames.yaml").read_text(encoding="utf-8"))
    assert (mapping["path"], mapping.pop("split"), mapping.pop("size")) == ("google/frames-benchmark", "test", 824)
    row = {"Prompt": "Who came first?", "Answer": "Jane Ballou", "reasoning_types": "x", "wiki_links": "['a', 'b']"}
    path = write(tmp_path / "rows.jsonl", [row, row | {"Answer": 506000}])
    first, second = load_benchmark(mapping | {"path": str(path)}).questions
    assert (first.question, first.golden_answers, second.golden_answers) == (
        "Who came first?",
        ("Jane Ballou",),
        ("506000",),
    )


@pytest.mark.parametrize(
    ("row", "answers_are", "message"),
    [
        ({"a": "D", "options": ["x", "y"]}, "letter", r"'D', read as letter, is none of the choices"),
        ({"a": "2", "options": ["x", "y"]}, "index", r"'2', read as index, is none"),
        ({"a": "z", "options": ["x", "y"]}, "text", r"'z', read as text, is none"),
        ({"a": "x", "options": ["x", "x"]}, "text", r"'x', read as text, is none"),
        ({"a": "A", "options": ["x"]}, "letter", r"at least two are needed"),
        ({"a": "A", "options": ["x", " "]}, "letter", r"with a text"),
        ({"a": "A", "options": {"A": "x", "BB": "y"}}, "letter", r"under a letter from A to Z"),
        ({"a": "A", "options": {"A": "x", "a": "y", "B": "z"}}, "letter", r"of its own"),
        ({"a": "A", "options": {"label": ["A", "A", "B"], "text": ["x", "y", "z"]}}, "letter", r"of its own"),
        ({"a": "A", "options": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}, "letter", "is a dict"),
        ({"a": "A", "options": [float("nan"), 2]}, "letter", "the choice nan is a float"),
        ({"a": "A", "options": {"label": ["A", "B"], "text": ["x"]}}, "letter", r"give a list or a mapping"),
        ({"a": "A", "options": "x, y"}, "letter", r"give a list or a mapping"),
    ],
)
def test_choices_that_cannot_be_used_are_named(tmp_path, row, answers_are, message):
    path = write(tmp_path / "mine.jsonl", [{"question": "Which?"} | row])
    mapping = {"path": str(path), "kind": "multiple_choice", "answers_column": "a", "choices_column": "options"}
    with pytest.raises(QuestionError, match=rf"line 1: .*{message}"):
        load_benchmark(mapping | {"answers_are": answers_are})


def numbered(tmp_path: Path, count: int, name: str = "numbered"):
    rows = [{"question": f"Question {number}?", "golden_answers": ["a"]} for number in range(count)]
    return load_benchmark(write(tmp_path / f"{name}.jsonl", rows))


def texts(benchmark) -> set[str]:
    return {question.question for question in benchmark.questions}


def test_a_subset_holds_the_smallest_hashes_in_the_order_of_the_set(tmp_path):
    benchmark = numbered(tmp_path, 6)
    first_bytes = [hashlib.sha256(f"1\nQuestion {number}?".encode()).hexdigest()[:4] for number in range(6)]
    assert first_bytes == ["1e6e", "5195", "f15d", "2b7a", "31ed", "65d7"]
    chosen = subset(benchmark, 3, seed=1)
    assert [question.id for question in chosen.questions] == ["0", "3", "4"]
    assert (chosen.size, len(chosen)) == (6, 3)
    assert chosen.subset == "3 of 6 questions, seed 1, smallest SHA-256 of seed and question"
    assert chosen.sha256 != benchmark.sha256
    assert chosen.as_row()["questions"] == 3


def test_subsets_are_nested_differ_by_seed_and_do_not_hang_on_ids_or_order(tmp_path):
    benchmark = numbered(tmp_path, 200)
    small, large = texts(subset(benchmark, 20, seed=3)), texts(subset(benchmark, 50, seed=3))
    assert small < large
    assert small != texts(subset(benchmark, 20, seed=4))
    rows = [
        {"id": f"other-{question.id}", "question": question.question, "golden_answers": ["a"]}
        for question in reversed(benchmark.questions)
    ]
    other = load_benchmark(write(tmp_path / "other.jsonl", rows))
    assert texts(subset(other, 20, seed=3)) == small


def test_a_subset_of_everything_is_the_set_and_nonsense_is_refused(tmp_path):
    benchmark = numbered(tmp_path, 5)
    assert subset(benchmark, 5) is benchmark
    assert subset(benchmark, 500) is benchmark
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(QuestionError, match="ask for at least 1"):
            subset(benchmark, wrong)
    with pytest.raises(QuestionError, match="is a subset already"):
        subset(subset(benchmark, 2), 1)


@needs_real_data
def test_the_real_sets_load_whole_and_their_hashes_are_known():
    bamboogle = load_benchmark(f"bamboogle={REAL_DATA}/bamboogle/qa.jsonl")
    hotpotqa = load_benchmark("hotpotqa", files={"hotpotqa": REAL_DATA / "hotpotqa_dev" / "qa.jsonl"})
    assert (len(bamboogle), len(hotpotqa)) == (125, 7_405)
    assert bamboogle.sha256.startswith("d0b535321869")
    assert hotpotqa.sha256.startswith("1ff1526c3145")
    published = subset(hotpotqa, 500)
    assert len(published) == 500
    assert published.sha256.startswith("dd3467d513f8")


def obfuscated(text: str, canary: str) -> str:
    """As the authors of BrowseComp-Plus document it: base64 of the text xor the repeated SHA-256 of the canary."""
    key = hashlib.sha256(canary.encode()).digest()
    data = text.encode()
    return base64.b64encode(bytes(byte ^ key[place % 32] for place, byte in enumerate(data))).decode()


CANARY = "canary of a test"
HIDDEN = {
    "query_id": "17",
    "query": obfuscated("Which town, of all those that lie beside Lake Mjøsa?", CANARY),
    "answer": obfuscated("Hamar", CANARY),
    "evidence_docs": [
        {"docid": obfuscated(docid, CANARY), "text": obfuscated("long", CANARY)} for docid in ("5", "8", "5")
    ],
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_obfuscated_set_with_gold_documents(tmp_path, suffix):
    from datasets import Dataset

    described = yaml.safe_load(Path("recipes/evaluation/benchmarks/browsecomp_plus.yaml").read_text(encoding="utf-8"))
    path = tmp_path / f"hidden.{suffix}"
    write(path, [HIDDEN]) if suffix == "jsonl" else Dataset.from_list([HIDDEN]).to_parquet(path)
    source = {**described, "path": str(path), "canary": CANARY, "size": 1}
    del source["split"]
    [question] = load_benchmark(source).questions
    assert (question.id, question.question) == ("17", "Which town, of all those that lie beside Lake Mjøsa?")
    assert (question.golden_answers, question.documents) == (("Hamar",), ("5", "8"))
    with pytest.raises(QuestionError, match=r"row 1|line 1.* not obfuscated with the canary 'another'"):
        load_benchmark({**source, "canary": "another"})
    plain = write(tmp_path / "plain.jsonl", [{**HIDDEN, "query": "In the plain?"}])
    with pytest.raises(QuestionError, match=r"'In the plain\?' was not obfuscated"):
        load_benchmark({**source, "path": str(plain)})


@pytest.mark.parametrize(("held", "said"), [(None, "None"), ([], r"\[\]"), ("5", "'5'"), ([{"url": "u"}], "url")])
def test_a_row_without_gold_documents_is_refused_where_they_are_asked_for(tmp_path, held, said):
    rows = [ROWS[0] | {"docs": ["d"]}, {"id": "y", "question": "Who?", "golden_answers": ["a"], "docs": held}]
    source = {"path": str(write(tmp_path / "mine.jsonl", rows)), "documents_column": "docs"}
    with pytest.raises(QuestionError, match=rf"line 2: the gold documents are .*{said}"):
        load_benchmark(source)
    with pytest.raises(QuestionError, match=r"no column 'doc'.*Set documents_column"):
        load_benchmark(source | {"documents_column": "doc"})


def test_whole_documents_in_other_columns_of_a_dataset_are_not_read(tmp_path):
    from datasets import Dataset

    Dataset.from_list([ROWS[0] | {"metadata": {"hops": 2}, "negatives": ["long"]}]).save_to_disk(tmp_path / "kept")
    source = BenchmarkSource(path=str(tmp_path / "kept"), split="test", name="kept")
    assert [source.columns.are_read(name) for name in ("metadata", "negatives")] == [True, False]
    assert load_benchmark(source).questions[0].metadata == {"hops": 2}
