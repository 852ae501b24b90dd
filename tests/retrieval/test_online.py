"""Online engines against a local server that answers as the services document it; nothing leaves this machine.

The shape of each answer follows the services' documentation; the texts are made up. The real services are not seen.
"""

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rex_rag.retrieval.base import RetrievalError, Retriever, checked_search
from rex_rag.retrieval.online.cache import CacheMode, SpendCapReached
from rex_rag.retrieval.online.retriever import (
    CHECK_QUERY,
    MAX_QUERY_CHARACTERS,
    NOTHING_FOUND,
    OnlineRetriever,
    QuotaExceeded,
)
from rex_rag.types import Passage
from tests.retrieval.running import AppServer, until

fastapi = pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
pytest.importorskip("uvicorn", reason="the HTTP tests need uvicorn: install the dev extra")

KEYS = {"GOOGLE_API_KEY": "AIza-very-secret", "GOOGLE_CSE_ID": "017cx", "SERPAPI_API_KEY": "5e4f-very-secret"}
ENGINES = ("google", "serpapi")


def google_answer(query, results):
    answer = {
        "kind": "customsearch#search",
        "queries": {"request": [{"searchTerms": query, "count": len(results), "startIndex": 1, "cx": "017cx"}]},
        "searchInformation": {"searchTime": 0.2, "totalResults": str(len(results))},
    }
    items = [{"kind": "customsearch#result", "displayLink": "w.example", **result} for result in results]
    return {**answer, "items": items} if items else answer  # the field is absent where nothing was found


def serpapi_answer(query, results):
    answer = {
        "search_metadata": {"id": "1", "status": "Success"},
        "search_parameters": {"engine": "google", "q": query, "device": "desktop"},
        "search_information": {"organic_results_state": "Results for exact spelling"},
    }
    if not results:
        answer["search_information"]["organic_results_state"] = "Fully empty"
        return {**answer, "error": "Google hasn't returned any results for this query."}
    organic = [{"position": rank, "source": "W", **result} for rank, result in enumerate(results, start=1)]
    return {**answer, "organic_results": organic}


ANSWERS = {"google": google_answer, "serpapi": serpapi_answer}
QUOTA = {
    "google": (
        429,
        {
            "error": {
                "code": 429,
                "message": "Quota exceeded for quota metric 'Queries' and limit 'Queries per day' of service "
                "'customsearch.googleapis.com'",
                "errors": [{"domain": "global", "reason": "rateLimitExceeded"}],
                "status": "RESOURCE_EXHAUSTED",
            }
        },
    ),
    "serpapi": (429, {"error": "Your account has run out of searches."}),
}
BURST = {
    "google": (429, {"error": {"code": 429, "message": "Quota exceeded for limit 'Queries per minute per user'"}}),
    "serpapi": (429, {"error": "You have exceeded your hourly throughput limit."}),
}


def results(query, count=10):
    return [
        {"title": f"{query} {rank}", "link": f"https://w.example/{rank}", "snippet": f"about {query}, {rank}"}
        for rank in range(1, count + 1)
    ]


