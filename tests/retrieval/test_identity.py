"""What a retriever is known by: the same over a corpus in this process, from an index directory and by a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.identity import FIXED_QUERIES, read_identity
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.builder import build_index
from rex_rag.retrieval.load import RetrieverArguments, load_retriever, retriever_identity
from rex_rag.retrieval.manifest import Manifest
from tests.retrieval.running import AppServer, Running, search_r1_app


def write_corpus(path: Path, *texts: str) -> str:
    rows = [{"id": str(number), "title": f"Fox  {number}", "text": text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Two files that share ids, and titles that a store tidies."""
    folder = tmp_path_factory.mktemp("corpus")
    return [write_corpus(folder / "a.jsonl", "red", "grey"), write_corpus(folder / "b.jsonl", "white")]


@pytest.fixture(scope="module")
def index(corpus, tmp_path_factory) -> str:
    output = str(tmp_path_factory.mktemp("index") / "foxes")
    build_index(IndexArguments(corpus=corpus, output=output, kind="bm25"), say=lambda _: None)
    return output


def serve(arguments: RetrieverArguments, identify: bool = True) -> Running:
    more = {"identify": lambda loaded: retriever_identity(arguments, loaded)} if identify else {}
    return Running(lambda: load_retriever(arguments), **more).ready()


def test_a_corpus_in_process_is_the_index_that_would_be_built_of_it(corpus, index, tmp_path):
    manifest = Manifest.read(index)
    known = retriever_identity(RetrieverArguments(corpus=corpus))
    assert known == {"fingerprint": manifest.fingerprint, "corpus_sha256": manifest.corpus_sha256}
    assert retriever_identity(RetrieverArguments(retriever=[index])) == known
    assert retriever_identity(RetrieverArguments(corpus=corpus), BM25Retriever.from_corpus(corpus)) == known
    # It finds the same, which is what the fingerprint says.
    one, other = (
        load_retriever(arguments).search(["white fox", "fox 1", "red"], 3)
        for arguments in (RetrieverArguments(corpus=corpus), RetrieverArguments(retriever=[index]))
    )
    assert [[(p.id, p.score) for p in ranking] for ranking in one] == [
        [(p.id, p.score) for p in ranking] for ranking in other
    ]
    another = retriever_identity(RetrieverArguments(corpus=[write_corpus(tmp_path / "a.jsonl", "red", "black")]))
    assert not set(another.values()) & set(known.values())


def test_a_server_tells_what_it_searches(index, monkeypatch):
    # A proxy that the environment names is not asked for this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server = serve(RetrieverArguments(retriever=[index]))
    try:
        told = retriever_identity(RetrieverArguments(retriever=[f"{server.url}/retrieve"]))
        health = server.http.get("/health").json()
    finally:
        server.stop()
    assert told.pop("served").startswith("BM25 over 3 passages (index foxes, ")
    assert told == retriever_identity(RetrieverArguments(retriever=[index])) == health["identity"]


def test_a_server_without_an_identity_is_known_by_its_description(index):
    server = serve(RetrieverArguments(retriever=[index]), identify=False)
    try:
        assert "identity" not in server.http.get("/health").json()
        told = retriever_identity(RetrieverArguments(retriever=[server.url]))
    finally:
        server.stop()
    assert list(told) == ["served"] and told["served"].endswith("3 passages")
    assert retriever_identity(RetrieverArguments(retriever=["http://127.0.0.1:9"])) == {}


def test_servers_of_different_indexes_are_refused(corpus, index):
    servers = [serve(RetrieverArguments(retriever=[index])), serve(RetrieverArguments(corpus=corpus))]
    try:
        urls = [server.url for server in servers]
        assert "fingerprint" in retriever_identity(RetrieverArguments(retriever=urls)), "the same, differently reached"
        servers.append(serve(RetrieverArguments(corpus=corpus[:1])))
        with pytest.raises(RetrievalError, match=r"search different things.*Name servers of one index"):
            retriever_identity(RetrieverArguments(retriever=[*urls, servers[-1].url]))
    finally:
        for server in servers:
            server.stop()


