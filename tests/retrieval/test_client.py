"""The client against a real HTTP server over loopback, well behaved and not."""

import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import pytest

from rex_rag.retrieval.base import DEFAULT_MAX_ATTEMPTS, RetrievalError, Retriever
from rex_rag.retrieval.remote import endpoint, servers
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.retrieval.remote.servers import MAX_BACKOFF_SECONDS
from tests.retrieval.running import until
from tests.retrieval.servers import free_port

pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
pytest.importorskip("uvicorn", reason="the HTTP tests need uvicorn: install the dev extra")

CLIENT = "rex_rag.retrieval.remote"


def test_ranks_are_read_in_order(server, remote):
    retriever = remote("ok")
    rankings = retriever.search(["oslo", "rome"], top_k=2)
    assert [[(p.id, p.title, p.text, p.score) for p in ranking] for ranking in rankings] == [
        [("d0", "T0", "about oslo", 1.0), ("d1", "T1", "about oslo", 0.5)],
        [("d0", "T0", "about rome", 1.0), ("d1", "T1", "about rome", 0.5)],
    ]
    assert server.payloads[-1] == {"queries": ["oslo", "rome"], "topk": 2, "return_scores": True}
    assert isinstance(retriever, Retriever)
    assert retriever.description == f"retrieval server at {server.url}/ok/retrieve"


def test_url_may_already_name_the_endpoint(server):
    for suffix in ("", "/", "/retrieve", "/retrieve/"):
        assert RemoteRetriever(f"{server.url}/ok{suffix}").urls == (f"{server.url}/ok/retrieve",)


def test_documents_without_a_wrapper_have_no_score(remote):
    [[passage]] = remote("bare").search(["oslo"], top_k=1)
    assert (passage.id, passage.title, passage.text, passage.score) == ("d0", "T0", "about oslo", None)


def test_title_and_text_documents_without_id_get_a_stable_one(remote):
    [[first]] = remote("title-text").search(["a"], top_k=1)
    [[second]] = remote("title-text").search(["b"], top_k=1)
    assert (first.title, first.text, first.score) == ("T", "x", 2.0)
    # sha1("T\nx"), first 16 digits
    assert first.id == second.id == "30a2a83f93e99f89"


def test_more_passages_than_asked_are_cut(remote):
    assert [p.id for p in remote("generous").search(["a"], top_k=2)[0]] == ["d0", "d1"]


def test_a_passage_without_a_text_costs_that_passage_and_is_told_once(remote, caplog):
    retriever = remote("one-blank")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [p.id for p in retriever.search(["oslo"], top_k=3)[0]] == ["d0", "d1"]
    [said] = [record.getMessage() for record in caplog.records]
    assert "/one-blank/retrieve: 1 result for query 'oslo' cannot be used: empty text (title 'T9') in" in said
    with pytest.raises(RetrievalError, match=r"2 results for query 'oslo' cannot be used: empty .*: mend what"):
        remote("all-blank").search(["oslo"], top_k=3)


def test_a_blank_query_is_asked_like_any_other(remote):
    assert [len(ranking) for ranking in remote("ok").search(["oslo", "", " \n"], top_k=2)] == [2, 2, 2]


def test_no_queries_need_no_server(server, remote):
    assert remote("idle").search([], top_k=1) == []
    assert "idle" not in server.calls


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_passing_trouble_is_retried_and_told_once_and_its_end_too(server, remote, caplog, status):
    behaviour = f"status-{status}-3"
    with caplog.at_level(logging.INFO, logger=CLIENT):
        assert remote(behaviour, max_attempts=4).search(["oslo"], 1)[0][0].text == "about oslo"
    assert server.calls[behaviour] == 4
    warning, end = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert warning[0] == "WARNING" and f"/{behaviour}/retrieve" in warning[1]
    assert f"HTTP {status}" in warning[1] and "out of order" in warning[1]
    assert end[0] == "INFO" and "answers again" in end[1]


def test_trouble_that_comes_and_goes_is_not_told_each_time_and_a_new_outage_is(server, remote, caplog, monkeypatch):
    retriever = remote("ok")

    def outage():
        server.statuses["ok"] = 500
        with ThreadPoolExecutor(1) as pool:
            search = pool.submit(retriever.search, ["a"], 1)
            time.sleep(0.05)
            server.statuses["ok"] = 200
            search.result()

    def warnings():
        return sum(record.name.startswith(CLIENT) and record.levelno == logging.WARNING for record in caplog.records)

    for _ in range(5):
        outage()
    assert warnings() == 1
    monkeypatch.setattr(servers, "SECONDS_BETWEEN_WARNINGS", 0.0)
    outage()
    assert warnings() == 2


