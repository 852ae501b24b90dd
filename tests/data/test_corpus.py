"""Corpus files: both layouts, every refusal with file and line, ids over several files, atomic writing."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rex_rag.data.corpus import (
    CorpusError,
    iter_corpus,
    passage_from_row,
    read_corpus,
    row_of_passage,
    split_contents,
    write_corpus,
)
from rex_rag.types import Passage

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def _write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_layouts_in_one_file(tmp_path):
    path = _write(
        tmp_path / "c.jsonl",
        '{"id": "a", "contents": "\\"Oslo\\"\\nCapital of Norway.\\nOn a fjord."}',
        "",
        '{"id": 7, "title": "Rome", "text": "Capital of Italy."}',
        '{"title": "", "text": "No title, no id."}',
        '{"id": null, "contents": "Plain\\ntitle line"}',
        '{"contents": "one line only"}',
    )
    assert read_corpus(path) == [
        Passage("a", "Oslo", "Capital of Norway.\nOn a fjord."),
        Passage("7", "Rome", "Capital of Italy."),
        Passage("4", "", "No title, no id."),
        Passage("5", "Plain", "title line"),
        Passage("6", "", "one line only"),
    ]


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Oslo"\ntext', "Oslo", "text"),
        ("Oslo\ntext", "Oslo", "text"),
        ('"He said ""Hi"""\ntext', 'He said ""Hi""', "text"),
        ('""A""\ntext', '"A"', "text"),
        ('""\ntext', "", "text"),
        ('"\ntext', '"', "text"),
        ('"Oslo"\n', "Oslo", ""),
        ('"Oslo"\r\ntext', "Oslo", "text"),
        ("Oslo is a city.", "", "Oslo is a city."),
        ("Oslo is a city.\n", "", "Oslo is a city."),
        ("Oslo is a city.\r\n", "", "Oslo is a city."),
        ("\nOslo is a city.\n\n ", "", "Oslo is a city.\n\n "),
        ('"To be" is Hamlet\'s line.', "", '"To be" is Hamlet\'s line.'),
        ('"To be" is from "Hamlet"', "", '"To be" is from "Hamlet"'),
        ('"To be" is from "Hamlet"\n', "", '"To be" is from "Hamlet"'),
        ('"To be" is from "Hamlet"\nand more', '"To be" is from "Hamlet"', "and more"),
        ('"To be, or not to be."', "", '"To be, or not to be."'),
        ('"12" single"\ntext', '12" single', "text"),
        ('""Weird Al" Yankovic"\ntext', '"Weird Al" Yankovic', "text"),
    ],
)
def test_contents_are_split_at_the_first_line(contents, title, text):
    assert split_contents(contents) == (title, text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "x", "contents": ', "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ('["id", "contents"]', "a JSON object is needed, found list"),
        ('"text"', "a JSON object is needed, found str"),
        ('[{"id": "x", "contents": "t"}]', "this is a JSON array: write one object a line"),
        ('{"id": "x"}', r"missing fields, neither 'contents' nor 'text' among \['id'\]"),
        ('{"id": "x", "title": "T"}', "missing fields"),
        ('{"pid": "x", "passage": "T"}', r"missing fields, .* among \['passage', 'pid'\]"),
        ('{"id": "x", "title": "T", "text": null}', r"missing fields, .* among \['id', 'title'\]"),
        ('{"id": "x", "title": "T", "text": " \\n"}', "empty text"),
        ('{"id": "x", "contents": "\\"T\\"\\n "}', "empty text"),
        ('{"id": "x", "contents": "\\"T\\"\\n"}', "empty text"),
        ('{"id": "x", "contents": 3}', "field 'contents' must be a string, found int 3"),
        ('{"id": "x", "title": ["T"], "text": "t"}', "field 'title' must be a string"),
        ('{"id": "x", "title": "T", "text": "\\ud800"}', "half a surrogate pair"),
        ('{"id": true, "title": "T", "text": "t"}', "field 'id' must be"),
        ('{"id": 1.5, "title": "T", "text": "t"}', "field 'id' must be"),
        ('{"id": " ", "title": "T", "text": "t"}', "field 'id' is blank"),
        ('{"id": "\\ud800", "title": "T", "text": "t"}', "field 'id' holds half a surrogate pair"),
        ('{"id": 1, "title": "T", "text": "t"}', "the id '1' already occurs on line 1"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    path = _write(tmp_path / "c.jsonl", '{"id": "1", "title": "T", "text": "t"}', "", line)
    with pytest.raises(CorpusError, match=rf"c\.jsonl, line 3: .*{reason}"):
        read_corpus([path])


@pytest.mark.parametrize(
    ("row", "passage"),
    [
        ({"id": "1", "text": "t"}, ("1", "", "t")),
        ({"id": "1", "title": None, "text": "t"}, ("1", "", "t")),
        ({"id": "1", "title": 1984.0, "text": "t"}, ("1", "1984", "t")),
        ({"_id": "MED-10", "title": "T", "text": "t", "metadata": {}}, ("MED-10", "T", "t")),  # BEIR
        ({"docid": "12#0", "title": "T", "text": "t"}, ("12#0", "T", "t")),  # Tevatron
        ({"pid": "p", "docid": "d", "text": "t"}, ("p", "", "t")),  # MS MARCO: the document's stands beside
        ({"id": 7, "doc_id": "d", "title": "T", "contents": "T\nt"}, ("7", "T", "t")),  # FlashRAG's chunks
        ({"id": None, "passage_id": 7.0, "text": "t"}, ("7", "", "t")),
        ({"id": "1", "title": "T", "contents": "t"}, ("1", "T", "t")),
        ({"id": "1", "title": "T", "contents": "t\nu"}, ("1", "T", "t\nu")),
        ({"id": "1", "title": "T", "contents": '"T"\nt'}, ("1", "T", "t")),
        ({"id": "1", "title": '"T"', "contents": "T\nt"}, ("1", '"T"', "t")),
        ({"id": "1", "title": "T", "contents": "T\n"}, ("1", "T", "T\n")),
        ({"id": "1", "title": "", "contents": "T\nt"}, ("1", "T", "t")),
        ({"id": "1", "title": "T", "contents": None, "text": "t"}, ("1", "T", "t")),
    ],
)
def test_the_layouts_of_others(row, passage):
    assert passage_from_row(row, default_id="-") == Passage(*passage)


def test_rows_without_an_id_are_numbered_with_a_warning_if_another_field_may_be_one(tmp_path, caplog):
    _write(tmp_path / "named.jsonl", '{"uid": "x", "text": "t"}', '{"uid": "y", "text": "u"}')
    assert [passage.id for passage in read_corpus(tmp_path / "named.jsonl")] == ["1", "2"]
    [said] = [record.getMessage() for record in caplog.records]
    assert "numbered by line" in said and "(uid)" in said
    caplog.clear()
    read_corpus(_write(tmp_path / "plain.jsonl", '{"text": "t"}'))
    assert not caplog.records


def test_a_title_under_another_name_is_told(tmp_path, caplog):
    read_corpus(_write(tmp_path / "kilt.jsonl", *['{"wikipedia_title": "T", "text": "t"}'] * 2))
    assert "'wikipedia_title' is not read" in caplog.text and caplog.text.count("not read") == 1
    caplog.clear()
    read_corpus(_write(tmp_path / "both.jsonl", '{"id": 1, "title": "T", "subtitle": "S", "text": "t"}'))
    assert not caplog.records


def test_a_table_is_named_before_anything_is_read(tmp_path):
    for name in ("psgs_w100.tsv", "psgs_w100.tsv.gz", "corpus.parquet"):
        with pytest.raises(CorpusError, match=rf"{name}: a corpus is JSON lines"):
            read_corpus(tmp_path / name)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"title": "T", "text": "t"}\n{"title": "T", "text": "\xe9"}\n')
    with pytest.raises(CorpusError, match=r"c\.jsonl, line 2: not UTF-8 .*byte 24"):
        read_corpus([path])


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"title": "T", "text": "t"}\r\n{"title": "U", "text": "u"}\r\n')
    assert [passage.text for passage in read_corpus(path)] == ["t", "u"]


