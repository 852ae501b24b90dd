"""Corpus files: both layouts, every refusal with file and line, ids over several files, atomic writing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rex_rag.data.corpus import (
    CorpusError,
    iter_corpus,
    join_contents,
    passage_from_row,
    read_corpus,
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
        ('"Oslo"', "Oslo", ""),
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
        ('{"id": "x"}', r"missing fields, found \['id'\]"),
        ('{"id": "x", "title": "T"}', "missing fields"),
        ('{"id": "x", "text": "T"}', "missing fields"),
        ('{"id": "x", "title": "T", "text": " \\n"}', "empty text"),
        ('{"id": "x", "contents": "\\"T\\"\\n "}', "empty text"),
        ('{"id": "x", "contents": "\\"T\\""}', "empty text"),
        ('{"id": "x", "contents": 3}', "field 'contents' must be a string, found int 3"),
        ('{"id": "x", "title": null, "text": "t"}', "field 'title' must be a string"),
        ('{"id": "x", "title": "T", "text": "\\ud800"}', "half a surrogate pair"),
        ('{"id": true, "title": "T", "text": "t"}', "field 'id' must be"),
        ('{"id": " ", "title": "T", "text": "t"}', "field 'id' must be"),
        ('{"id": "\\ud800", "title": "T", "text": "t"}', "field 'id' holds half a surrogate pair"),
        ('{"id": 1, "title": "T", "text": "t"}', "the id '1' already occurs on line 1"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    path = _write(tmp_path / "c.jsonl", '{"id": "1", "title": "T", "text": "t"}', "", line)
    with pytest.raises(CorpusError, match=rf"c\.jsonl, line 3: .*{reason}"):
        read_corpus([path])


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


_text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)


@given(title=_text.filter(lambda t: "\n" not in t).map(str.strip), text=_text.filter(str.strip))
def test_contents_round_trip(title, text):
    passage = Passage("1", title, text)
    row = json.loads(json.dumps({"id": "1", "contents": join_contents(passage)}))
    assert passage_from_row(row, default_id="-") == passage


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real passages are not at ../shared/data")
def test_real_corpora_together():
    passages = read_corpus([REAL_DATA / name / "corpus.jsonl" for name in ("hotpotqa_sample", "2wiki_passages")])
    assert len(passages) == 994 + 6119
    assert passages[0].id == "hotpotqa_sample/corpus:0" and passages[0].title == "Demon Dice"
    assert passages[-1].id == "6118"
    assert not any('"' in (passage.title[:1], passage.title[-1:]) for passage in passages[:994:100])
