"""The client over several servers, some of which are killed, stopped, slow, out of order or talk nonsense."""

import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.remote.client import RemoteRetriever
from tests.retrieval.running import until
from tests.retrieval.servers import ProcessServer, free_port

pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
pytest.importorskip("uvicorn", reason="the HTTP tests need uvicorn: install the dev extra")

CLIENT = "rex_rag.retrieval.remote"


@pytest.fixture
def processes():
    started = [ProcessServer("first"), ProcessServer("second")]
    yield started
    for process in started:
        process.kill()


def told(caplog, level):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == level and record.name.startswith(CLIENT)
    ]


def search_from_threads(retriever, threads, searches):
    """Every search asks two queries of its own; returns how many came back swapped or incomplete."""

    def ask(number):
        rankings = retriever.search([f"q{number}", f"r{number}"], 1)
        return [ranking[0].text for ranking in rankings] != [f"about q{number}", f"about r{number}"]

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(ask, range(searches)))


def test_the_description_names_every_server_without_passwords():
    retriever = RemoteRetriever(["http://user:secret@one:8000", "http://two:8000/retrieve"])
    assert retriever.description == "retrieval servers at http://one:8000/retrieve, http://two:8000/retrieve"
    assert retriever.urls == ("http://one:8000/retrieve", "http://two:8000/retrieve")


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "no retriever URL was given"),
        (["http://a:1", "http://a:1/retrieve/"], "name a server twice"),
        (["http://a:1", "b:1"], "retriever URL 'b:1'"),
    ],
)
def test_odd_lists_of_urls_are_refused(urls, message):
    with pytest.raises(RetrievalError, match=message):
        RemoteRetriever(urls)


def test_another_server_is_asked_at_once_and_the_failed_one_is_spared(server, remote, caplog):
    retriever = remote("status-500-99", "ok", backoff=30.0)
    with caplog.at_level(logging.INFO, logger=CLIENT):
        started = time.monotonic()
        for number in range(20):
            assert retriever.search([f"q{number}"], 1)[0][0].text == f"about q{number}"
        assert time.monotonic() - started < 2.0
        # A healthy look alone (it has no health page, which counts as up) earns no second chance before its time.
        time.sleep(0.4)
        for _ in range(3):
            retriever.search(["a"], 1)
            time.sleep(0.1)
    assert server.calls == {"status-500-99": 1, "ok": 23}
    [warning] = told(caplog, "WARNING")
    assert "/status-500-99/retrieve" in warning and "HTTP 500" in warning and "out of order" in warning


@pytest.mark.parametrize("behaviour", ["malformed", "miscount", "status-404-99"])
def test_a_server_that_is_alone_in_its_answers_is_set_aside_by_name(server, remote, caplog, behaviour):
    retriever = remote(behaviour, "ok", backoff=30.0)
    for _ in range(10):
        assert len(retriever.search(["a", "b"], 1)) == 2
    assert server.calls == {behaviour: 1, "ok": 10}
    [warning] = told(caplog, "WARNING")
    assert f"/{behaviour}/retrieve" in warning


def test_a_request_that_every_server_refuses_is_nobodys_fault(server, remote, caplog):
    retriever = remote("poisoned", "poisoned~2")
    with pytest.raises(RetrievalError) as error:
        retriever.search(["poison"], 1)
    message = str(error.value)
    assert message.startswith("search at all 2 servers: ")
    for name in ("poisoned", "poisoned~2"):
        assert f"{server.url}/{name}/retrieve failed after 1 attempt: HTTP 422" in message
    for _ in range(4):
        retriever.search(["a"], 1)
    assert server.calls == {"poisoned": 3, "poisoned~2": 3}
    assert not told(caplog, "WARNING")


def test_the_error_names_every_server_with_its_attempts_and_its_last_trouble(server, remote):
    gone = f"http://127.0.0.1:{free_port()}"
    retriever = remote("malformed", "status-500-99", "hang", gone, timeout=0.2, max_attempts=2)
    with pytest.raises(RetrievalError) as error:
        retriever.search(["oslo"], 1)
    message = str(error.value)
    assert message.startswith("search at all 4 servers: ")
    assert f"{server.url}/malformed/retrieve failed after 1 attempt: malformed JSON" in message
    assert f"{server.url}/status-500-99/retrieve failed after 2 attempts: HTTP 500 " in message
    assert f"{server.url}/hang/retrieve failed after 2 attempts: no answer within 0.2 s" in message
    assert f"{gone}/retrieve failed after 2 attempts: no sign of life (ConnectError" in message
    assert "Are the servers running and reachable from here?" in message
    assert server.calls == {"malformed": 1, "status-500-99": 2, "hang": 2}


