"""The server as its clients meet it: real uvicorn, real HTTP over loopback, processes of their own for signals."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rex_rag.retrieval.base import RetrievalError, Retriever
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.retrieval.server import app
from rex_rag.retrieval.server.app import ServerOptions, serve
from rex_rag.types import Passage
from tests.retrieval.running import Running, until
from tests.retrieval.toy_engine import ToyRetriever, expected

ROOT = Path(__file__).resolve().parents[2]
# Made once: reading certificates for each connection takes longer than the connection.
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
NO_TLS = httpx.create_ssl_context(verify=False)


@pytest.fixture
def start():
    running = []

    def start_one(engine=None, options=None, **arguments):
        load = engine if callable(engine) else lambda: engine or ToyRetriever()
        running.append(Running(load, options, **arguments))
        return running[-1]

    yield start_one
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def limited():
    """A server with small limits, shared by the tests that only ask."""
    options = ServerOptions(
        max_queries=3, max_query_characters=20, max_top_k=4, max_body_bytes=500, default_top_k=2, max_waiting=10
    )
    server = Running(ToyRetriever, options).ready()
    yield server
    server.stop()


def test_rankings_come_in_the_order_asked_with_their_scores(limited):
    response = limited.search(["5", "7 words"], 3)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"result": [expected("5", 3), expected("7 words", 3)]}


def test_without_scores_the_bare_documents_come(limited):
    documents = [[entry["document"] for entry in expected("5", 2)]]
    assert limited.search(["5"], 2, scores=False).json() == {"result": documents}
    # Search-R1's defaults: no scores, and the server's own number of passages, left out or null.
    assert limited.http.post("/retrieve", json={"queries": ["5"]}).json() == {"result": documents}
    assert limited.http.post("/retrieve", json={"queries": ["5"], "topk": None}).json() == {"result": documents}


@pytest.mark.parametrize("blank", ["", " \n", "\0"])
def test_a_blank_query_gets_a_ranking_beside_the_others(limited, blank):
    response = limited.search(["5", blank, "7"], 2)
    assert (response.status_code, response.json()) == (200, {"result": [expected(q, 2) for q in ("5", "0", "7")]})


def test_no_query_gets_no_ranking(limited):
    assert limited.search([]).json() == {"result": []}


def test_the_package_client_reads_what_the_server_writes(limited):
    client = RemoteRetriever(limited.url)
    assert client.search(["999"], 2) == [
        [
            Passage("p999", "Title 999", "Text of 999, naïve “quotes”", 1.0),
            Passage("p0", "Title 0", "Text of 0, naïve “quotes”", 0.5),
        ]
    ]
    client.close()


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"queries": ["1"] * 4}, 422, "4 queries, and the limit is 3 a request; send several requests"),
        ({"queries": ["1"], "topk": 5}, 422, "topk is 5, and it must be between 1 and the limit of 4"),
        ({"queries": ["1"], "topk": 0}, 422, "topk is 0, and it must be between 1 and the limit of 4"),
        ({"queries": ["1", "x" * 21]}, 422, "query 1 of 2 has 21 characters, and the limit is 20; shorten it"),
        ({"queries": ["1", 2]}, 422, "queries.1: Input should be a valid string, found 2; a request is"),
        ({"queries": "1"}, 422, "queries: Input should be a valid array, found '1'; a request is"),
        ({"queries": ["1"], "topk": "3"}, 422, "topk: Input should be a valid integer, found '3'"),
        ({"queries": ["1"], "topk": True}, 422, "topk: Input should be a valid integer, found True"),
        ({"queries": ["1"], "return_scores": 1}, 422, "return_scores: Input should be a valid boolean, found 1"),
        ({"query": "1"}, 422, "queries: Field required; a request is"),
        (["1"], 422, "Input should be an object, found ['1']"),
        (b'{"queries": ["1"', 422, "Invalid JSON: EOF while parsing"),
        (b'{"queries": ["\\ud800"]}', 422, "Invalid JSON"),
        (b'{"queries": ["\xff"]}', 422, "Invalid JSON"),
        (b"", 422, "Invalid JSON"),
        ({"queries": ["1"], "padding": "x" * 500}, 413, "bytes long, and the limit is 500 bytes"),
    ],
)
def test_what_exceeds_a_limit_is_refused_with_the_limit_and_the_value(limited, body, status, detail):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = limited.http.post("/retrieve", content=content, headers=JSON)
    assert response.status_code == status
    assert detail in response.json()["detail"]


def test_values_at_the_limits_are_served(limited):
    response = limited.search(["1", "2", "x" * 20], 4)
    assert response.json() == {"result": [expected(query, 4) for query in ("1", "2", "x")]}


def test_a_body_of_unannounced_length_is_refused_once_it_is_too_long(limited):
    response = limited.http.post("/retrieve", content=(b"x" * 100 for _ in range(50)), headers=JSON)
    assert response.status_code == 413
    assert response.json()["detail"].startswith("the body is longer than 500 bytes, and the limit is 500 bytes")


def test_a_large_body_is_refused_before_it_is_read(limited):
    host, port = limited.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(HEAD % 1_000_000_000 + b"{")
        answer = connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_other_paths_and_methods_are_refused(limited):
    assert limited.http.get("/retrieve").status_code == 405
    assert limited.http.post("/search", json={}).status_code == 404


def test_server_timing_names_every_stage_and_their_sum(limited):
    header = limited.search(["1"]).headers["server-timing"]
    names, values = zip(*(part.strip().split(";dur=") for part in header.split(",")), strict=True)
    assert names == ("queue", "encode", "search", "fetch", "total")
    durations = [float(value) for value in values]
    assert min(durations) >= 0
    assert sum(durations[:4]) == pytest.approx(durations[4], abs=0.01)


def test_metrics_count_requests_queries_batches_and_cache(start):
    server = start().ready()
    server.search(["1", "2"])
    server.search(["2", "3"])
    server.search(["1"], 0)
    server.search(["1 broken-rank"])
    found = server.metrics()
    prefix = "rexrag_retrieval_"
    assert found[f'{prefix}requests_total{{status="200"}}'] == 2
    assert found[f'{prefix}requests_total{{status="422"}}'] == 1
    assert found[f'{prefix}requests_total{{status="500"}}'] == 1
    assert found[f"{prefix}queries_total"] == 4
    assert found[f"{prefix}cache_hits_total"] == 1
    assert found[f"{prefix}cache_misses_total"] == 4
    assert found[f"{prefix}batch_queries_count"] == 3
    assert found[f"{prefix}batch_queries_sum"] == 4
    assert found[f"{prefix}in_flight"] == 0
    for stage in ("queue", "encode", "search", "fetch", "total"):
        assert found[f'{prefix}stage_seconds_count{{stage="{stage}"}}'] == 2
    # A second application in the same process counts for itself.
    assert start().ready().metrics()[f"{prefix}queries_total"] == 0


def test_the_openapi_page_describes_requests_answers_and_refusals(limited):
    for page in ("/docs", "/redoc"):  # their scripts would come from elsewhere
        assert limited.http.get(page).status_code == 404
    page = limited.http.get("/openapi.json").json()
    operation = page["paths"]["/retrieve"]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert set(fields) == {"queries", "topk", "return_scores"}
    assert set(operation["responses"]) == {"200", "408", "413", "415", "421", "422", "500", "503"}
    assert {"RetrieveResponse", "ScoredDocument", "Document", "Health", "Problem"} <= set(
        page["components"]["schemas"]
    )


def test_searches_are_refused_until_the_index_is_loaded(start):
    loaded = threading.Event()

    def load():
        loaded.wait(timeout=20)
        return ToyRetriever(50)

    server = start(load)
    health, search = server.http.get("/health"), server.search(["1"])
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert search.status_code == 503
    assert "still being loaded" in search.json()["detail"]
    assert int(health.headers["retry-after"]) >= 1
    assert int(search.headers["retry-after"]) >= 1
    loaded.set()
    server.ready()
    assert server.http.get("/health").json() == {
        "status": "ready",
        "retriever": "toy index of 50 passages",
        "passages": 50,
    }
    assert server.search(["1"]).json() == {"result": [expected("1", 3)]}


def test_a_failed_load_is_handed_on(start):
    def load():
        raise RetrievalError("no index there")

    failures = []
    start(load, on_load_failure=failures.append)
    until(lambda: failures)
    assert str(failures[0]) == "no index there"


def test_a_broken_query_does_not_fail_its_batch_mates(start):
    engine = ToyRetriever()
    engine.gate.clear()
    server = start(engine).ready()
    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(server.search, ["0"])
        until(lambda: engine.ranked)
        good = [pool.submit(server.search, [str(n)]) for n in range(1, 9)]
        bad = pool.submit(server.search, ["9", "1 broken-rank"])
        # On their way into one batch, once the first is through.
        until(lambda: server.metrics()["rexrag_retrieval_in_flight"] == 10)
        engine.gate.set()
        for n, future in enumerate([first, *good]):
            assert future.result().json() == {"result": [expected(str(n), 3)]}
        assert bad.result().status_code == 500
        assert "query 1 of 2, '1 broken-rank', could not be answered: IndexError" in bad.result().json()["detail"]
    assert any(len(batch) > 1 and "1 broken-rank" in batch for batch in engine.ranked)


def test_a_full_server_says_when_to_come_back(start):
    engine = ToyRetriever()
    engine.gate.clear()
    server = start(engine, ServerOptions(max_waiting=2, max_queries=2)).ready()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(server.search, ["1", "2"])
        until(lambda: engine.ranked)
        refused = server.search(["3"])
        assert refused.status_code == 503
        assert "2 queries wait and 1 more would exceed the limit of 2" in refused.json()["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        engine.gate.set()
        assert waiting.result().status_code == 200
    assert server.search(["3"]).json() == {"result": [expected("3", 3)]}


def test_nobody_searches_for_a_client_that_hung_up(start, monkeypatch):
    monkeypatch.setattr(app, "CLIENT_CHECK_SECONDS", 0.1)
    engine = ToyRetriever()
    engine.gate.clear()
    server = start(engine).ready()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(server.search, ["1"])]
        until(lambda: engine.ranked)
        futures.append(pool.submit(server.search, ["2", "5"]))
        until(lambda: ["2", "5"] in engine.encoded)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/retrieve", json={"queries": ["3"]}, timeout=0.2, trust_env=False)
        until(lambda: server.metrics().get('rexrag_retrieval_requests_total{status="499"}') == 1)
        engine.gate.set()
        assert [future.result().status_code for future in futures] == [200, 200]
    assert server.search(["4"]).status_code == 200
    assert engine.ranked == [["1"], ["2", "5"], ["4"]]


def test_a_client_that_hangs_up_within_its_request_is_counted_and_harms_nobody(start):
    server = start().ready()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(HEAD % 100 + b'{"queries": ["1')
    until(lambda: server.metrics().get('rexrag_retrieval_requests_total{status="499"}') == 1)
    assert server.metrics()["rexrag_retrieval_in_flight"] == 0
    assert server.search(["1"]).json() == {"result": [expected("1", 3)]}


@pytest.mark.parametrize("micro_batching", [True, False])
def test_64_clients_at_once_lose_and_swap_nothing(start, micro_batching):
    engine = ToyRetriever(100_000)
    server = start(engine, ServerOptions(micro_batching=micro_batching)).ready()
    clients, requests = 64, 10

    def client(number):
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False, verify=NO_TLS) as http:
            answers = {}
            for request in range(requests):
                unique = [str((number * requests + request) * 4 + part) for part in range(1 + request % 4)]
                payload = {"queries": unique, "topk": 1 + request % 3, "return_scores": True}
                answers[tuple(unique), payload["topk"]] = http.post("/retrieve", json=payload).json()
            return answers

    with ThreadPoolExecutor(clients) as pool:
        answers = {key: value for part in pool.map(client, range(clients)) for key, value in part.items()}
    assert len(answers) == clients * requests
    for (queries, top_k), answer in answers.items():
        assert answer == {"result": [expected(query, top_k, 100_000) for query in queries]}
    searched = [query for batch in engine.ranked for query in batch]
    assert len(searched) == len(set(searched)) == 64 * (1 + 2 + 3 + 4 + 1 + 2 + 3 + 4 + 1 + 2)
    assert (len(engine.ranked) < clients * requests) == micro_batching


def test_engines_without_an_index_are_served_too(start):
    class Plain(Retriever):
        description = "plain engine"
        max_top_k = 10

        def check(self):
            raise AssertionError("a check may cost money")

        def search(self, queries, top_k):
            if "bad" in queries:
                raise RetrievalError("the engine said no")
            return [[Passage(f"{query}-{rank}", "T", query) for rank in range(top_k)] for query in queries]

    server = start(Plain()).ready()
    assert server.http.get("/health").json()["passages"] is None
    assert server.search(["a"], 1).json() == {
        "result": [[{"document": {"id": "a-0", "contents": '"T"\na'}, "score": 1.0}]]
    }
    assert (server.search(["bad"]).status_code, server.search(["bad"]).json()) == (
        500,
        {"detail": "the engine said no"},
    )
    # Not 500, which clients would take for trouble that passes.
    refused = server.search(["a"], 11)
    assert refused.status_code == 422
    assert refused.json()["detail"] == "topk is 11, and it must be between 1 and the limit of 10"


# A process of its own, for signals and exit codes.

SERVE = """
import logging, sys, time
from tests.retrieval.toy_engine import ToyRetriever
from rex_rag.retrieval.server.app import ServerOptions, serve
logging.basicConfig(level=logging.INFO)
def load():
    if sys.argv[1] == "fail":
        raise FileNotFoundError("there is no index")
    if sys.argv[1] == "slow":
        time.sleep(60)
    return ToyRetriever(100_000, seconds=float(sys.argv[2]))
