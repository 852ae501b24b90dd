"""Clients that mean harm: what they can make a server keep is bounded, it stops when told to, and pages cannot ask."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from rex_rag.retrieval.server import requests
from rex_rag.retrieval.server.options import ServerOptions
from tests.retrieval.running import Running, until
from tests.retrieval.servers import free_port
from tests.retrieval.toy_engine import ToyRetriever

ROOT = Path(__file__).resolve().parents[2]
HEAD = b"POST /retrieve HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
SERVE = """
import sys
from rex_rag.retrieval.server import app, protocol
from tests.retrieval.toy_engine import ToyRetriever
app.GRACE_SECONDS = 2
protocol.HEAD_SECONDS = protocol.ANSWER_SECONDS = float(sys.argv[2])
app.serve(lambda: ToyRetriever(100_000), app.ServerOptions(port=int(sys.argv[1])))
"""


class Process:
    def __init__(self, patience=60.0):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", SERVE, str(self.port), str(patience)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        until(self.is_up)

    def is_up(self):
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def megabytes(self):
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def close(self):
        self.child.kill()
        self.child.wait()


@pytest.fixture
def process():
    started = []

    def start(**options):
        started.append(Process(**options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def ask_for_much(connection):
    """Ten answers of 1.6 MB, more than the kernel holds for who does not read."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"queries": [str(number) for number in range(4096)], "topk": 5}).encode()
    connection.sendall((HEAD % len(body) + body) * 10)


@pytest.mark.parametrize("client", ["half a body", "half a head", "reads nothing"])
def test_a_stop_ends_within_seconds_whatever_clients_do(process, client):
    server = process()
    with contextlib.closing(server.connect()) as connection:
        if client == "half a body":
            connection.sendall(HEAD % 1000 + b'{"queries"')
        elif client == "half a head":
            connection.sendall(HEAD[:30])
        else:
            ask_for_much(connection)
        time.sleep(1.0)
        started = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(timeout=10) == 0
        assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    "endless",
    [b"X-Long: " + b"x" * 1000 + b"\r\n", b"x" * 1000],
    ids=["many headers", "one long line"],
)
def test_a_head_without_an_end_is_cut_off(process, endless):
    server = process()
    before = server.megabytes()
    sent = 0
    with contextlib.closing(server.connect()) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nX: ")
        while sent < 300_000_000:
            connection.sendall(endless * 50)
            sent += len(endless) * 50
    assert sent < 20_000_000  # kernel buffers take some
    assert server.megabytes() - before < 20
    assert server.is_up()


def test_trailers_behind_a_body_are_bounded_too(process):
    server = process()
    sent = 0
    with contextlib.closing(server.connect()) as connection, contextlib.suppress(ConnectionError):
        head = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
        connection.sendall(head + b"2\r\n{}\r\n0\r\n")
        while sent < 100_000_000:
            connection.sendall(b"X-Long: " + b"x" * 1000 + b"\r\n")
            sent += 1010
    assert sent < 20_000_000
    assert server.is_up()


def test_connections_that_never_ask_or_never_read_are_dropped(process):
    server = process(patience=1.0)

    def connections():
        return sum(os.readlink(link).startswith("socket:") for link in Path(f"/proc/{server.child.pid}/fd").iterdir())

    before = connections()
    with contextlib.closing(server.connect()) as silent, contextlib.closing(server.connect()) as unread:
        ask_for_much(unread)
        until(lambda: connections() > before)
        assert silent.recv(1) == b""
        until(lambda: connections() <= before)


@pytest.fixture(scope="module")
def small():
    server = Running(ToyRetriever, ServerOptions(max_body_bytes=1000)).ready()
    yield server
    server.stop()


def status_of(connection):
    return int(connection.recv(10_000).split(b" ", 2)[1])


def test_unfinished_bodies_are_bounded_all_together(small):
    address = ("127.0.0.1", httpx.URL(small.url).port)
    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(2 * requests.BODIES_AT_ONCE):
            connection = stack.enter_context(socket.create_connection(address, timeout=0.5))
            connection.sendall(HEAD % 1000 + b" " * 900)
            with contextlib.suppress(TimeoutError):
                statuses.append(status_of(connection))
        assert statuses and set(statuses) == {503}
    # What was held is free again.
    until(lambda: small.search(["1"]).status_code == 200)


def test_an_answer_of_too_many_passages_is_refused_before_it_is_searched_for(process):
    server = process()
    body = {"queries": [str(number) for number in range(4096)], "topk": 100}
    answer = httpx.post(f"{server.url}/retrieve", json=body, trust_env=False, timeout=20)
    assert answer.status_code == 422 and "65536 passages a request" in answer.json()["detail"]


def test_a_body_that_does_not_come_is_not_waited_for(small, monkeypatch):
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", httpx.URL(small.url).port), timeout=10) as connection:
        connection.sendall(HEAD % 1000 + b"{")
        assert status_of(connection) == 408


BODY = json.dumps({"queries": ["1"]})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("rebound.example", 421),
        ("rebound.example:8000", 421),
        ("localhost.rebound.example", 421),
        ("127.0.0.1.rebound.example", 421),
        ("localhost:80:80", 421),
        ("localhost@evil", 421),
        ("", 421),
    ],
)
def test_a_server_on_loopback_answers_to_its_own_names_alone(small, host, status):
    headers = {"Host": host, "Content-Type": "application/json"}
    assert small.http.post("/retrieve", content=BODY, headers=headers).status_code == status
    assert small.http.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_page_can_send_unasked_is_no_search(small, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    response = small.http.post("/retrieve", content=BODY, headers=headers)
    assert response.status_code == 415 and "application/json" in response.json()["detail"]
    # Before it sends JSON a browser asks, and is not allowed.
    asking = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    asked = small.http.request("OPTIONS", "/retrieve", headers=asking)
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers


def test_json_may_name_its_characters(small):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert small.http.post("/retrieve", content=BODY, headers=headers).status_code == 200


def test_beyond_loopback_any_name_is_answered():
    server = Running(ToyRetriever, ServerOptions(host="0.0.0.0")).ready()
    try:
        assert server.http.get("/health", headers={"Host": "search.example"}).status_code == 200
    finally:
        server.stop()