def test_attempts_are_bounded_and_the_error_names_url_attempts_and_cause(server, remote):
    retriever = remote("status-500-99", max_attempts=3)
    with pytest.raises(RetrievalError, match=r"failed after 3 attempts: HTTP 500 .*out of order") as error:
        retriever.search(["oslo"], 1)
    assert retriever.urls[0] in str(error.value)
    assert server.calls["status-500-99"] == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_repeated(server, remote, status):
    behaviour = f"status-{status}-99"
    with pytest.raises(RetrievalError, match=f"failed after 1 attempt: HTTP {status}.*not repeated"):
        remote(behaviour, max_attempts=5).search(["oslo"], 1)
    assert server.calls[behaviour] == 1


def test_a_hanging_server_costs_the_timeout_and_is_retried(server, remote):
    assert remote("hang-once", timeout=0.3, max_attempts=2).search(["oslo"], 1)[0][0].id == "d0"
    assert server.calls["hang-once"] == 2


def test_a_server_that_only_hangs_is_an_error(remote):
    started = time.monotonic()
    with pytest.raises(RetrievalError, match=r"failed after 2 attempts: no answer within 0\.2 s"):
        remote("hang", timeout=0.2, max_attempts=2).search(["oslo"], 1)
    assert time.monotonic() - started < 0.9


@pytest.mark.parametrize("retry_after", ["1", formatdate(time.time() + 3600, usegmt=True)])
def test_a_server_that_asks_to_be_spared_is_spared_within_bounds(server, remote, monkeypatch, retry_after):
    monkeypatch.setattr(endpoint, "MAX_RETRY_AFTER_SECONDS", 0.4)
    retriever = remote("status-503-1", max_attempts=2)
    server.headers["status-503-1"] = {"retry-after": retry_after}
    started = time.monotonic()
    retriever.search(["oslo"], 1)
    assert 0.4 <= time.monotonic() - started < 0.9


def test_a_server_that_loads_is_asked_as_soon_as_it_says_it_is_ready(server, remote):
    retriever = remote("ok", backoff=30.0, max_attempts=2)
    server.statuses["ok"] = server.health["ok"] = 503
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(retriever.search, ["a"], 1)
        time.sleep(0.4)
        assert not search.done()
        server.statuses["ok"] = server.health["ok"] = 200
        # The pause would have been 15 to 30 s.
        assert search.result(timeout=4.0)[0][0].text == "about a"


def test_an_unreadable_wish_to_be_spared_is_none(server, remote):
    retriever = remote("status-503-1", max_attempts=2)
    server.headers["status-503-1"] = {"retry-after": "soon"}
    started = time.monotonic()
    retriever.search(["oslo"], 1)
    assert time.monotonic() - started < 0.5