class Services:
    """Both services; the query names the behaviour where it is no plain one: `fail 503 2`, `slow`, `nothing`, ..."""

    def __init__(self):
        self.requests = []  # (engine, URL parameters, key in the header)
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        app = fastapi.FastAPI()

        def serve(engine):
            def handle(request: fastapi.Request):
                query = request.query_params["q"]
                with self._lock:
                    self.requests.append((engine, dict(request.query_params), request.headers.get("x-goog-api-key")))
                    call = sum(seen[1]["q"] == query for seen in self.requests)
                    self.busy += 1
                    self.most_busy = max(self.most_busy, self.busy)
                try:
                    return self._behave(engine, query, call)
                finally:
                    with self._lock:
                        self.busy -= 1

            return handle

        app.add_api_route("/customsearch/v1", serve("google"))
        app.add_api_route("/search.json", serve("serpapi"))
        self._running = AppServer(app)
        self.url = self._running.url

    def stop(self):
        self._running.stop()

    def _behave(self, engine, query, call):
        def reply(status, body, **headers):
            return fastapi.responses.JSONResponse(body, status_code=status, headers=headers)

        words = query.split()
        if words[0] == "echo":  # as a proxy may: 300 characters reach into the key
            return fastapi.Response("." * 265 + " https://w.example/?api_key=5e4f-very-secret", status_code=403)
        if words[0] == "fail" and call <= int(words[2]):
            return reply(int(words[1]), {"error": {"message": "try later"} if engine == "google" else "try later"})
        if words[0] == "burst" and call <= int(words[1]):
            return reply(*BURST[engine], **({"Retry-After": words[2]} if len(words) > 2 else {}))
        if words[0] == "slow":
            time.sleep(0.15)
        if words[0] == "hang":
            time.sleep(1.0)
        odd = {
            "quota": lambda: reply(*QUOTA[engine]),
            "badkey": lambda: reply(*_refusal(engine)),
            "text": lambda: fastapi.Response("<html>captcha</html>"),
            "list": lambda: reply(200, [1]),
            "empty-object": lambda: reply(200, {}),
            "not-a-list": lambda: reply(200, {"items": 3, "organic_results": 3, "search_metadata": {}}),
            "entries": lambda: reply(200, {"items": [3], "organic_results": [3], "search_metadata": {}}),
            "no-links": lambda: reply(200, ANSWERS[engine](query, [{"title": "T", "snippet": "s"}])),
            "huge": lambda: fastapi.Response(b" " * (5 * 2**20)),
            "drip": lambda: fastapi.responses.StreamingResponse(_drip(ANSWERS[engine](query, results(query)))),
            "nothing": lambda: reply(200, ANSWERS[engine](query, [])),
            "status": lambda: reply(200, {"search_metadata": {"status": words[1]}, "error": "proxy timeout"}),
            "odd-results": lambda: fastapi.Response(json.dumps(ANSWERS[engine](query, ODD_RESULTS))),
        }
        if words[0] in odd:
            return odd[words[0]]()
        return reply(200, ANSWERS[engine](query, results(query)))

    def asked(self, query=None):
        return [parameters["q"] for _, parameters, _ in self.requests if query in (None, parameters["q"])]


def _drip(answer):
    for character in json.dumps(answer)[:60]:
        yield character
        time.sleep(0.01)


