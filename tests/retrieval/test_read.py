"""Reading documents: by title, by id, over local kinds and through the server."""

from __future__ import annotations

import json

import pytest
from parts import SearchR1

from rex_rag.retrieval.base import CannotRead, as_retriever
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.tools import ReadTool, make_tools
from rex_rag.tools.retrieval import READ
from rex_rag.types import Passage

PASSAGES = [
    Passage("1", "Owl", "the owl is in the oak"),
    Passage("2", "Fox", "the fox is red"),
    Passage("3", "Owl", "it hunts at night"),
    Passage("4", "owl", "another page of that name"),
]


def ids(documents) -> list[list[str]]:
    return [[passage.id for passage in document] for document in documents]


def test_a_document_is_the_passages_of_one_title_in_corpus_order():
    retriever = BM25Retriever(PASSAGES)
    assert ids(retriever.read(["Owl", "owl", "OWL", " Fox ", "3", "nothing", ""])) == [
        ["1", "3"],  # the very title comes first
        ["4"],
        ["1", "3"],  # of titles that differ in case, the first one's
        ["2"],
        ["1", "3"],  # by the id of one of its passages
        [],
        [],
    ]


def test_one_that_only_searches_says_so():
    class Own:
        description = "my engine"

        def check(self):
            pass

        def search(self, queries, top_k):
            return [[PASSAGES[0]] for _ in queries]

    own = as_retriever(Own())
    assert own.search(["x"], 1) == [[PASSAGES[0]]]
    with pytest.raises(CannotRead, match="my engine only searches"):
        own.read(["Owl"])
    with pytest.raises(TypeError, match="without check and search"):
        as_retriever(type("Half", (), {"description": "x"})())


def test_the_tool_shows_the_document_and_says_where_there_is_none():
    [tool] = make_tools(["read"], BM25Retriever(PASSAGES))
    assert isinstance(tool, ReadTool)
    found, missing, again = tool.run([{"document": "Owl"}, {"document": "Elk"}, {"document": "Owl"}])
    assert found.text == "Document(Title: Owl) the owl is in the oak\nit hunts at night" and found == again
    assert [passage.id for passage in found.passages] == ["1", "3"]
    assert missing.text == "There is no document with the title or id 'Elk'." and missing.passages == ()


def test_a_protocol_of_tags_calls_it_by_its_name():
    protocol = SearchR1(tools=[READ])
    assert protocol.stop_strings == ("</read>", "</answer>")
    assert protocol.parse("<read> Owl </read>").calls[0].arguments == {"document": "Owl"}
    assert "<read> document </read>" in protocol.template


OWN = """
from rex_rag.retrieval.base import Retriever
from rex_rag.types import Passage

class Echo(Retriever):
    description = "an echo"

    def check(self):
        pass

    def search(self, queries, top_k):
        return [[Passage("0", "Echo", query)] for query in queries]
"""


def test_a_class_of_ones_own_is_named_in_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "my_echo.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = RetrieverArguments(retriever=["my_echo:Echo"])
    assert arguments.kind.name == "own"
    assert load_retriever(arguments).search(["hello"], 1)[0][0].text == "hello"
    with pytest.raises(ValueError, match="retriever_nprobe=3 is for an index directory"):
        RetrieverArguments(retriever=["my_echo:Echo"], retriever_nprobe=3)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in PASSAGES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_directory_and_the_server_over_it_read_what_the_corpus_reads(corpus, tmp_path):
    pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
    from rex_rag.cli import main
    from tests.retrieval.running import Running

    assert main(["index", "--corpus", str(corpus), "--output", str(tmp_path / "index"), "--kind", "bm25"]) == 0
    keys = ["Owl", "owl", "3", "nothing"]
    expected = BM25Retriever(PASSAGES).read(keys)
    arguments = RetrieverArguments(retriever=[str(tmp_path / "index")])
    assert load_retriever(arguments).read(keys) == expected
    # As an index of an earlier version has it: no table, and neither that nor its own hash in its manifest.
    (tmp_path / "index" / "lookup.u64").unlink()
    manifest = tmp_path / "index" / "manifest.json"
    known = json.loads(manifest.read_text())
    del known["files"]["lookup.u64"], known["sha256"]
    manifest.write_text(json.dumps(known))
    assert load_retriever(arguments).read(keys) == expected
    server = Running(lambda: load_retriever(arguments)).ready()
    try:
        client = load_retriever(RetrieverArguments(retriever=[server.url]))
        assert client.read(keys) == expected
        client.close()
    finally:
        server.stop()


def test_a_server_that_only_searches_is_named_as_such():
    pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
    from tests.retrieval.running import AppServer, search_r1_app

    server = AppServer(search_r1_app(BM25Retriever(PASSAGES)))
    try:
        client = load_retriever(RetrieverArguments(retriever=[server.url]))
        assert client.search(["owl"], 1)[0][0].id in ("1", "3", "4")
        with pytest.raises(CannotRead, match="only searches, as Search-R1's own does"):
            client.read(["Owl"])
        client.close()
    finally:
        server.stop()