def test_servers_without_a_health_page_are_known_by_what_they_find(corpus, tmp_path):
    """Two servers over one corpus, and one over a corpus in which one passage reads otherwise."""
    other = [write_corpus(tmp_path / "a.jsonl", "red", "grey"), write_corpus(tmp_path / "b.jsonl", "black")]
    asked: list[dict] = []
    servers = [AppServer(search_r1_app(BM25Retriever.from_corpus(files), asked)) for files in (corpus, corpus, other)]
    try:
        given = [RetrieverArguments(retriever=[server.url]) for server in servers]
        assert retriever_identity(given[0]) == {} and asked == [], "not asked before it is loaded"
        first, again, unlike = (retriever_identity(arguments, load_retriever(arguments)) for arguments in given)
        assert [(request["queries"], request["topk"]) for request in asked] == [(list(FIXED_QUERIES), 3)] * 3
        assert list(first) == ["answers_sha256"] and len(first["answers_sha256"]) == 64
        assert first == again != unlike
        urls = [server.url for server in servers]
        both = RetrieverArguments(retriever=urls[:2])
        assert retriever_identity(both, load_retriever(both)) == first
        # One that is away neither holds up the other nor counts.
        gone = RetrieverArguments(retriever=[urls[0], "http://127.0.0.1:9"])
        assert retriever_identity(gone, load_retriever(gone)) == first
        mixed = RetrieverArguments(retriever=urls[1:])
        with pytest.raises(RetrievalError, match=r"find different passages for the same queries.*one index"):
            retriever_identity(mixed, load_retriever(mixed))
    finally:
        for server in servers:
            server.stop()


def test_a_server_with_a_fingerprint_is_not_asked_to_search(index):
    arguments = RetrieverArguments(retriever=[index])
    server = serve(arguments)
    try:
        remote = RetrieverArguments(retriever=[server.url])
        told = retriever_identity(remote, load_retriever(remote))
        answered = server.metrics()["rexrag_retrieval_queries_total"]
    finally:
        server.stop()
    assert "fingerprint" in told and "answers_sha256" not in told
    assert answered == 0


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        ({}, {}),
        ({"status": "ready", "retriever": 5}, {}),
        ({"retriever": "E5", "passages": 7, "identity": "x"}, {"served": "E5, 7 passages"}),
        (
            {"retriever": "E5", "identity": {"fingerprint": "ab", "nprobe": 8, "long": "x" * 201, "deep": {"a": 1}}},
            {"served": "E5", "fingerprint": "ab", "nprobe": 8},
        ),
        ({"retriever": "E5", "identity": {str(number): "x" for number in range(21)}}, {"served": "E5, None passages"}),
    ],
)
def test_what_servers_say_is_taken_with_care(health, expected):
    assert read_identity(health) == expected


def test_a_server_does_not_write_the_card_nor_to_the_terminal():
    told = {
        "fingerprint": "f",
        "kind": "index",
        "description": "x",
        "nprobe": float("nan"),
        "k" * 500: 1,
        "e": "\x1b[2J",
    }
    found = read_identity({"retriever": "foxes\x1b[2J\n- a line", "identity": told})
    assert found == {"fingerprint": "f", "e": "[2J", "served": "foxes [2J - a line"}


def test_settings_that_change_what_is_found_are_part_of_it(index, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "private" / "cross-encoder"
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    arguments = RetrieverArguments(
        retriever=[index], rerank_model=str(folder), rerank_candidates=7, retriever_nprobe=3
    )
    known = retriever_identity(arguments)
    assert (known["nprobe"], known["rerank_candidates"]) == (3, 7)
    assert known["rerank_model"].startswith("cross-encoder (") and str(tmp_path) not in json.dumps(known)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    assert retriever_identity(arguments)["rerank_model"] != known["rerank_model"], "other weights"
