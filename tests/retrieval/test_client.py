"""The client against a real HTTP server over loopback, well behaved and not."""

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rex_rag.retrieval.base import RetrievalError, Retriever
from rex_rag.retrieval.client import MAX_BACKOFF_SECONDS, RemoteRetriever

fastapi = pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
uvicorn = pytest.importorskip("uvicorn", reason="the HTTP tests need uvicorn: install the dev extra")

BACKOFF = 0.01


def _answer(queries, top_k):
    return [
        [
            {"document": {"id": f"d{rank}", "contents": f'"T{rank}"\nabout {query}'}, "score": 1.0 / (1 + rank)}
            for rank in range(top_k)
        ]
        for query in queries
    ]


class Server:
    """An application whose path names its behaviour: `{url}/{behaviour}/retrieve`."""

    def __init__(self):
        self.calls = {}
        self.payloads = []
        self._lock = threading.Lock()
        app = fastapi.FastAPI()

        @app.post("/{behaviour}/retrieve")
        def retrieve(behaviour: str, payload: dict):
            with self._lock:
                self.calls[behaviour] = call = self.calls.get(behaviour, 0) + 1
                self.payloads.append(payload)
            return self._behave(behaviour, call, payload)

        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline, "the test server did not start"
            time.sleep(0.01)

    def stop(self):
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def _behave(self, behaviour, call, payload):
        good = _answer(payload["queries"], payload["topk"])
        if behaviour.startswith("status-"):  # status-503-2: the first two calls fail
            _, status, failures = behaviour.split("-")
            if call <= int(failures):
                return fastapi.Response("out of order", status_code=int(status))
        if (behaviour == "hang-once" and call == 1) or behaviour == "hang":
            time.sleep(1.0)
        if behaviour == "drip":
            return fastapi.responses.StreamingResponse(_drip(json.dumps({"result": good})))
        bare = [[hit["document"] for hit in ranking] for ranking in good]
        odd = {
            "bare": {"result": bare},
            "title-text": {"result": [[{"document": {"title": "T", "text": "x"}, "score": 2}]]},
            "generous": {"result": _answer(payload["queries"], payload["topk"] + 5)},
            "miscount": {"result": good[:-1]},
            "empty": {"result": [[] for _ in good]},
            "no-result": {"results": good},
            "array": [good],
            "flat": {"result": [{"document": {}} for _ in good]},
            "text-documents": {"result": [["words"] for _ in good]},
            "no-text": {"result": [[{"document": {"id": "1", "title": "T"}, "score": 1.0}] for _ in good]},
            "odd-score": {"result": [[{"document": bare[0][0], "score": "high"}] for _ in good]},
        }
        if behaviour == "malformed":
            return fastapi.Response('{"result": [[{"docu', media_type="application/json")
        if behaviour == "not-utf8":
            return fastapi.Response(b'{"result": "\xff"}', media_type="application/json")
        return odd.get(behaviour, {"result": good})


def _drip(text):
    for character in text:
        time.sleep(0.05)
        yield character


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def remote(server):
    opened = []

    def make(behaviour, **options):
        server.calls.pop(behaviour, None)
        opened.append(RemoteRetriever(f"{server.url}/{behaviour}", **{"backoff": BACKOFF, **options}))
        return opened[-1]

    yield make
    for retriever in opened:
        retriever.close()


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
        assert RemoteRetriever(f"{server.url}/ok{suffix}").url == f"{server.url}/ok/retrieve"


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


def test_no_queries_need_no_server(server, remote):
    assert remote("idle").search([], top_k=1) == []
    assert "idle" not in server.calls


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_trouble_is_retried_with_a_warning_each(server, remote, caplog, status):
    behaviour = f"status-{status}-2"
    with caplog.at_level(logging.WARNING, logger="rex_rag"):
        assert remote(behaviour, max_attempts=3).search(["oslo"], 1)[0][0].text == "about oslo"
    assert server.calls[behaviour] == 3
    warnings = [r.getMessage() for r in caplog.records if r.name == "rex_rag.retrieval.client"]
    assert len(warnings) == 2
    assert "attempt 1 of 3" in warnings[0] and f"HTTP {status}" in warnings[0] and "out of order" in warnings[0]
    assert "attempt 2 of 3" in warnings[1]


def test_attempts_are_bounded_and_the_error_names_url_attempts_and_cause(server, remote):
    retriever = remote("status-500-99", max_attempts=3)
    with pytest.raises(RetrievalError, match=r"failed after 3 attempts: HTTP 500 .*out of order") as error:
        retriever.search(["oslo"], 1)
    assert retriever.url in str(error.value)
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


def test_a_dripping_server_cannot_stretch_the_timeout(remote):
    # About 75 characters at 0.05 s each; every single read stays far below the timeout.
    started = time.monotonic()
    with pytest.raises(RetrievalError, match=r"not complete after 0\.3 s"):
        remote("drip", timeout=0.3, max_attempts=1).search(["oslo"], 1)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        ("malformed", "malformed JSON"),
        ("not-utf8", "malformed JSON"),
        ("miscount", "1 results for 2 queries"),
        ("empty", "the result of query 'oslo' is empty"),
        ("no-result", 'no list under "result"'),
        ("array", 'no list under "result"'),
        ("flat", "the result of query 'oslo' is not a list"),
        ("text-documents", "a result of query 'oslo' is not an object"),
        ("no-text", "a document for query 'oslo' is unusable: missing fields"),
        ("odd-score", "a score for query 'oslo' is not a number: 'high'"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(server, remote, behaviour, cause):
    retriever = remote(behaviour)
    with pytest.raises(RetrievalError) as error:
        retriever.search(["oslo", "rome"], 1)
    assert f"search at {retriever.url} failed after 1 attempt: " in str(error.value)
    assert cause in str(error.value)
    assert server.calls[behaviour] == 1


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_check_tells_a_server_that_is_away():
    retriever = RemoteRetriever(f"http://127.0.0.1:{_free_port()}", max_attempts=2, backoff=BACKOFF)
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


def test_waiting_doubles_up_to_its_bound():
    retriever = RemoteRetriever("http://127.0.0.1:1", backoff=2.0)
    for attempt, longest in ((1, 2.0), (2, 4.0), (3, 8.0), (10, MAX_BACKOFF_SECONDS)):
        delays = [retriever._delay(attempt) for _ in range(50)]
        assert all(longest / 2 <= delay <= longest for delay in delays)
        assert len(set(delays)) > 1


@pytest.mark.parametrize(("queries", "top_k"), [([""], 1), (["a", " \n"], 1), (["a"], 0), (["a"], True), ("a", 1)])
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


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("inf")}, {"max_attempts": 0}, {"backoff": -1}])
def test_odd_options_are_refused(options):
    with pytest.raises(RetrievalError, match=next(iter(options))):
        RemoteRetriever("http://127.0.0.1:1", **options)


def test_passwords_stay_out_of_descriptions():
    retriever = RemoteRetriever("http://user:secret@example.org:8000")
    assert retriever.url == "http://example.org:8000/retrieve"
    assert "secret" not in retriever.description