serve(load, ServerOptions(port=int(sys.argv[3]), max_batch=8))
"""


@pytest.fixture
def process():
    started = []

    def start(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SERVE, *map(str, arguments), str(port)]
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(child)
        return child, f"http://127.0.0.1:{port}"

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stderr.close()


def is_up(url, status=200):
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == status
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_stop_finishes_what_was_accepted(process, which):
    child, url = process("good", 0.05)
    until(lambda: is_up(url))
    outcomes, latest = [], []

    def client(number):
        # A connection for each request: what the server accepts it answers, what it does not accept is refused.
        for request in range(1000):
            query = str(number * 1000 + request)
            try:
                response = httpx.post(
                    f"{url}/retrieve",
                    json={"queries": [query], "return_scores": True},
                    trust_env=False,
                    timeout=20,
                    verify=NO_TLS,
                )
            except httpx.ConnectError:
                return
            except httpx.TransportError as error:
                outcomes.append((query, repr(error)))
                return
            outcomes.append((query, response.json()))
            latest.append(time.monotonic())

    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    until(lambda: len(outcomes) > 50)
    signalled = time.monotonic()
    child.send_signal(which)
    for thread in threads:
        thread.join(timeout=20)
    assert child.wait(timeout=20) == 0, child.stderr.read()
    answered = [(query, answer) for query, answer in outcomes if isinstance(answer, dict)]
    for query, answer in answered:
        assert answer == {"result": [expected(query, 3, 100_000)]}
    assert max(latest) > signalled
    # Connections that lay in the kernel's queue when the listener closed were never accepted; they are reset.
    lost = [answer for _, answer in outcomes if not isinstance(answer, dict)]
    assert len(lost) <= 32
    assert all("ReadError" in error or "RemoteProtocolError" in error for error in lost), lost
    assert not is_up(url)


def test_a_long_request_outlives_the_stop_and_the_second_signal_ends_it(process):
    child, url = process("good", 0.8)
    until(lambda: is_up(url))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{url}/retrieve", json={"queries": ["1"]}, trust_env=False, timeout=20)
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        assert running.result().status_code == 200
    assert child.wait(timeout=20) == 0

    child, url = process("good", 25)
    until(lambda: is_up(url))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{url}/retrieve", json={"queries": ["1"]}, trust_env=False, timeout=20)
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=5) == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            running.result()


def test_a_failed_load_ends_the_process_with_the_error(process):
    child, _ = process("fail", 0)
    assert child.wait(timeout=30) == 1
    assert "FileNotFoundError: there is no index" in child.stderr.read()


def test_a_stop_does_not_wait_for_an_index_that_is_being_loaded(process):
    child, url = process("slow", 0)
    until(lambda: is_up(url, 503))
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == 0


def test_an_address_that_is_taken_or_not_ours_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RetrievalError, match=rf"cannot listen at 127.0.0.1:{port} .*take another port"):
            serve(ToyRetriever, ServerOptions(port=port))
    with pytest.raises(RetrievalError, match=r"host='no\.such\.host\.invalid' is no address of this machine"):
        serve(ToyRetriever, ServerOptions(host="no.such.host.invalid"))


def test_listening_beyond_loopback_warns(caplog):
    def load():
        raise RuntimeError("far enough")

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="far enough"):
        serve(load, ServerOptions(host="0.0.0.0", port=0))
    assert "host=0.0.0.0 is reachable from other machines" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="far enough"):
        serve(load, ServerOptions(port=0))
    assert "reachable" not in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"host": " "}, "host=' ' names no address; use 127.0.0.1"),
        ({"port": 70_000}, "port=70000; it must be an integer of between 0 and 65535"),
        ({"max_queries": 0}, "max_queries=0; it must be an integer of at least 1"),
        ({"max_top_k": True}, "max_top_k=True; it must be an integer of at least 1"),
        ({"max_body_bytes": 1.5}, "max_body_bytes=1.5; it must be an integer"),
        ({"max_batch": 0}, "max_batch=0; it must be an integer of at least 1; 1 searches query by query"),
        ({"cache_size": -1}, "cache_size=-1; it must be an integer of at least 0; 0 keeps nothing"),
        ({"batch_wait_ms": -1}, "batch_wait_ms=-1; it must be between 0 and 1000"),
        ({"batch_wait_ms": float("nan")}, "batch_wait_ms=nan; it must be between 0 and 1000"),
        ({"micro_batching": "no"}, "micro_batching='no'; it must be true or false"),
        ({"max_top_k": 2}, "default_top_k=3 is above max_top_k=2, so that a request without topk"),
        ({"max_waiting": 10}, "max_waiting=10 is below max_queries=4096, so that a request of allowed size"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError) as refused:
        ServerOptions(**values)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.0.0.2", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback_is_recognised(host, loopback):
    assert ServerOptions(host=host).is_loopback is loopback
