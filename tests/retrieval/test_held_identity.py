"""What a card or a client names is what answers, to the end of a run: servers exchanged, files changed underneath."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rex_rag.data.corpus import write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.index import kinds
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.builder import build_index
from rex_rag.retrieval.index.kinds import open_index
from rex_rag.retrieval.load import RetrieverArguments, load_retriever, retriever_identity
from rex_rag.retrieval.remote import servers
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.retrieval.remote.wire import INDEX_HEADER
from rex_rag.types import Passage
from tests.retrieval.running import AppServer, Running, search_r1_app, until
from tests.retrieval.servers import free_port

pytest.importorskip("fastapi", reason="the server needs fastapi: install the dev extra")
PASSAGES = {
    "foxes": [Passage(str(number), "Fox", f"The fox number {number} is red.") for number in range(40)],
    "bears": [Passage(str(number), "Bear", f"The bear number {number} is red.") for number in range(40)],
}


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes")
    for name, passages in PASSAGES.items():
        write_corpus(passages, folder / f"{name}.jsonl")
        build_index(
            IndexArguments(corpus=[str(folder / f"{name}.jsonl")], output=str(folder / name)), say=lambda _: None
        )
    return {name: folder / name for name in PASSAGES}


@pytest.fixture
def serve(indexes, monkeypatch):
    monkeypatch.setattr(servers, "PROBE_SECONDS", 0.1)
    running = []

    def start(name, port=0, directory=None):
        arguments = RetrieverArguments(retriever=[str(directory or indexes[name])])
        server = Running(
            lambda: load_retriever(arguments),
            port=port,
            identify=lambda loaded: retriever_identity(arguments, loaded),
        )
        running.append(server)
        return server.ready()

    yield start
    for server in running:
        server.stop()


def port_of(server):
    return int(server.url.rsplit(":", 1)[1])


def test_an_index_that_takes_anothers_port_in_the_middle_of_a_run_is_refused(serve):
    server = serve("foxes")
    retriever = RemoteRetriever(server.url, max_attempts=3, backoff=0.05)
    retriever.check()
    assert retriever.search(["red"], 3)[0][0].title == "Fox"
    server.stop()
    serve("bears", port_of(server))
    for _ in range(3):
        with pytest.raises(RetrievalError, match="searches something else"):
            retriever.search(["red"], 3)
    # The index that the run began with may come back.
    retriever.close()


def test_the_same_index_elsewhere_may_take_its_place(serve, indexes, tmp_path):
    server = serve("foxes")
    retriever = RemoteRetriever(server.url, max_attempts=3, backoff=0.05)
    before = retriever.search(["red"], 3)
    server.stop()
    shutil.copytree(indexes["foxes"], tmp_path / "foxes")
    serve("foxes", port_of(server), tmp_path / "foxes")
    assert retriever.search(["red"], 3) == before
    retriever.close()


def test_of_two_servers_one_that_comes_back_as_another_gets_nothing_more(serve, caplog):
    first, second = serve("foxes"), serve("foxes")
    retriever = RemoteRetriever([first.url, second.url], backoff=0.05)
    retriever.check()
    second.stop()
    for _ in range(4):
        retriever.search(["red"], 1)
    serve("bears", port_of(second))
    for _ in range(40):
        assert retriever.search(["red"], 1)[0][0].title == "Fox"
    until(lambda: retriever.search(["red"], 1) and "searches something else" in caplog.text)
    retriever.close()


def test_servers_of_different_indexes_are_refused_by_the_check(serve):
    retriever = RemoteRetriever([serve("foxes").url, serve("bears").url])
    with pytest.raises(RetrievalError, match=r"search different things.*name servers of one index"):
        retriever.check()
    retriever.close()


def test_a_server_that_was_away_at_the_start_is_held_to_the_others(serve):
    port = free_port()
    retriever = RemoteRetriever([serve("foxes").url, f"http://127.0.0.1:{port}"], backoff=0.05)
    retriever.check()
    serve("bears", port)
    for _ in range(40):
        assert retriever.search(["red"], 1)[0][0].title == "Fox"
    retriever.close()


def test_a_fingerprint_is_told_with_every_answer_and_one_without_is_refused(serve):
    server = serve("foxes")
    assert len(server.search(["red"]).headers[INDEX_HEADER]) == 16
    retriever = RemoteRetriever(server.url, max_attempts=3, backoff=0.05)
    retriever.search(["red"], 1)
    server.stop()
    silent = AppServer(search_r1_app(BM25Retriever(PASSAGES["bears"])), port_of(server))
    with pytest.raises(RetrievalError, match="does not say what it searches"):
        retriever.search(["red"], 1)
    silent.stop()
    retriever.close()


def test_the_client_is_held_to_what_the_card_names(serve):
    server = serve("foxes")
    arguments = RetrieverArguments(retriever=[server.url])
    retriever = load_retriever(arguments)
    named = retriever_identity(arguments, retriever)
    server.stop()
    other = serve("bears", port_of(server))
    with pytest.raises(RetrievalError, match="something else"):
        retriever.search(["red"], 1)
    with pytest.raises(RetrievalError, match="not those that the card names"):
        retriever_identity(arguments, retriever)
    assert retriever_identity(RetrieverArguments(retriever=[other.url]))["fingerprint"] != named["fingerprint"]
    retriever.close()


def test_a_server_that_tells_nothing_is_asked_again_when_it_returns(monkeypatch):
    monkeypatch.setattr(servers, "PROBE_SECONDS", 0.1)
    server = AppServer(search_r1_app(BM25Retriever(PASSAGES["foxes"])))
    retriever = RemoteRetriever(server.url, max_attempts=5, backoff=0.1)
    retriever.check()
    server.stop()
    again = AppServer(search_r1_app(BM25Retriever(PASSAGES["foxes"])), port_of(server))
    assert retriever.search(["red"], 1)[0][0].title == "Fox"
    again.stop()
    # Seen by a search during the outage alone: such a server tells nothing with its answers.
    with pytest.raises(RetrievalError):
        retriever.search(["red"], 1)
    other = AppServer(search_r1_app(BM25Retriever(PASSAGES["bears"])), port_of(server))
    with pytest.raises(RetrievalError, match="does not hold the index that this run began with"):
        retriever.search(["red"], 1)
    other.stop()
    retriever.close()


# Files under a running reader or server.


def overwrite(directory: Path, source: Path) -> None:
    """`cp -r source/. directory`."""
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as new, (directory / path.relative_to(source)).open("r+b") as old:
                shutil.copyfileobj(new, old)
                old.truncate()


def cut(directory: Path, source: Path) -> None:
    os.truncate(directory / "passages.jsonl", 100)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_what_is_written_under_a_reader_is_noticed_and_no_answer_given(indexes, tmp_path, change):
    copy = tmp_path / "index"
    shutil.copytree(indexes["foxes"], copy)
    retriever = open_index(copy)
    assert retriever.search(["red"], 1)[0][0].title == "Fox"
    change(copy, indexes["bears"])
    for ask in (lambda: retriever.search(["red"], 1), lambda: retriever.read(["Fox"])):
        with pytest.raises(RetrievalError, match=r"passages\.jsonl|bm25/|offsets") as raised:
            ask()
        assert str(copy) in str(raised.value) and "was written into" in str(raised.value)
    with pytest.raises(RetrievalError):
        retriever_identity(RetrieverArguments(retriever=[str(copy)]), retriever)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_a_server_says_so_too_and_is_not_ready_any_more(serve, indexes, tmp_path, change):
    copy = tmp_path / "index"
    shutil.copytree(indexes["foxes"], copy)
    server = serve("foxes", directory=copy)
    assert server.search(["red"]).status_code == 200
    change(copy, indexes["bears"])
    for query in ("red", "fox"):  # one that is kept, and one that is searched
        answer = server.search([query])
        assert answer.status_code == 500 and "was written into" in answer.json()["detail"]
    health = server.http.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "changed"


def test_a_directory_exchanged_by_renaming_leaves_the_reader_what_it_opened(indexes, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(indexes["foxes"], copy)
    arguments = RetrieverArguments(retriever=[str(copy)])
    retriever = load_retriever(arguments)
    before = retriever.search(["red"], 3), retriever_identity(arguments, retriever)
    copy.rename(tmp_path / "old")
    shutil.copytree(indexes["bears"], copy)
    assert (retriever.search(["red"], 3), retriever_identity(arguments, retriever)) == before
    assert retriever.read(["Fox"])[0] and not retriever.read(["Bear"])[0]


def test_the_files_of_a_large_index_are_hashed_where_its_name_goes_on_a_card(indexes, tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "HASHED_AT_OPENING_BYTES", 0)
    copy = tmp_path / "index"
    shutil.copytree(indexes["foxes"], copy)
    text = (copy / "passages.jsonl").read_bytes()
    (copy / "passages.jsonl").write_bytes(text.replace(b"number 3 is red", b"number 3 is rad"))
    arguments = RetrieverArguments(retriever=[str(copy)])
    retriever = load_retriever(arguments)
    assert retriever.search(["red"], 1)
    with pytest.raises(RetrievalError, match=r"passages\.jsonl: not as built.*--verify"):
        retriever_identity(arguments, retriever)