def test_a_line_separator_inside_a_text_does_not_split_the_row(tmp_path):
    path = _write(tmp_path / "c.jsonl", '{"title": "T", "text": "one\u2028two\x85three"}')
    assert read_corpus(path)[0].text == "one\u2028two\x85three"


def test_missing_empty_and_folder(tmp_path):
    with pytest.raises(CorpusError, match=r"absent\.jsonl: no such file"):
        read_corpus(tmp_path / "absent.jsonl")
    with pytest.raises(CorpusError, match="this is a folder"):
        read_corpus(tmp_path)
    for content in ("", "\n \n"):
        path = tmp_path / "empty.jsonl"
        path.write_text(content)
        with pytest.raises(CorpusError, match=r"empty\.jsonl: the file is empty"):
            read_corpus(path)
    with pytest.raises(CorpusError, match="no corpus file was given"):
        read_corpus([])


def test_iter_corpus_is_lazy(tmp_path):
    path = _write(tmp_path / "c.jsonl", '{"title": "T", "text": "t"}', "broken")
    passages = iter_corpus(path)
    assert next(passages) == Passage("1", "T", "t")
    with pytest.raises(CorpusError, match="line 2"):
        next(passages)


def test_only_colliding_ids_are_prefixed(tmp_path):
    first = _write(tmp_path / "a" / "corpus.jsonl", '{"id": "0", "title": "", "text": "x"}')
    second = _write(
        tmp_path / "b" / "corpus.jsonl",
        '{"id": "0", "title": "", "text": "y"}',
        '{"id": "1", "title": "", "text": "z"}',
    )
    ids = [passage.id for passage in read_corpus([first, str(second)])]
    assert ids == ["a/corpus:0", "b/corpus:0", "1"]


