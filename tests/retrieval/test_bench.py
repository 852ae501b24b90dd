"""The benchmark against real servers: a good one, and ones with known faults and known delays."""

import json
import multiprocessing
import re
import socket
import threading
import time

import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.server.app import ServerOptions
from rex_rag.retrieval.server.bench import (
    BenchError,
    BenchOptions,
    Spread,
    bench_in_process,
    invent_queries,
    load_queries,
    run_bench,
)
from rex_rag.retrieval.server.bench_load import Load, drive
from rex_rag.types import Passage
from tests.retrieval.running import Running, until
from tests.retrieval.toy_engine import ToyRetriever

QUERIES = [str(n) for n in range(400)]


@pytest.fixture(scope="module")
def slow():
    """Twenty milliseconds a batch, whatever its size."""
    server = Running(lambda: ToyRetriever(seconds=0.02), ServerOptions(cache_size=0)).ready()
    yield server
    server.stop()


def test_figures_agree_with_what_was_sent_and_with_the_server(slow):
    result = run_bench(BenchOptions(slow.url, concurrency=4, queries=100, batch_size=5), QUERIES)
    assert (result.requests, result.queries, result.distinct_queries) == (20, 100, 100)
    assert result.errors == {}
    assert result.latency.p50 <= result.latency.p95 <= result.latency.p99 <= result.latency.max
    assert result.latency.p50 >= 20
    assert 20 <= result.stages["search"].p50 < result.latency.p50
    # Five batches in a row at the least (20 requests, 4 at once), twenty milliseconds each.
    assert result.seconds >= 0.1
    assert result.queries_per_second == pytest.approx(100 / result.seconds)
    assert set(result.stages) == {"queue", "encode", "search", "fetch", "wire"}
    parts = sum(spread.mean for spread in result.stages.values())
    assert parts == pytest.approx(result.latency.mean, rel=0.01)
    assert 0 < result.generator_cpu_share < 1
    assert slow.metrics()["rexrag_retrieval_queries_total"] >= 100 + 1 + 40  # a first one, and two warm requests each


def test_the_table_and_the_json_hold_the_same_figures(slow):
    result = run_bench(BenchOptions(slow.url, concurrency=2, queries=10), QUERIES)
    table = result.table()
    assert f"{slow.url}: 10 requests of 1 query (top 3), 2 at once" in table
    assert re.search(rf"^request +{result.latency.p50:.2f} +{result.latency.p95:.2f} ", table, re.MULTILINE)
    assert "load generator: 1 process, " in table
    data = json.loads(json.dumps(result.as_dict()))
    assert data["latency"]["p99"] == result.latency.p99
    assert data["queries_per_second"] == result.queries_per_second


def test_several_generator_processes_send_everything_once(slow):
    before = slow.metrics()["rexrag_retrieval_queries_total"]
    result = run_bench(BenchOptions(slow.url, concurrency=5, queries=101, batch_size=2, processes=2), QUERIES)
    assert (result.requests, result.queries, result.errors) == (51, 101, {})
    assert result.generator_processes == 2
    assert slow.metrics()["rexrag_retrieval_queries_total"] == before + 101 + 1 + 2 * 2 * 5


def test_a_generator_process_that_dies_ends_the_benchmark(slow):
    def kill_one():
        until(lambda: len(multiprocessing.active_children()) == 2)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(BenchError, match="a load generator process died"):
        run_bench(BenchOptions(slow.url, concurrency=2, queries=100_000, processes=2), QUERIES)
    killer.join()
    until(lambda: not multiprocessing.active_children())


def test_passwords_are_sent_and_not_shown():
    import fastapi

    app, seen = fastapi.FastAPI(), set()

    @app.post("/retrieve")
    def retrieve(payload: dict, request: fastapi.Request):
        seen.add((request.headers["authorization"], request.headers["host"]))
        return {"result": [[{"document": {"contents": "T\nx"}, "score": 1.0}]]}

    server = Running(app=app)
    url = server.url.replace("//", "//user:s%3Acret@")
    result = run_bench(BenchOptions(url, concurrency=1, queries=2), QUERIES)
    assert (result.queries, result.target) == (2, server.url)
    assert seen == {("Basic dXNlcjpzOmNyZXQ=", server.url.removeprefix("http://"))}  # user:s:cret
    server.stop()