def test_equal_servers_get_equal_shares(server, remote):
    retriever = remote("ok~1", "ok~2")
    server.delays.update({"ok~1": 0.005, "ok~2": 0.005})
    assert search_from_threads(retriever, 16, 320) == 0
    assert sum(server.calls.values()) == 320
    assert min(server.calls.values()) >= 0.3 * 320


def test_searches_one_after_the_other_take_turns(server, remote):
    retriever = remote("ok~1", "ok~2", "ok~3")
    for _ in range(30):
        retriever.search(["a"], 1)
    assert server.calls == {"ok~1": 10, "ok~2": 10, "ok~3": 10}


def test_a_slow_server_gets_fewer(server, remote):
    retriever = remote("ok~slow", "ok~fast")
    server.delays.update({"ok~slow": 0.1, "ok~fast": 0.01})
    assert search_from_threads(retriever, 8, 200) == 0
    assert server.calls["ok~slow"] < 0.3 * 200
    assert server.calls["ok~slow"] > 0


def test_a_batch_is_shared_among_the_servers_in_service(server, remote):
    retriever = remote("ok~1", "ok~2", "status-500-99", backoff=30.0)
    queries = [f"q{n}" for n in range(100)]
    texts = [f"about {query}" for query in queries]
    assert [ranking[0].text for ranking in retriever.search(queries, 1)] == texts  # 3 parts, one asked twice
    server.reset()
    assert [ranking[0].text for ranking in retriever.search(queries, 1)] == texts
    assert [len(payload["queries"]) for payload in server.payloads] == [50, 50]
    assert server.calls == {"ok~1": 1, "ok~2": 1}


def test_a_server_killed_under_load_costs_nothing_but_time_and_comes_back(processes, remote, caplog):
    first, second = processes
    first.start()
    second.start()
    retriever = remote(first.url, second.url)
    stop, seconds = threading.Event(), []

    def ask(worker):
        number = 0
        while not stop.is_set():
            queries = [f"q{worker}-{number}", f"r{worker}-{number}"]
            started = time.monotonic()
            rankings = retriever.search(queries, 1)
            seconds.append(time.monotonic() - started)
            assert [ranking[0].text for ranking in rankings] == [f"about {query}" for query in queries]
            number += 1

    def go_on(searches):
        target = len(seconds) + searches
        until(lambda: len(seconds) >= target)

    with caplog.at_level(logging.INFO, logger=CLIENT), ThreadPoolExecutor(16) as pool:
        workers = [pool.submit(ask, worker) for worker in range(16)]
        try:
            go_on(200)
            first.kill()
            go_on(300)
            first.start()
            until(lambda: told(caplog, "INFO"))
            go_on(200)
            second.kill()
            go_on(300)
        finally:
            stop.set()
        for worker in workers:
            worker.result()
    assert max(seconds) < 2.0
    warnings, [end] = told(caplog, "WARNING"), told(caplog, "INFO")
    assert [first.url in text for text in warnings] == [True, False]
    assert second.url in warnings[1]
    assert first.url in end and "answers again" in end


def test_with_every_server_gone_a_search_waits_and_sees_one_come_back(processes, remote, caplog):
    first, second = processes
    retriever = remote(first.url, second.url, backoff=30.0, max_attempts=3)
    with caplog.at_level(logging.INFO, logger=CLIENT), ThreadPoolExecutor(8) as pool:
        searches = [pool.submit(retriever.search, [f"q{n}"], 1) for n in range(8)]
        time.sleep(0.7)
        assert not any(search.done() for search in searches)
        second.start()
        back = time.monotonic()
        texts = [search.result(timeout=10)[0][0].text for search in searches]
        # The first pause alone would have been 15 to 30 s.
        assert time.monotonic() - back < 5.0
    assert texts == [f"about q{n}" for n in range(8)]
    assert sorted(first.url in text for text in told(caplog, "WARNING")) == [False, True]
    [end] = told(caplog, "INFO")
    assert second.url in end