def test_prefixes_stay_unique_for_files_of_the_same_folder_name(tmp_path):
    paths = [
        _write(tmp_path / part / "x" / "corpus.jsonl", '{"id": "0", "title": "", "text": "x"}') for part in ("p", "q")
    ]
    ids = [passage.id for passage in read_corpus(paths)]
    assert ids == [f"{(tmp_path / part / 'x' / 'corpus').resolve().as_posix()}:0" for part in ("p", "q")]


def test_a_file_named_twice_is_refused(tmp_path):
    path = _write(tmp_path / "c.jsonl", '{"title": "T", "text": "t"}')
    with pytest.raises(CorpusError, match="named twice"):
        read_corpus([path, tmp_path / "." / "c.jsonl"])


def test_written_rows_are_in_the_flashrag_layout_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "corpus.jsonl"
    write_corpus([Passage("a", "Malmö", "Sweden.", score=0.5)], path)
    assert path.read_text(encoding="utf-8") == '{"id": "a", "contents": "\\"Malmö\\"\\nSweden."}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("passages", "reason"),
    [
        ([], "no passage to write"),
        ([Passage("a", "T", "t"), Passage("a", "U", "u")], "passage 'a' occurs twice"),
        ([Passage("a", "T", "t"), Passage("b", "U", " ")], "passage 'b' has an empty text"),
        ([Passage("a", "T\nU", "t")], "titles on one line"),
    ],
)
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, passages, reason):
    path = _write(tmp_path / "corpus.jsonl", '{"title": "old", "text": "old"}')
    with pytest.raises(CorpusError, match=reason):
        write_corpus(passages, path)
    assert read_corpus(path)[0].title == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.jsonl"]


_text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1) | st.text('"ab .\n', min_size=1)


@given(title=_text.filter(lambda t: "\n" not in t).map(str.strip) | st.just(""), text=_text.filter(str.strip))
@example(title='To be" is from "Hamlet', text="t")
@example(title='To be" is from "Hamlet', text='To be" is from "Hamlet\nt')
@example(title="T", text="T\nt")
@example(title="", text='\n"T"\nt')
def test_a_row_of_a_passage_reads_back_exactly(title, text):
    passage = Passage("1", title, text)
    row = json.loads(json.dumps(row_of_passage(passage)))
    assert passage_from_row(row, default_id="-") == passage
    assert row["contents"] == f'"{title}"\n{text}'


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real passages are not at ../shared/data")
def test_real_corpora_together():
    passages = read_corpus([REAL_DATA / name / "corpus.jsonl" for name in ("hotpotqa_sample", "2wiki_passages")])
    assert len(passages) == 994 + 6119
    assert passages[0].id == "hotpotqa_sample/corpus:0" and passages[0].title == "Demon Dice"
    assert passages[-1].id == "6118"
    assert not any('"' in (passage.title[:1], passage.title[-1:]) for passage in passages[:994:100])