def test_a_dripping_server_cannot_stretch_the_timeout(remote):
    # About 75 characters at 0.05 s each; every single read stays far below the timeout.
    started = time.monotonic()
    with pytest.raises(RetrievalError, match=r"no answer within 0\.3 s"):
        remote("drip", timeout=0.3, max_attempts=1).search(["oslo"], 1)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        ("malformed", "malformed JSON"),
        ("not-utf8", "malformed JSON"),
        ("miscount", "1 result for 2 queries"),
        ("empty", "the result of query 'oslo' is empty"),
        ("no-result", 'no list under "result"'),
        ("array", 'no list under "result"'),
        ("flat", "result 0 is not a list"),
        ("text-documents", "1 result for query 'oslo' cannot be used: not an object"),
        ("no-text", "1 result for query 'oslo' cannot be used: missing fields"),
        ("odd-score", "its score is not a number: 'high'"),
        ("infinite", "its score is not finite: inf"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(server, remote, behaviour, cause):
    retriever = remote(behaviour)
    with pytest.raises(RetrievalError) as error:
        retriever.search(["oslo", "rome"], 1)
    assert f"search at {retriever.urls[0]} failed after 1 attempt: " in str(error.value)
    assert cause in str(error.value)
    assert server.calls[behaviour] == 1


def test_an_answer_cut_off_is_asked_for_again(server, remote):
    assert remote("truncated-once", max_attempts=2).search(["oslo"], 1)[0][0].text == "about oslo"
    assert server.calls["truncated-once"] == 2


def test_an_answer_of_unannounced_length_that_breaks_off_is_asked_for_again():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            searches = 0
            while searches < 2:
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(65536)
                    is_search = request.startswith(b"POST")  # else the client looks at the server's health
                    while is_search and not request.endswith(b"}"):
                        request += connection.recv(65536)
                    searches += is_search
                    connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"result": [[{"docu')

        thread = threading.Thread(target=serve)
        thread.start()
        retriever = RemoteRetriever(f"http://127.0.0.1:{listener.getsockname()[1]}", max_attempts=2, backoff=0.01)
        with pytest.raises(RetrievalError, match=r"failed after 2 attempts: malformed JSON .*may have been cut off"):
            retriever.search(["oslo"], 1)
        thread.join()


def test_an_answer_beyond_the_cap_is_refused_with_the_number(server, remote, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_RESPONSE_BYTES", 2000)
    with pytest.raises(RetrievalError, match=r"failed after 1 attempt: an answer of at least 3,000 bytes.*2,000"):
        remote("endless").search(["oslo"], 1)  # 1,000 bytes a chunk, a million in all
    with pytest.raises(RetrievalError, match=r"failed after 1 attempt: an answer of at least 1,000,000 bytes.*2,000"):
        remote("announced").search(["oslo"], 1)
    monkeypatch.undo()
    assert len(remote("ok").search(["oslo"] * 30, 1)) == 30


def test_check_tells_a_server_that_is_away():
    retriever = RemoteRetriever(f"http://127.0.0.1:{free_port()}", max_attempts=2, backoff=0.01)
    with pytest.raises(RetrievalError, match=r"failed after 2 attempts: connection failed.*Is the server running"):
        retriever.check()


def test_check_sends_one_real_query(server, remote):
    remote("checked").check()
    assert server.calls["checked"] == 1
    assert len(server.payloads[-1]["queries"]) == 1 and server.payloads[-1]["topk"] == 1


def test_many_threads_each_get_their_own_answer(remote):
    retriever = remote("threads")
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda n: retriever.search([f"q{n}"], 1)[0][0].text, range(200)))
    assert texts == [f"about q{n}" for n in range(200)]


@pytest.mark.parametrize(("count", "sizes"), [(64, [64]), (65, [32, 33]), (1000, [62] * 8 + [63] * 8)])
def test_big_batches_are_split_evenly_and_come_back_in_order(server, remote, count, sizes):
    retriever = remote("split", max_queries_per_request=64)
    queries = [f"q{n}" for n in range(count)]
    rankings = retriever.search(queries, 1)
    assert [ranking[0].text for ranking in rankings] == [f"about {query}" for query in queries]
    assert sorted(len(payload["queries"]) for payload in server.payloads) == sizes


def test_one_refused_part_ends_the_whole_search_and_is_named(server, remote):
    retriever = remote("poisoned", max_queries_per_request=2)
    with pytest.raises(RetrievalError, match=r"failed after 1 attempt: HTTP 422"):
        retriever.search(["a", "b", "c", "poison", "d", "e"], 1)


def test_the_parts_left_do_not_outlive_a_failed_search(server, remote):
    # Of two parts one is refused at once, the other would wait for the server for many minutes.
    retriever = remote("poisoned", max_queries_per_request=2, max_attempts=99, backoff=30.0)
    server.statuses["poisoned"] = 503
    started = time.monotonic()
    with pytest.raises(RetrievalError, match=r"failed after 1 attempt: HTTP 422"):
        retriever.search(["a", "b", "poison"], 1)
    retriever._pool.shutdown(wait=True)
    assert time.monotonic() - started < 2.0


def test_closing_the_client_ends_a_search_that_waits(server, remote):
    retriever = remote("status-503-99", max_attempts=99, backoff=30.0)
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(retriever.search, ["a"], 1)
        time.sleep(0.2)
        assert not search.done()
        retriever.close()
        assert "was closed" in str(search.exception(timeout=1.0))


def test_closing_the_client_ends_a_search_whose_parts_wait_for_a_thread(server, remote):
    # Eight parts are under way and will be answered, twelve have not begun.
    retriever = remote("ok", max_queries_per_request=1)
    server.delays["ok"] = 0.5
    errors = []

    def search():
        try:
            retriever.search([f"q{n}" for n in range(20)], 1)
        except Exception as error:
            errors.append(error)

    searching = threading.Thread(target=search, daemon=True)
    searching.start()
    until(lambda: server.calls.get("ok", 0) >= 8)
    retriever.close()
    searching.join(timeout=3.0)
    [error] = errors
    assert isinstance(error, RetrievalError) and "was closed" in str(error)


def test_a_closed_client_says_so(remote):
    retriever = remote("ok")
    retriever.close()
    for call in (retriever.check, lambda: retriever.search(["a"], 1), lambda: retriever.search(["a"] * 600, 1)):
        with pytest.raises(RetrievalError, match="was closed; make a new one"):
            call()


def test_who_is_turned_away_waits_even_while_others_are_answered(server, remote):
    # An overloaded server answers some and turns others away: an answer to others is no reason to ask again at once.
    retriever = remote("overloaded", max_attempts=3, backoff=0.4)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        turned_away = pool.submit(retriever.search, ["poison"], 1)
        while not turned_away.done():
            assert retriever.search(["a"], 1)[0][0].text == "about a"
    assert "failed after 3 attempts: HTTP 503" in str(turned_away.exception())
    assert time.monotonic() - started >= 0.2 + 0.4


def test_waiting_leaves_the_global_draws_alone(remote):
    random.seed(5)
    expected = random.random()
    random.seed(5)
    remote("status-500-2", max_attempts=3).search(["oslo"], 1)
    assert random.random() == expected


def test_the_default_patience_is_four_to_five_minutes():
    retriever = RemoteRetriever("http://127.0.0.1:1")
    waits = [sum(retriever._fleet.delay(attempt) for attempt in range(1, DEFAULT_MAX_ATTEMPTS)) for _ in range(200)]
    assert 240 < sum(waits) / len(waits) < 300


def test_loopback_is_never_behind_a_proxy_and_the_rest_is(server, remote, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    assert remote("ok").search(["oslo"], 1)[0][0].text == "about oslo"
    monkeypatch.setenv("HTTP_PROXY", server.url)
    away = RemoteRetriever("http://retriever.invalid/proxied", max_attempts=1)
    assert away.search(["oslo"], 1)[0][0].text == "about oslo"
    assert server.calls == {"ok": 1, "proxied": 1}


def test_waiting_doubles_up_to_its_bound():
    retriever = RemoteRetriever("http://127.0.0.1:1", backoff=2.0)
    for attempt, longest in ((1, 2.0), (2, 4.0), (3, 8.0), (10, MAX_BACKOFF_SECONDS), (5000, MAX_BACKOFF_SECONDS)):
        delays = [retriever._fleet.delay(attempt) for _ in range(50)]
        assert all(longest / 2 <= delay <= longest for delay in delays)
        assert len(set(delays)) > 1


@pytest.mark.parametrize(("queries", "top_k"), [(["a", None], 1), (["a"], 0), (["a"], True), ("a", 1)])
def test_a_request_that_asks_nothing_is_refused_without_a_call(server, remote, queries, top_k):
    with pytest.raises(RetrievalError):
        remote("refused").search(queries, top_k)
    assert "refused" not in server.calls


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host/?a=1", "http://host:port"]
)
def test_a_malformed_url_is_refused(url):
    with pytest.raises(RetrievalError, match="retriever URL"):
        RemoteRetriever(url)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": float("inf")},
        {"max_attempts": 0},
        {"max_queries_per_request": 0},
        {"max_queries_per_request": True},
        {"backoff": -1},
    ],
)
def test_odd_options_are_refused(options):
    with pytest.raises(RetrievalError, match=next(iter(options))):
        RemoteRetriever("http://127.0.0.1:1", **options)


def test_passwords_stay_out_of_descriptions():
    retriever = RemoteRetriever("http://user:secret@example.org:8000")
    assert retriever.urls[0] == "http://example.org:8000/retrieve"
    assert "secret" not in retriever.description


@pytest.mark.parametrize(
    "url", ["http://user:s3cret@host/?x=1", "ftp://user:s3cret@host", "http://user:s3cret@host:70000", "//u:s3cret@[x"]
)
def test_passwords_stay_out_of_what_is_said_of_an_odd_url(url):
    with pytest.raises(RetrievalError, match=r"retriever URL .*use http://host:port") as error:
        RemoteRetriever(url)
    assert "s3cret" not in str(error.value)


def test_passwords_are_sent_and_stay_out_of_every_log(server, caplog):
    server.reset()
    retriever = RemoteRetriever(server.url.replace("//", "//user:s%3Acret@") + "/status-500-2", backoff=0.01)
    with caplog.at_level(logging.DEBUG):
        retriever.search(["a"], 1)
    assert server.authorization == "Basic dXNlcjpzOmNyZXQ="  # user:s:cret
    assert "cret" not in caplog.text and len(caplog.records) > 2
