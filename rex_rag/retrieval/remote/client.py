"""Search in, and documents from, one or several retrieval servers that speak the Search-R1 wire format.

A search is answered in full, in the order asked, or raises `RetrievalError`. Meanwhile servers may die, hang, be
restarted or talk nonsense: each request goes to the server with the fewest queries under way; one that fails is set
aside and another is asked at once; only when all have failed does a search wait, and a bounded number of times.

A server set aside is looked after in the background. Once its health is good again (a server without a health page
counts as up) it is given one request on trial, and with that answered its full share. None is given up for good.

All servers are held to what the first answer came from (`endpoint.Pledge`): one that returns as another index, or was
one from the start, is set aside like one out of order. One that tells nothing of what it searches is asked the check's
query again after each outage, and held to its first answer.

These rounds are our own: libraries for retries repeat one call, and know of no servers with a state each.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from rex_rag.retrieval.base import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_TIMEOUT_SECONDS,
    CannotRead,
    RetrievalError,
    Retriever,
    check_request,
    check_texts,
)
from rex_rag.retrieval.remote.endpoint import (
    Endpoint,
    NotOffered,
    OtherIndex,
    PassingTrouble,
    Pledge,
    Refusal,
    Trouble,
)
from rex_rag.support.politeness import pause
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

# One attempt at one server for a part of a batch.
Ask = Callable[[Endpoint, Sequence[str]], list[list[Passage]]]

CHECK_QUERY = "Who wrote Hamlet?"
DEFAULT_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# What `rex-rag serve` searches at once: a bigger request would only wait there, and not be shared among servers.
MAX_QUERIES_PER_REQUEST = 256
# With several servers a batch is worth splitting down to here.
MIN_QUERIES_PER_REQUEST = 32
REQUESTS_AT_ONCE_PER_SERVER = 8
# How often a server that is away is asked for its health.
PROBE_SECONDS = 1.0
# A server is named when its trouble begins, unless it comes and goes, and from time to time while it lasts.
SECONDS_BETWEEN_WARNINGS = 5.0
SECONDS_BETWEEN_REMINDERS = 60.0


@dataclass(eq=False)
class _Server:
    """An endpoint and what is known of it. All fields are guarded by the retriever's lock; times are monotonic."""

    endpoint: Endpoint
    queries_under_way: int = 0
    last_turn: int = 0
    failures: int = 0
    aside_since: float | None = None
    on_trial: bool = False
    # Whether it was really gone during this outage: then its return is news, and worth an attempt at once.
    away: bool = False
    # What it answered to the check's query; kept of a server that tells nothing of what it searches.
    known_answer: tuple[str, str] | None = None
    probing: bool = False
    probe_at: float = 0.0
    # Until then one that looks healthy and fails all the same is spared.
    rest_until: float = 0.0
    # When it was last set aside or came back: outcomes of requests sent before are no news any more.
    changed: float = -math.inf
    warned: float = -math.inf

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def ready(self) -> bool:
        return self.aside_since is None or (self.on_trial and not self.queries_under_way)


@dataclass
class _Tally:
    """What one search met at one server."""

    attempts: int
    started: float
    last: Trouble


