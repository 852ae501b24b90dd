"""Search engines of the open web: Google Programmable Search and SerpAPI.

Both engines bill a request, not a result: every request takes the first page of ten, and what is recorded answers any
`top_k` up to ten.

A search that an engine answers with "nothing found" is an event of a rollout like any other, not a failure: it gives
the one passage `NOTHING_FOUND`, which says so in words to the model and in every trajectory. Only an answer of the
documented shape can say that; anything else raises.

Keys come from the environment. They are in no error, no log line and no file.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import httpx

from rex_rag.retrieval.base import DEFAULT_MAX_ATTEMPTS, RetrievalError, Retriever, check_request
from rex_rag.retrieval.online.cache import CacheMode, Hit, OnlineCache, normalize_query
from rex_rag.retrieval.online.engines import ENGINES, RESULTS_PER_SEARCH, SearchEngine, TooManySearches, UnusableAnswer
from rex_rag.support.http import bounded_client, parse_json
from rex_rag.support.politeness import PassingTrouble, persist, retry_after
from rex_rag.support.secrets import hide
from rex_rag.support.tables import one_line
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

DEFAULT_CONCURRENCY = 8
DEFAULT_TIMEOUT_SECONDS = 30.0  # SerpAPI fetches a page while the caller waits
DEFAULT_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
MAX_ANSWER_BYTES = 4 * 2**20  # a page of ten results is some tens of kilobytes
# Google reads the first 32 words of a query, and a request line of several kilobytes is refused.
MAX_QUERY_CHARACTERS = 1024
CHECK_QUERY = "Who wrote Hamlet?"
NOTHING_FOUND = Passage("nothing-found", "No results", "The search engine found no page for this query.")


class QuotaExceeded(RetrievalError):
    """The engine's own limit for this account is used up."""