def test_an_answer_that_is_no_http_is_counted():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"what?\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        load = Load(f"http://127.0.0.1:{listener.getsockname()[1]}", [["a"]], [], 1, 1, 5.0)
        samples = drive(load, lambda: None, lambda _: None)
        thread.join()
    assert samples.errors == {"connection failed (IndexError)": 1}


def test_repeated_queries_are_said_to_be(slow):
    result = run_bench(BenchOptions(slow.url, concurrency=2, queries=10), QUERIES[:4])
    assert result.distinct_queries == 4
    assert result.notes == ("4 of the 10 queries are distinct; a cache may have answered the others",)


def test_errors_are_counted_by_cause():
    server = Running(ToyRetriever, ServerOptions(max_query_characters=10)).ready()
    queries = ["1", "12345678901", "2", "3 nothing", "4"] * 4
    result = run_bench(BenchOptions(server.url, concurrency=2, queries=20), queries)
    assert (result.requests, result.queries) == (20, 12)
    causes = {cause.split(",")[0][:60]: count for cause, count in result.errors.items()}
    assert sorted(causes.values()) == [4, 4]
    assert any(cause.startswith('HTTP 422: {"detail":"query 0 of 1 has 11 characters') for cause in causes)
    assert any(cause.startswith('HTTP 500: {"detail":"query 0 of 1') for cause in causes)
    assert "failed 4 times: HTTP 422" in result.table()
    server.stop()


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b'{"result": [[{}]]}', "1 result for 2 queries"),
        (b'{"result": [[{}], []]}', "an empty ranking"),
        (b'{"results": []}', "no Search-R1 answer"),
        (b'{"result": 2}', "no Search-R1 answer"),
        (b"<html>", "no Search-R1 answer"),
    ],
)
def test_a_wrong_answer_is_an_error_with_a_name(answer, cause):
    import fastapi

    app = fastapi.FastAPI()
    good = {"document": {"contents": "T\nx"}, "score": 1.0}

    @app.post("/retrieve")
    def retrieve(payload: dict):
        if len(payload["queries"]) == 1:
            return {"result": [[good]]}
        return fastapi.Response(answer)

    server = Running(app=app)
    result = run_bench(BenchOptions(server.url, concurrency=1, queries=4, batch_size=2), QUERIES)
    assert result.latency is None
    [(found, count)] = result.errors.items()
    assert found.startswith(cause)
    assert count == 2
    assert "0 queries/s answered, 2 requests failed" in result.table()
    server.stop()


def test_a_server_that_streams_or_hangs_is_measured_or_named():
    import fastapi

    app = fastapi.FastAPI()

    @app.post("/retrieve")
    def retrieve(payload: dict):
        if "hang" in payload["queries"]:
            time.sleep(1)
        result = [[{"document": {"contents": "T\nx"}, "score": 1.0}] for _ in payload["queries"]]
        text = json.dumps({"result": result})
        return fastapi.responses.StreamingResponse(iter([text[:10], text[10:]]))

    server = Running(app=app)
    result = run_bench(BenchOptions(server.url, concurrency=1, queries=3, timeout=0.5), ["1", "hang", "2"])
    assert result.queries == 2
    assert result.errors == {"no answer within 0.5 s": 1}
    assert result.stages == {}  # this server tells no timings
    server.stop()


def test_a_server_that_is_away_is_an_error_before_anything_is_measured():
    with pytest.raises(RetrievalError, match=r"127\.0\.0\.1:9"):
        run_bench(BenchOptions("http://127.0.0.1:9", queries=1), ["1"])


