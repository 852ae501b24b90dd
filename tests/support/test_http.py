"""Requests end in time and in bounds, whatever a server on a real socket does."""

from __future__ import annotations

import gzip
import json
import resource
import socket
import threading
import time

import httpx
import pytest

from rex_rag.models.endpoint import EndpointClient, EndpointError, EndpointOptions
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.qdrant_calls import connect_qdrant
from rex_rag.retrieval.online.retriever import OnlineRetriever
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.support.http import AnswerTooLarge, bounded_client, parse_json
from tests.odd_servers import UNBOUNDED, answering, fixed

SECONDS = 0.5


def ask_retriever(url, folder):
    RemoteRetriever(url, timeout=SECONDS, max_attempts=1).search(["a"], 1)


def ask_endpoint(url, folder):
    client = EndpointClient(EndpointOptions(url, "m", timeout=SECONDS, attempts=1))
    try:
        client.complete({"prompt": "a"})
    finally:
        client.close()


def ask_engine(url, folder):
    OnlineRetriever("serpapi", folder, 9, timeout=SECONDS, max_attempts=1, address=url).search(["a"], 1)


def ask_qdrant(url, folder):
    client = connect_qdrant(url, timeout=1.0)
    try:
        client.get_collection("c")
    finally:
        client.close()


CLIENTS = {
    "retriever": (ask_retriever, RetrievalError),
    "endpoint": (ask_endpoint, EndpointError),
    "engine": (ask_engine, RetrievalError),
    "qdrant": (ask_qdrant, Exception),
}


@pytest.mark.parametrize("behaviour", UNBOUNDED)
@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_ends_in_time_and_memory_whatever_a_server_sends(client, behaviour, tmp_path, monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", "k")
    ask, kind = CLIENTS[client]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with answering(UNBOUNDED[behaviour]) as url:
        started = time.monotonic()
        with pytest.raises(kind):
            ask(url, tmp_path)
        assert time.monotonic() - started < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_the_time_is_that_of_the_whole_request_and_one_request_may_have_its_own():
    with answering(UNBOUNDED["dripping_head"]) as url, bounded_client("127.0.0.1", 30) as client:
        started = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            client.get(url, timeout=0.3)
        assert time.monotonic() - started < 1


def test_a_server_that_reads_in_drips_does_not_stretch_it():
    stop = threading.Event()

    def read_in_drips(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while not stop.wait(0.05):
            connection.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: read_in_drips(listener.accept()[0]), daemon=True)
        thread.start()
        with bounded_client("127.0.0.1", 0.5) as client:
            started = time.monotonic()
            with pytest.raises(httpx.TimeoutException):
                client.post(f"http://127.0.0.1:{listener.getsockname()[1]}", content=b"x" * 50_000_000)
            assert time.monotonic() - started < 2
        stop.set()
        thread.join()


def test_a_bomb_is_not_unpacked_and_a_request_may_bound_its_answer():
    bomb = fixed(gzip.compress(b" " * 50_000_000), b"Content-Encoding: gzip\r\n")
    with answering(bomb) as url, bounded_client("127.0.0.1", 5) as client, pytest.raises(httpx.DecodingError):
        client.get(url)
    with answering(fixed(b"12345")) as url, bounded_client("127.0.0.1", 5) as client:
        assert client.get(url, extensions={"max_bytes": 5}).content == b"12345"
        with pytest.raises(AnswerTooLarge, match="beyond the 4"):
            client.get(url, extensions={"max_bytes": 4})


def test_time_over_for_one_request_is_not_over_for_the_next_of_its_thread():
    with bounded_client("127.0.0.1", 0.2) as client:
        with answering(UNBOUNDED["dripping_body"]) as url, pytest.raises(httpx.ReadTimeout):
            client.get(url)
        with answering(fixed(b"fine")) as url:
            assert client.get(url).text == "fine"


@pytest.mark.parametrize("body", [b"{", b"\xff", b"", b"[" * 100_000, b"1" * 5000, b"\xed\xa0\x80"])
def test_what_is_no_json_is_one_kind_of_error(body):
    with pytest.raises(ValueError):
        parse_json(body)


def test_half_a_surrogate_pair_is_mended_and_a_whole_one_kept():
    text = r'{"a": "x\ud800y", "\uDFFF": ["\ud83d\ude00", "\\ud800"]}'
    mended = parse_json(text.encode())
    assert mended == {"a": "x?y", "?": ["\U0001f600", "\\ud800"]}
    json.dumps(mended, ensure_ascii=False).encode()