class OnlineRetriever(Retriever):
    """Answers queries with the first results of an online search engine. Safe to share between threads.

    Args:
        engine: `google` or `serpapi`.
        directory: where records and the count of paid requests live; also needed with mode `off`, for the count.
        max_searches: how many requests this directory's engine may ever be sent, over all runs and processes that
            share it. Each attempt counts, also one that fails: the engine may bill it.
        mode: see `CacheMode`. A replay needs neither network nor keys.
        concurrency: requests under way at once, >= 1, of all threads together.
        timeout: seconds an attempt may take.
        max_attempts: attempts a query, >= 1.
        backoff: seconds before the second attempt, doubled for each further one and shortened by a random part.
        address: another address of the engine, for a proxy or a test.

    Raises:
        RetrievalError: for a variable that the environment lacks, named with what belongs there; for an argument or a
            cache directory that makes no sense.
    """

    max_top_k = RESULTS_PER_SEARCH

    is_concurrent = True

    def __init__(
        self,
        engine: str,
        directory: str | Path,
        max_searches: int,
        mode: CacheMode | str = CacheMode.RECORD,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        backoff: float = DEFAULT_BACKOFF_SECONDS,
        address: str | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise RetrievalError(f"there is no online engine {engine!r}; use one of {', '.join(ENGINES)}")
        for name, value, least in (
            ("max_searches", max_searches, 0),
            ("concurrency", concurrency, 1),
            ("max_attempts", max_attempts, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RetrievalError(f"{name}={value!r}; it must be an integer of at least {least}")
        if not (timeout > 0 and math.isfinite(timeout) and backoff >= 0 and math.isfinite(backoff)):
            raise RetrievalError(f"timeout={timeout}, backoff={backoff}; both must be finite, timeout above 0")
        self._engine = ENGINES[engine]()
        self._credentials = _read_credentials(self._engine, required=mode != CacheMode.REPLAY)
        source = self._engine.source(self._credentials)
        self.cache = OnlineCache(directory, engine, mode, self._engine.parameters(), source)
        self._max_searches = max_searches
        self._timeout, self._max_attempts, self._backoff = timeout, max_attempts, backoff
        self._url = httpx.URL((address or self._engine.address).rstrip("/") + self._engine.path)
        self._http = bounded_client(self._url.host, timeout)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix=f"search-{engine}")
        self._lock = threading.Lock()
        self._closed = False
        self._stops: set[threading.Event] = set()  # one a search under way
        _hide_keys_from_httpx_log()

    @property
    def description(self) -> str:
        return f"{self._engine.title} ({self.cache.mode.value})"

    def close(self) -> None:
        """Close threads and connections; the retriever cannot be used afterwards, and searches under way fail.

        Waits for requests that were sent: they may be billed, and what they find is recorded.
        """
        with self._lock:
            self._closed = True
            for stop in self._stops:
                stop.set()
        self._threads.shutdown(wait=True)
        self._http.close()

    def check(self) -> None:
        """Ask one real question, which costs a request unless it is recorded.

        A replay asks none: that there is something to replay was seen when it was made.
        """
        if self.cache.mode is not CacheMode.REPLAY:
            self.search([CHECK_QUERY], top_k=1)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return for each query at most `top_k` results, best first, ids = links, text = the engine's snippet.

        A query that the engine finds nothing for, or that is blank and not asked, gets `NOTHING_FOUND` alone. Scores
        are `None`: engines give none.

        Raises:
            RetrievalError: for a `top_k` outside 1..10, a search that failed: then no further request
                is sent for the other queries, and what was found for them is recorded. `QuotaExceeded` and
                `SpendCapReached` are such errors.
        """
        check_request(queries, top_k)
        if top_k > RESULTS_PER_SEARCH:
            raise RetrievalError(
                f"top_k={top_k}, but {self._engine.title} gives {RESULTS_PER_SEARCH} results a request; ask for fewer"
            )
        asked = [_sendable(query) for query in queries]
        stop = threading.Event()
        with self._lock:
            if self._closed:
                raise RetrievalError(f"the retriever for {self._engine.title} was closed; make a new one")
            self._stops.add(stop)
            futures = {query: self._threads.submit(self._find, query, stop) for query in dict.fromkeys(asked) if query}
        try:
            ended = wait(futures.values(), return_when=FIRST_EXCEPTION).done
            found = {query: future.result() for query, future in futures.items() if future in ended}
        finally:
            stop.set()
            with self._lock:
                self._stops.discard(stop)
        return [_passages(found[query][:top_k] if query else []) for query in asked]

    def _find(self, query: str, stop: threading.Event) -> list[Hit]:
        hits = self.cache.read(query)
        if hits is None:
            with self.cache.claim(query):
                hits = self.cache.read(query)  # another thread or process may have asked meanwhile
                if hits is None:
                    hits = self._ask(query, stop)
                    self.cache.write(query, hits)
        return hits

    def _ask(self, query: str, stop: threading.Event) -> list[Hit]:
        made = 0

        def attempt() -> list[Hit]:
            nonlocal made
            if stop.is_set():
                raise RetrievalError(
                    f"the {self._engine.title} search for {query!r} was stopped: another query of its batch failed, "
                    "or the retriever was closed"
                )
            self.cache.spend(self._max_searches)
            made += 1
            return self._attempt(query)

        def say(number: int, trouble: PassingTrouble, delay: float) -> None:
            logger.warning(
                "%s: attempt %d of %d failed (%s); trying again in %.2f s",
                *(self._engine.title, number, self._max_attempts, self._without_keys(str(trouble)), delay),
            )

        try:
            hits = persist(
                attempt,
                attempts=self._max_attempts,
                backoff=self._backoff,
                longest=MAX_BACKOFF_SECONDS,
                say=say,
                sleep=stop.wait,
            )
        except UnusableAnswer as error:
            raise self._error(RetrievalError, query, made, f"{error}; not the documented format") from None
        except PassingTrouble as trouble:
            spent = isinstance(trouble, TooManySearches)
            way_out = "lower concurrency" if spent else "is the engine reachable from here?"
            kind = QuotaExceeded if spent else RetrievalError
            raise self._error(kind, query, made, f"{self._without_keys(str(trouble))}; {way_out}") from None
        if not hits:
            logger.info("%s found nothing for %r", self._engine.title, query)
        return hits

    def _attempt(self, query: str) -> list[Hit]:
        status, reason, headers, body = self._get(query)
        try:
            answer = parse_json(body)
        except ValueError:
            answer = None
        if status == 200:
            if not isinstance(answer, dict):
                raise PassingTrouble(f"the answer is no JSON object: {shorten(body.decode('utf-8', 'replace'))}")
            return self._engine.read(answer)
        said, spent = self._engine.read_error(answer)
        said = f"HTTP {status} {one_line(reason)}: {shorten(said or body.decode('utf-8', 'replace'), 300)}"
        if spent:
            raise self._error(
                QuotaExceeded,
                query,
                0,
                f"{said}; the account's quota is used up: wait for the next period or raise it",
            )
        if status == 429 or status >= 500:
            kind = TooManySearches if status == 429 else PassingTrouble
            raise kind(said, retry_after=retry_after(headers, MAX_BACKOFF_SECONDS))
        way_out = "the engine refuses this request"
        if status in (401, 403) or "key" in said.lower():
            way_out = f"check the environment variable{'s' * (len(self._engine.variables) > 1)} " + " and ".join(
                self._engine.variables
            )
        raise self._error(RetrievalError, query, 0, f"{said}; {way_out}")

    def _get(self, query: str) -> tuple[int, str, httpx.Headers, bytes]:
        parameters, headers = self._engine.request(query, self._credentials)
        extensions = {"max_bytes": MAX_ANSWER_BYTES}
        try:
            response = self._http.get(self._url, params=parameters, headers=headers, extensions=extensions)
        except httpx.TimeoutException as error:
            raise PassingTrouble(f"no answer within {self._timeout:g} s ({type(error).__name__})") from None
        except httpx.RequestError as error:
            raise PassingTrouble(f"connection failed ({type(error).__name__}: {error})") from None
        # Before anything is cut to length: half of a key would not be recognised. Latin-1 gives every byte back.
        body = self._without_keys(response.content.decode("latin-1")).encode("latin-1")
        return response.status_code, response.reason_phrase, response.headers, body

    def _error(self, kind: type[RetrievalError], query: str, attempts: int, cause: str) -> RetrievalError:
        spent = f" after {attempts} attempt{'s' * (attempts > 1)}" if attempts else ""
        return kind(self._without_keys(f"{self._engine.title} search for {query!r} failed{spent}: {cause}"))

    def _without_keys(self, text: str) -> str:
        return hide(text, self._credentials.get(self._engine.key_variable, ""))


def _read_credentials(engine: SearchEngine, required: bool) -> dict[str, str]:
    found = {name: os.environ.get(name, "").strip() for name in engine.variables}
    lacking = [f"{name} ({what})" for name, what in engine.variables.items() if not found[name]]
    if lacking and required:
        raise RetrievalError(
            f"{engine.title} needs {' and '.join(lacking)} in the environment; export "
            f"{'it' if len(lacking) == 1 else 'them'}, or replay recorded searches (mode "
            f"{CacheMode.REPLAY.value!r}), which needs no key"
        )
    for name, value in found.items():
        # A key that no HTTP header can carry would otherwise be spelled out in the transport's own error.
        if not (value.isascii() and value.isprintable()):
            raise RetrievalError(f"the environment variable {name} holds characters that no key has; set it anew")
    return {name: value for name, value in found.items() if value}


def _sendable(query: str) -> str:
    """The query in the spelling that is asked and recorded, without what engines refuse or ignore at its end."""
    words = normalize_query(query)
    return words if len(words) <= MAX_QUERY_CHARACTERS else words[:MAX_QUERY_CHARACTERS].rsplit(" ", 1)[0]


def _passages(hits: Sequence[Hit]) -> list[Passage]:
    return [Passage(id=hit.link, title=hit.title, text=hit.snippet) for hit in hits] or [NOTHING_FOUND]


class _WithoutKeys(logging.Filter):
    """Takes `key` and `api_key` out of the URLs that httpx logs with every request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                _without_key(value) if isinstance(value, httpx.URL) else value for value in record.args
            )
        return True


def _without_key(url: httpx.URL) -> httpx.URL:
    for name in ("key", "api_key"):
        if name in url.params:
            url = url.copy_set_param(name, "***")
    return url


def _hide_keys_from_httpx_log() -> None:
    httpx_logger = logging.getLogger("httpx")
    if not any(isinstance(installed, _WithoutKeys) for installed in httpx_logger.filters):
        httpx_logger.addFilter(_WithoutKeys())