class RemoteRetriever(Retriever):
    """Asks retrieval servers for passages. Safe to share between threads; connections are pooled.

    Args:
        urls: http(s) addresses of servers over the same index, with or without the final `/retrieve`; one or several.
        timeout: seconds one attempt may take, > 0.
        max_attempts: attempts a search and server, >= 1. In each round every server is tried once, in turn.
        backoff: seconds between the first two rounds, >= 0; doubled for each further one up to `MAX_BACKOFF_SECONDS`,
            and shortened by a random part of up to a half, so that many workers do not return at the same moment.
            A round begins earlier when a server is seen to be back, and later when all ask for it (`Retry-After`).
        max_queries_per_request: bigger batches are split, >= 1; the parts are asked for at the same time.
        limit_names: what whoever reads an error calls `timeout` and `max_attempts`; None if they cannot set them.

    Raises:
        RetrievalError: for an argument that makes no sense.
    """

    is_concurrent = True

    def __init__(
        self,
        urls: str | Sequence[str],
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        backoff: float = DEFAULT_BACKOFF_SECONDS,
        max_queries_per_request: int = MAX_QUERIES_PER_REQUEST,
        limit_names: tuple[str, str] | None = ("timeout", "max_attempts"),
    ) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise RetrievalError(f"timeout={timeout} seconds; an attempt needs a finite time above 0")
        for name, value in (("max_attempts", max_attempts), ("max_queries_per_request", max_queries_per_request)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RetrievalError(f"{name}={value!r}; it must be an integer of at least 1")
        if not (backoff >= 0 and math.isfinite(backoff)):
            raise RetrievalError(f"backoff={backoff} seconds; it must be finite and at least 0")
        addresses = [urls] if isinstance(urls, str) else list(urls)
        if not addresses:
            raise RetrievalError("no retriever URL was given; name at least one, http://host:port")
        self._pledge = Pledge()
        self._servers = [_Server(Endpoint(address, timeout, self._pledge)) for address in addresses]
        self.urls = tuple(server.url for server in self._servers)
        if len(set(self.urls)) < len(self.urls):
            raise RetrievalError(f"retriever URLs {', '.join(self.urls)} name a server twice; name each once")
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._backoff = backoff
        self._max_queries_per_request = max_queries_per_request
        self._limit_names = limit_names
        self._turns = 0
        # How often a server has come back: waiting searches watch this number.
        self._returns = 0
        self._lock = threading.Condition()
        self._closed = False
        self._pool = ThreadPoolExecutor(
            REQUESTS_AT_ONCE_PER_SERVER * len(self._servers), thread_name_prefix="retrieval"
        )

    @property
    def description(self) -> str:
        return f"retrieval server{'s' * (len(self.urls) > 1)} at {', '.join(self.urls)}"

    def close(self) -> None:
        """Close the pooled connections; the retriever cannot be used afterwards, and searches that wait fail."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        # Parts that have not begun are not cancelled: `wait` would never hear of it. They see that all is closed.
        self._pool.shutdown(wait=False)
        for server in self._servers:
            server.endpoint.close()

    def check(self) -> None:
        """Send one real query to every server, until one at least has answered it.

        Servers that do not answer are warned of, and so are servers that tell nothing of what they search and answer
        differently: a search is only repeatable when all of them hold the same index.

        Raises:
            RetrievalError: for servers that tell that they search different things; when none answers, with the
                retries of any search; it names every server's trouble.
        """
        self._check_open()
        tallies: dict[_Server, _Tally] = {}
        answers: dict[_Server, list[Passage]] = {}
        for round_number in range(1, self._max_attempts + 1):
            returns = self._returns
            started = time.monotonic()
            asked = [server for server in self._servers if not _refused(tallies, server)]
            for server in asked:
                self._take(server, 1)
            # Threads of its own: the pool may be busy with searches, each of which may wait.
            with ThreadPoolExecutor(len(asked)) as pool:
                outcomes = [pool.submit(self._attempt, server, _searching(1), [CHECK_QUERY]) for server in asked]
            for server, outcome in zip(asked, outcomes, strict=True):
                try:
                    answers[server] = outcome.result()[0]
                except Trouble as trouble:
                    _count(tallies, server, started, trouble)
            told = {server.endpoint.told for server in (*answers, *_of_other_index(tallies))}
            if len(told) > 1:
                listed = "; ".join(f"{server.url}: {server.endpoint.told or 'tells nothing'}" for server in asked)
                raise RetrievalError(
                    f"the retrieval servers search different things, so that figures would depend on which one "
                    f"answers ({listed}); name servers of one index"
                )
            if answers:
                break
            self._wait_or_raise(tallies, round_number, returns)
        self._blame(tallies)
        for server, ranking in answers.items():
            server.known_answer = (ranking[0].title, ranking[0].text) if server.endpoint.told is None else None
        texts = {server.url: (ranking[0].title, ranking[0].text) for server, ranking in answers.items()}
        if len(set(texts.values())) > 1:
            logger.warning(
                "retrieval servers answer the same query %r differently, so they do not hold the same index and runs "
                "will not be repeatable: %s",
                CHECK_QUERY,
                "; ".join(f"{url}: {shorten(' '.join(text))}" for url, text in texts.items()),
            )

    def hold_to(self, index: str) -> None:
        """See `Retriever.hold_to`."""
        try:
            self._pledge.hold("the card", index)
        except OtherIndex as error:
            raise RetrievalError(f"the servers that answer are not those that the card names: {error}") from error

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return for each query the servers' passages, best first: at least one, at most `top_k`.

        A server that refuses the request (4xx but 408 and 429) or answers with something other than one non-empty
        ranking a query is not asked again; when another one answers, the fault was the server's and it is set aside.

        Raises:
            RetrievalError: for a `top_k` below 1; when every attempt failed; at once when every
                server refuses. The message names each server, the attempts at it and its last trouble.
        """
        check_request(queries, top_k)
        return self._ask_all(_searching(top_k), queries)

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        """See `Retriever.read`. With the retries and the errors of `search`: a failure is never an empty document.

        Raises:
            CannotRead: when no server offers documents.
            RetrievalError: as `search`.
        """
        check_texts(keys, "keys", "key")
        return self._ask_all(lambda endpoint, part: endpoint.read(part), keys)

    def _ask_all(self, ask: Ask, texts: Sequence[str]) -> list[list[Passage]]:
        self._check_open()
        if not texts:
            return []
        stop = threading.Event()
        parts = self._split(texts)
        if len(parts) == 1:
            return self._ask(ask, texts, stop)
        outcomes: list[Future] = []
        try:
            outcomes += [self._submit(ask, part, stop) for part in parts]
            for failed in wait(outcomes, return_when=FIRST_EXCEPTION).done:
                failed.result()
            return [found for outcome in outcomes for found in outcome.result()]
        except BaseException:
            stop.set()
            for outcome in outcomes:
                outcome.cancel()
            raise

    def _submit(self, ask: Ask, part: Sequence[str], stop: threading.Event) -> Future:
        with self._lock:  # `close` waits for it, so that the pool is still open
            self._check_open()
            return self._pool.submit(self._ask, ask, part, stop)

    def _split(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Cut a batch into even parts: as many as the limit demands, or as there are servers to share the work."""
        count = len(texts)
        with self._lock:
            in_service = sum(server.aside_since is None for server in self._servers)
        parts = max(-(-count // self._max_queries_per_request), min(in_service, count // MIN_QUERIES_PER_REQUEST), 1)
        bounds = [count * part // parts for part in range(parts + 1)]
        return [texts[start:end] for start, end in itertools.pairwise(bounds)]

    def _ask(self, ask: Ask, texts: Sequence[str], stop: threading.Event) -> list[list[Passage]]:
        tallies: dict[_Server, _Tally] = {}
        for round_number in range(1, self._max_attempts + 1):
            returns = self._returns
            tried = {server for server in tallies if _refused(tallies, server)}
            while not stop.is_set() and (server := self._pick(tried, len(texts))) is not None:
                tried.add(server)
                started = time.monotonic()
                try:
                    found = self._attempt(server, ask, texts)
                except Trouble as trouble:
                    _count(tallies, server, started, trouble)
                else:
                    self._blame(tallies)
                    return found
            if stop.is_set():
                raise RetrievalError("the search was stopped because another part of its batch failed")
            self._wait_or_raise(tallies, round_number, returns, stop)
        raise AssertionError("the last round returns or raises")

    def _pick(self, tried: Collection[_Server], queries: int) -> _Server | None:
        """Take the untried server with the fewest queries under way, those set aside last; ties go round."""
        with self._lock:
            self._check_open()
            self._start_due_probes()
            untried = [server for server in self._servers if server not in tried]
            ready = [server for server in untried if server.ready]
            if ready:
                picked = min(ready, key=lambda server: (server.queries_under_way, server.last_turn))
            elif untried:
                picked = min(untried, key=lambda server: (not server.on_trial, server.away, server.last_turn))
            else:
                return None
            self._take(picked, queries)
            return picked

    def _take(self, server: _Server, queries: int) -> None:
        with self._lock:
            self._turns += 1
            server.last_turn = self._turns
            server.queries_under_way += queries

    def _check_open(self) -> None:
        if self._closed:
            raise RetrievalError(f"the client of the {self.description} was closed; make a new one")

    def _attempt(self, server: _Server, ask: Ask, texts: Sequence[str]) -> list[list[Passage]]:
        """Ask a server that was taken, and note what comes of it."""
        started = time.monotonic()
        with self._lock:
            aside = server.aside_since is not None
            doubtful = aside and not server.on_trial and len(self._servers) > 1
            returns_silently = aside and server.away and server.known_answer is not None
        try:
            if doubtful:
                # A hanging server shows in seconds here, and only after the whole timeout in a search.
                server.endpoint.probe()
            if returns_silently:
                [[first, *_]] = server.endpoint.search([CHECK_QUERY], 1)
                if (first.title, first.text) != server.known_answer:
                    raise OtherIndex(
                        f"it came back, and answers {CHECK_QUERY!r} with another passage than before, so it does not "
                        "hold the index that this run began with; serve that one again"
                    )
            found = ask(server.endpoint, texts)
        except PassingTrouble as trouble:
            self._set_aside(server, started, trouble)
            raise
        finally:
            with self._lock:
                server.queries_under_way -= len(texts)
        self._answered(server, started)
        return found

    def _blame(self, tallies: Mapping[_Server, _Tally]) -> None:
        """Another server has answered: those that refused the same request are at fault, not the request."""
        for server, tally in tallies.items():
            if isinstance(tally.last, Refusal) and not isinstance(tally.last, NotOffered):
                self._set_aside(server, tally.started, tally.last)

    def _set_aside(self, server: _Server, started: float, trouble: Trouble) -> None:
        with self._lock:
            if started < server.changed:
                return
            now = time.monotonic()
            server.failures += 1
            spared = self._delay(server.failures)
            server.rest_until = now + max(spared, trouble.retry_after)
            server.probe_at = now + min(spared, PROBE_SECONDS)
            server.aside_since = now if server.aside_since is None else server.aside_since
            server.changed, server.on_trial, server.away = now, False, server.away or trouble.away
            self._warn(server, trouble)

    def _answered(self, server: _Server, started: float) -> None:
        with self._lock:
            now = time.monotonic()
            if server.aside_since is None:
                # Only what has been well for a while is trusted again; one that comes and goes is not.
                if now - server.changed > MAX_BACKOFF_SECONDS:
                    server.failures = 0
            elif started >= server.changed:
                if server.warned >= server.aside_since:
                    logger.info("%s answers again, after %.1f s", server.url, now - server.aside_since)
                self._wake(server)
                server.aside_since, server.on_trial, server.away, server.changed = None, False, False, now

    def _wake(self, server: _Server) -> None:
        # An overloaded server answers one and turns the next away: whoever waits for that one should go on waiting.
        if server.away:
            self._returns += 1
            self._lock.notify_all()

    def _start_due_probes(self) -> None:
        now = time.monotonic()
        for server in self._servers:
            resting = server.aside_since is not None and not server.on_trial and not server.probing
            if resting and now >= server.probe_at:
                server.probing = True
                threading.Thread(target=self._probe, args=(server,), name="retrieval-probe", daemon=True).start()

    def _probe(self, server: _Server) -> None:
        trouble = None
        try:
            server.endpoint.probe()
        except PassingTrouble as failed:
            trouble = failed
        with self._lock:
            server.probing = False
            if server.aside_since is None or server.on_trial or self._closed:
                return
            now = time.monotonic()
            if trouble is not None:
                server.away = True
                server.probe_at = now + PROBE_SECONDS
                self._warn(server, trouble)
            elif server.away or now >= server.rest_until:
                server.on_trial = True
                self._wake(server)
            else:
                server.probe_at = server.rest_until

    def _warn(self, server: _Server, trouble: Trouble) -> None:
        now = time.monotonic()
        told = server.aside_since is not None and server.warned >= server.aside_since
        if now - server.warned < (SECONDS_BETWEEN_REMINDERS if told else SECONDS_BETWEEN_WARNINGS):
            return
        server.warned = now
        others = "the other servers are asked meanwhile" if len(self._servers) > 1 else "searches wait for it"
        logger.warning("%s does not answer as it should (%s); %s", server.url, trouble, others)

    def _wait_or_raise(
        self,
        tallies: Mapping[_Server, _Tally],
        round_number: int,
        returns: int,
        stop: threading.Event | None = None,
    ) -> None:
        """After a round in which every server failed: wait for the next one, or give up.

        `returns` is the number of returns when the round began: whoever has come back since is worth trying at once.
        """
        hopeful = [tally.last for tally in tallies.values() if isinstance(tally.last, PassingTrouble)]
        if round_number == self._max_attempts or not hopeful:
            raise self._error(tallies) from hopeful[-1] if hopeful else None
        seconds = max(self._delay(round_number), min(trouble.retry_after for trouble in hopeful))
        logger.debug("no server answered in round %d; the next is in %.2f s at most", round_number, seconds)
        deadline = time.monotonic() + seconds
        with self._lock:
            while self._returns == returns and not self._closed and not (stop is not None and stop.is_set()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                self._start_due_probes()
                self._lock.wait(min(remaining, PROBE_SECONDS))

    def _delay(self, attempt: int) -> float:
        return pause(attempt, self._backoff, MAX_BACKOFF_SECONDS)

    def _error(self, tallies: Mapping[_Server, _Tally]) -> RetrievalError:
        said = [
            f"{server.url} failed after {tally.attempts} attempt{'s' * (tally.attempts > 1)}: {tally.last}"
            for server, tally in tallies.items()
        ]
        message = f"search at {said[0]}" if len(said) == 1 else f"search at all {len(said)} servers: {'; '.join(said)}"
        if all(isinstance(tally.last, NotOffered) for tally in tallies.values()):
            return CannotRead(message.replace("search at", "reading documents at", 1))
        if any(isinstance(tally.last, PassingTrouble) for tally in tallies.values()):
            subject = "Is the server" if len(said) == 1 else "Are the servers"
            message += f". {subject} running and reachable from here?"
            if self._limit_names is not None:
                timeout, attempts = self._limit_names
                message += f" Otherwise raise {timeout} ({self._timeout:g} s) or {attempts} ({self._max_attempts})"
        return RetrievalError(message)


def _of_other_index(tallies: Mapping[_Server, _Tally]) -> list[_Server]:
    return [server for server, tally in tallies.items() if isinstance(tally.last, OtherIndex)]


def _searching(top_k: int) -> Ask:
    return lambda endpoint, part: endpoint.search(part, top_k)


def _count(tallies: dict[_Server, _Tally], server: _Server, started: float, trouble: Trouble) -> None:
    attempts = tallies[server].attempts if server in tallies else 0
    tallies[server] = _Tally(attempts + 1, started, trouble)


def _refused(tallies: Mapping[_Server, _Tally], server: _Server) -> bool:
    return server in tallies and isinstance(tallies[server].last, Refusal)