def _refusal(engine):
    if engine == "google":
        return 400, {"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}
    return 401, {"error": f"Invalid API key {KEYS['SERPAPI_API_KEY']}."}


ODD_RESULTS = [
    {"title": "No text", "link": "https://w.example/a"},
    {"title": "Two\n lines ", "link": "https://w.example/b", "snippet": " spread\n over \t lines \ud800"},
    {"title": "Again", "link": "https://w.example/a", "snippet": "a second time"},
    {"title": "No address", "snippet": "text"},
    {"title": 7, "link": "https://w.example/c", "snippet": "title is a number"},
]


@pytest.fixture(scope="module")
def running_services():
    running = Services()
    yield running
    running.stop()


@pytest.fixture
def services(running_services, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    running_services.requests.clear()
    running_services.most_busy = 0
    return running_services


@pytest.fixture
def make(services, tmp_path):
    made = []

    def build(engine="google", **options):
        options = {"directory": tmp_path / "cache", "max_searches": 1000, "backoff": 0.001, **options}
        made.append(OnlineRetriever(engine, address=services.url, **options))
        return made[-1]

    yield build
    for retriever in made:
        retriever.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_results_become_passages(make, services, engine):
    retriever = make(engine)
    assert isinstance(retriever, Retriever)
    rankings = checked_search(retriever, ["capital of Chad", "who wrote Faust"], 2)
    assert rankings == [
        [
            Passage("https://w.example/1", "capital of Chad 1", "about capital of Chad, 1"),
            Passage("https://w.example/2", "capital of Chad 2", "about capital of Chad, 2"),
        ],
        [
            Passage("https://w.example/1", "who wrote Faust 1", "about who wrote Faust, 1"),
            Passage("https://w.example/2", "who wrote Faust 2", "about who wrote Faust, 2"),
        ],
    ]


def test_requests_are_those_that_the_services_document(make, services):
    make("google").search(["a b&c"], 3)
    make("serpapi").search(["a b&c"], 3)
    assert services.requests == [
        ("google", {"cx": "017cx", "q": "a b&c", "num": "10"}, KEYS["GOOGLE_API_KEY"]),
        ("serpapi", {"engine": "google", "q": "a b&c", "api_key": KEYS["SERPAPI_API_KEY"]}, None),
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_query_is_asked_once_whatever_its_spelling_top_k_or_process(make, services, engine):
    retriever = make(engine)
    first = retriever.search(["slow q", " slow  q ", "slow q"], 3)
    assert first[0] == first[1] == first[2] and len(first[0]) == 3
    assert [len(ranking) for ranking in make(engine).search(["slow q"], 10)] == [10]
    assert services.asked() == ["slow q"]
    assert retriever.cache.spent() == 1


def test_threads_that_ask_the_same_at_once_pay_once_and_never_more_than_concurrency_are_under_way(make, services):
    retriever = make(concurrency=3)
    queries = [f"slow {number}" for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        rankings = list(pool.map(lambda _: retriever.search(queries, 1), range(4)))
    assert all(ranking == rankings[0] for ranking in rankings)
    assert sorted(services.asked()) == queries
    assert 2 <= services.most_busy <= 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replay_needs_neither_key_nor_network(make, services, engine, monkeypatch, tmp_path):
    recorded = make(engine).search(["q", "nothing here"], 5)
    for name in KEYS:
        monkeypatch.delenv(name)
    replay = OnlineRetriever(engine, tmp_path / "cache", 0, CacheMode.REPLAY, address="http://127.0.0.1:9")
    replay.check()
    assert replay.search(["q", "nothing here"], 5) == recorded
    with pytest.raises(RetrievalError, match="'a new question' was never recorded"):
        replay.search(["a new question"], 5)
    replay.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_found_says_so_and_is_recorded(make, services, engine):
    retriever = make(engine)
    for _ in range(2):
        assert checked_search(retriever, ["nothing of this", "q"], 3)[0] == [NOTHING_FOUND]
    assert services.asked("nothing of this") == ["nothing of this"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("query", ["fail 503 2", "fail 500 2", "fail 429 2", "burst 2"])
def test_passing_trouble_is_retried(make, services, engine, query):
    retriever = make(engine)
    assert retriever.search([query], 1)[0][0].title == f"{query} 1"
    assert len(services.asked()) == 3
    assert retriever.cache.spent() == 3  # the engine may bill each attempt


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("query", "kind", "message"),
    [
        ("fail 503 9", RetrievalError, r"'fail 503 9' failed after 3 attempts: HTTP 503 .*'try later'"),
        ("burst 9", QuotaExceeded, r"failed after 3 attempts: HTTP 429 .*; lower concurrency"),
        ("text", RetrievalError, r"3 attempts: the answer is no JSON object: .*captcha"),
        ("list", RetrievalError, r"3 attempts: the answer is no JSON object"),
        ("huge", RetrievalError, r"3 attempts: .*beyond the 4,194,304 that are read"),
        ("hang", RetrievalError, r"3 attempts: no answer within 0.1 s \(ReadTimeout\)"),
        ("drip", RetrievalError, r"3 attempts: no answer within 0.1 s"),
    ],
)
def test_trouble_that_does_not_pass_is_named(make, services, engine, query, kind, message):
    retriever = make(engine, max_attempts=3, timeout=0.1 if query in ("hang", "drip") else 10)
    with pytest.raises(kind, match=message):
        retriever.search([query], 1)
    assert len(services.asked()) == 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("query", "kind", "message"),
    [
        ("quota", QuotaExceeded, "the account's quota is used up"),
        ("fail 404 9", RetrievalError, "HTTP 404 .*the engine refuses this request"),
        ("not-a-list", RetrievalError, "no list under .*not the documented format"),
        ("empty-object", RetrievalError, "no list under .*not the documented format"),
        ("entries", RetrievalError, "none of 1 entries of .* has a link and a text: 3"),
        ("no-links", RetrievalError, "none of 1 entries of .* has a link and a text"),
    ],
)
def test_what_no_retry_can_mend_is_named_at_once(make, services, engine, query, kind, message):
    with pytest.raises(kind, match=message):
        make(engine).search([query], 1)
    assert len(services.asked()) == 1


@pytest.mark.parametrize("status", ["Error", "Processing", "Queued"])
def test_a_serpapi_search_that_is_not_done_is_no_empty_result(make, services, status):
    with pytest.raises(RetrievalError, match=rf"after 2 attempts: search status {status}: 'proxy timeout'"):
        make("serpapi", max_attempts=2).search([f"status {status}"], 1)


def test_the_wait_that_the_engine_asks_for_is_kept(make, services):
    started = time.monotonic()
    make().search(["burst 1 1"], 1)
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize("engine", ENGINES)
def test_keys_appear_in_no_error_log_or_file(make, services, engine, caplog, tmp_path):
    # trackio, once imported, has httpx say less.
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="httpx"):
        retriever = make(engine, max_attempts=2)
        retriever.search(["q", "fail 503 1"], 1)
        with pytest.raises(
            RetrievalError, match=r"check the environment variables? (GOOGLE|SERPAPI)_API_KEY"
        ) as error:
            retriever.search(["badkey"], 1)
    assert "HTTP Request: GET" in caplog.text  # httpx logs whole URLs
    everything = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for text in (str(error.value), caplog.text, everything.decode(), retriever.description, repr(retriever)):
        assert "very-secret" not in text
    assert "017cx" not in everything.decode()


def test_a_key_in_an_answer_is_hidden_before_the_answer_is_cut_to_length(make, services):
    with pytest.raises(RetrievalError, match=r"HTTP 403 .*https://w\.example/\?api_key=") as error:
        make("serpapi").search(["echo"], 1)
    assert "5e4f-v" not in str(error.value)


def test_a_query_that_fails_ends_the_whole_search_and_no_more_is_paid_for_the_others(make, services):
    retriever = make("serpapi", max_attempts=99, backoff=0.05)
    with pytest.raises(RetrievalError, match=r"'fail 403 1' failed: HTTP 403"):
        retriever.search(["fail 500 99", "fail 403 1"], 1)
    time.sleep(0.5)  # an attempt that was under way may end
    spent = retriever.cache.spent()
    time.sleep(1.5)  # pauses of 0.05, 0.1, 0.2, 0.4, ... s: left alone, the other query would be paid for again
    assert retriever.cache.spent() == spent


def test_closing_waits_for_no_pause_before_another_attempt(make, services):
    retriever = make("serpapi", max_attempts=99, backoff=30.0)
    with pytest.raises(RetrievalError, match=r"'fail 403 1' failed: HTTP 403"):
        retriever.search(["fail 500 99", "fail 403 1"], 1)
    started = time.monotonic()
    retriever.close()
    assert time.monotonic() - started < 2.0
    # The other query's first attempt may have been under way; a second one is not made.
    assert retriever.cache.spent() <= 2


def test_closing_ends_searches_that_wait_for_another_attempt_or_for_a_thread(make, services):
    retriever = make("google", max_attempts=99, backoff=30.0, concurrency=1)
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(retriever.search, ["fail 500 99", "b", "c"], 1)
        until(lambda: services.requests)
        retriever.close()
        assert "was stopped" in str(search.exception(timeout=2.0))
    with pytest.raises(RetrievalError, match="was closed; make a new one"):
        retriever.search(["a"], 1)


def test_an_engine_that_is_away_is_named(tmp_path, services):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        retriever = OnlineRetriever("google", tmp_path, 9, max_attempts=2, backoff=0.001, address=address)
        with pytest.raises(RetrievalError, match=r"after 2 attempts: connection failed \(ConnectError.*reachable"):
            retriever.check()
        retriever.close()


def test_the_cap_holds_over_restarts_and_what_was_paid_for_stays(make, services):
    retriever = make(max_searches=2, concurrency=1)
    with pytest.raises(SpendCapReached, match="2 of 2 paid requests to google are used up"):
        retriever.search(["q1", "q2", "q3"], 1)
    again = make(max_searches=2)
    assert [ranking[0].title for ranking in again.search(["q1", "q2"], 1)] == ["q1 1", "q2 1"]
    with pytest.raises(SpendCapReached):
        again.search(["q3"], 1)
    assert make(max_searches=3).search(["q3"], 1)[0][0].title == "q3 1"
    assert services.asked() == ["q1", "q2", "q3"]


def test_mode_off_asks_each_time_and_still_counts(make, services):
    for _ in range(2):
        make(mode="off", max_searches=2).search(["q"], 1)
    with pytest.raises(SpendCapReached):
        make(mode="off", max_searches=2).search(["q"], 1)
    assert services.asked() == ["q", "q"]


def test_odd_results_are_cleaned_or_left_out(make):
    assert make("serpapi").search(["odd-results"], 5)[0] == [
        Passage("https://w.example/a", "No text", "No text"),
        Passage("https://w.example/b", "Two lines", "spread over lines ?"),
        Passage("https://w.example/c", "", "title is a number"),
    ]


def test_a_query_of_any_length_can_be_asked(make, services):
    query = "word " * 5000
    assert len(make().search([query], 1)[0]) == 1
    (asked,) = services.asked()
    assert MAX_QUERY_CHARACTERS - 10 < len(asked) <= MAX_QUERY_CHARACTERS and asked.endswith("word")


def test_check_asks_a_real_question_once(make, services):
    make().check()
    make().check()
    assert services.asked() == [CHECK_QUERY]


@pytest.mark.parametrize(
    ("engine", "lacking", "message"),
    [
        ("google", ["GOOGLE_CSE_ID"], r"needs GOOGLE_CSE_ID \(the ID .*or replay recorded searches"),
        ("google", ["GOOGLE_API_KEY", "GOOGLE_CSE_ID"], r"needs GOOGLE_API_KEY \(.*\) and GOOGLE_CSE_ID \("),
        ("serpapi", ["SERPAPI_API_KEY"], r"SerpAPI needs SERPAPI_API_KEY \(the private API key"),
    ],
)
def test_a_missing_variable_is_named_before_anything_is_made(make, monkeypatch, tmp_path, engine, lacking, message):
    for name in lacking:
        monkeypatch.setenv(name, " ")
    with pytest.raises(RetrievalError, match=message):
        make(engine)
    assert not (tmp_path / "cache").exists()


def test_another_search_engine_id_does_not_mix_with_the_records(make, monkeypatch):
    make().search(["q"], 1)
    monkeypatch.setenv("GOOGLE_CSE_ID", "018cx")
    with pytest.raises(RetrievalError, match="recorded from another search engine configuration"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "bing"}, "no online engine 'bing'; use one of google, serpapi"),
        ({"max_searches": -1}, "max_searches=-1; it must be an integer of at least 0"),
        ({"max_searches": True}, "max_searches=True"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"mode": "always"}, "cache mode 'always'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, options, message):
    with pytest.raises(RetrievalError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("queries", "top_k", "message"),
    [
        (["q"], 11, "top_k=11, but Google Programmable Search gives 10 results"),
        (["q"], 0, "top_k=0"),
        (["q", None], 1, "query 1 is None"),
    ],
)
def test_requests_that_make_no_sense_are_refused_unpaid(make, services, queries, top_k, message):
    with pytest.raises(RetrievalError, match=message):
        make().search(queries, top_k)
    assert services.requests == []
    assert make().search([], 3) == []


def test_a_blank_query_finds_nothing_and_costs_nothing(make, services):
    [blank, found] = make().search([" \n", "q"], 1)
    assert (blank, len(found)) == ([NOTHING_FOUND], 1)
    assert len(services.asked()) == 1


def test_a_key_that_no_header_can_carry_is_not_spelled_out(make, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", "very-secret\nkey")
    with pytest.raises(RetrievalError, match="GOOGLE_API_KEY holds characters that no key has") as error:
        make()
    assert "very-secret" not in str(error.value)