def test_in_process_figures_have_stages_and_no_wire():
    result = bench_in_process(ToyRetriever(seconds=0.002), QUERIES[:50], batch_size=20)
    assert (result.requests, result.queries, result.batch_size, result.concurrency) == (3, 50, 20, 1)
    assert set(result.stages) == {"encode", "search", "fetch"}
    assert result.stages["search"].p50 >= 2
    assert result.queries_per_second <= 50 / 0.006
    assert "load generator" not in result.table()


def test_spread_in_milliseconds_of_known_values():
    spread = Spread.of([0.001 * n for n in range(1, 102)])  # 1 to 101 ms
    assert (spread.p50, spread.p95, spread.p99, spread.max) == pytest.approx((51, 96, 100, 101))
    assert spread.mean == pytest.approx(51)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000' is no http(s) address"),
        ({"concurrency": 0}, "concurrency=0; it must be an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5; it must be an integer"),
        ({"timeout": float("inf")}, "timeout=inf seconds"),
        ({"processes": 3, "concurrency": 2}, "processes=3 cannot share concurrency=2; use 1 to 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(BenchError) as refused:
        BenchOptions(**{"url": "http://127.0.0.1:8000", **values})
    assert message in str(refused.value)


def test_blank_and_missing_queries_are_refused():
    with pytest.raises(BenchError, match="no query was given"):
        bench_in_process(ToyRetriever(), [], 1)
    with pytest.raises(BenchError, match="query 1 is blank"):
        bench_in_process(ToyRetriever(), ["1", " "], 1)
    with pytest.raises(BenchError, match="batch_size=0; it must be at least 1"):
        bench_in_process(ToyRetriever(), ["1"], 0)


def test_queries_come_from_json_lines_or_text(tmp_path):
    lines = tmp_path / "qa.jsonl"
    lines.write_text('{"question": "who?"}\n\n{"query": "where?", "id": 2}\n', encoding="utf-8")
    assert load_queries(lines) == ["who?", "where?"]
    text = tmp_path / "queries.txt"
    text.write_text("\ufeffwho?\n\n  where? \n", encoding="utf-8")
    assert load_queries(text) == ["who?", "where?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"question": "x"}\n{"text": "y"}\n',
            r"line 2: no text under query or question, found \['text'\]",
        ),
        ("a.jsonl", b'{"query": " "}\n', "line 1: no text under query or question"),
        ("a.jsonl", b'{"query": \n', "line 1: broken JSON"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.txt", b" \n", "the file is empty; it needs one query a line"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.txt", None, "no such file"),
    ],
)
def test_broken_query_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchError, match=message):
        load_queries(path)


def test_invented_queries_are_words_of_single_passages_distinct_and_the_same_each_time():
    texts = {str(n): f"alpha{n} beta{n} gamma{n} delta{n} epsilon{n} zeta{n} eta{n} theta{n}" for n in range(30)}

    def search(queries, top_k):
        starts = range(len(queries))
        return [
            [Passage(str(n % 30), "", texts[str(n % 30)]) for n in range(start, start + top_k)] for start in starts
        ]

    made = invent_queries(search, 500, seed=1)
    assert made == invent_queries(search, 500, seed=1)
    assert made != invent_queries(search, 500, seed=2)
    assert len(set(made)) == 500
    for query in made:
        words = query.split()
        assert 3 <= len(words) <= 8
        [number] = {re.sub(r"\D", "", word) for word in words}
        source = texts[number].split()
        assert [source.index(word) for word in words] == sorted(source.index(word) for word in words)


def test_a_corpus_of_few_words_repeats_queries_instead_of_waiting_for_ever():
    made = invent_queries(lambda queries, top_k: [[Passage("1", "", "one two three")]] * len(queries), 5)
    assert made == ["one two three"] * 5


def test_without_a_query_file_the_servers_own_words_are_asked(slow):
    result = run_bench(BenchOptions(slow.url, concurrency=4, queries=30))
    assert (result.queries, result.errors) == (30, {})