def test_a_server_that_stops_answering_costs_one_timeout_and_returns_when_it_goes_on(processes, remote):
    first, second = processes
    first.start()
    second.start()
    retriever = remote(first.url, second.url, timeout=0.5, backoff=0.1)
    first.signal(signal.SIGSTOP)
    started = time.monotonic()
    for number in range(40):
        assert retriever.search([f"q{number}"], 1)[0][0].id == "second"
    assert 0.5 <= time.monotonic() - started < 1.5
    first.signal(signal.SIGCONT)
    until(lambda: retriever.search(["a"], 1)[0][0].id == "first")


def test_a_server_that_looks_healthy_and_hangs_gets_one_request_on_trial_at_a_time(server, remote):
    retriever = remote("ok~hanging", "ok", timeout=0.3, backoff=0.1)
    server.health["ok~hanging"] = 200
    server.delays.update({"ok~hanging": 0.8, "ok": 0.01})
    stop = time.monotonic() + 2.5

    def ask(number):
        while time.monotonic() < stop:
            assert retriever.search([f"q{number}"], 1)[0][0].text == f"about q{number}"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    # At most the 8 first ones, then trials: pauses of 0.1, 0.2, 0.4, 0.8 s (or half) and 0.3 s for each.
    assert server.calls["ok~hanging"] <= 8 + 5
    assert server.calls["ok"] > 300


def test_a_server_in_order_again_has_its_share_again(server, remote, caplog):
    retriever = remote("ok~1", "ok~2")
    server.statuses["ok~1"], server.health["ok~1"] = 500, 503
    with caplog.at_level(logging.INFO, logger=CLIENT):
        for _ in range(10):
            retriever.search(["a"], 1)
        # Out of order for good: the probes find it unhealthy, and no search is wasted on it.
        assert server.calls == {"ok~1": 1, "ok~2": 10}
        server.statuses["ok~1"], server.health["ok~1"] = 200, 200
        until(lambda: retriever.search(["a"], 1) and server.calls["ok~1"] > 1)
        server.calls.clear()
        for _ in range(10):
            retriever.search(["a"], 1)
        assert server.calls == {"ok~1": 5, "ok~2": 5}
    assert len(told(caplog, "WARNING")) == len(told(caplog, "INFO")) == 1


def test_requests_that_fail_together_count_as_one_failure(server, remote):
    retriever = remote("ok~1", "ok~2", backoff=0.05)
    server.delays.update({"ok~1": 0.2, "ok~2": 0.2})
    server.statuses["ok~1"], server.health["ok~1"] = 500, 200
    assert search_from_threads(retriever, 16, 16) == 0
    assert server.calls["ok~1"] == 8
    server.reset()
    # Eight failures one by one would mean a pause of at least 0.05 x 2^7 / 2 = 3.2 s.
    until(lambda: retriever.search(["a"], 1) and "ok~1" in server.calls, seconds=1.5)


def test_check_warns_of_a_server_that_is_away_and_is_content_with_one(server, remote, caplog):
    gone = f"http://127.0.0.1:{free_port()}"
    remote(gone, "ok", "malformed", backoff=30.0).check()
    warnings = told(caplog, "WARNING")
    assert len(warnings) == 2
    assert any(f"{gone}/retrieve" in text and "connection failed" in text for text in warnings)
    assert any(f"{server.url}/malformed/retrieve" in text and "malformed JSON" in text for text in warnings)
    assert server.calls == {"ok": 1, "malformed": 1}


def test_check_fails_where_none_answers_and_names_them_all(server, remote):
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RetrievalError) as error:
        remote(gone, "status-500-99", "miscount", max_attempts=2).check()
    message = str(error.value)
    assert f"{gone}/retrieve failed after 2 attempts" in message
    assert f"{server.url}/status-500-99/retrieve failed after 2 attempts: HTTP 500" in message
    assert f"{server.url}/miscount/retrieve failed after 1 attempt: 0 results for 1 query" in message


def test_check_waits_for_servers_that_are_still_loading(server, remote):
    remote("status-503-2", "status-503-3", max_attempts=4).check()
    assert server.calls == {"status-503-2": 3, "status-503-3": 3}


def test_check_warns_of_servers_over_different_indexes(remote, caplog):
    remote("ok~1", "ok~2").check()
    assert not caplog.records
    remote("ok", "other-index").check()
    [warning] = told(caplog, "WARNING")
    assert "do not hold the same index" in warning and "/other-index/retrieve: 'Z else'" in warning
