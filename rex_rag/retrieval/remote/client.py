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
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from rex_rag.retrieval.base import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_TIMEOUT_SECONDS,
    CannotRead,
    RetrievalError,
    Retriever,
    check_request,
    check_texts,
)
from rex_rag.retrieval.remote.endpoint import NotOffered, OtherIndex, PassingTrouble, Refusal, Trouble
from rex_rag.retrieval.remote.servers import CHECK_QUERY, Ask, Server, Servers, Tally
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

DEFAULT_BACKOFF_SECONDS = 0.5
# What `rex-rag serve` searches at once: a bigger request would only wait there, and not be shared among servers.
MAX_QUERIES_PER_REQUEST = 256
# With several servers a batch is worth splitting down to here.
MIN_QUERIES_PER_REQUEST = 32
REQUESTS_AT_ONCE_PER_SERVER = 8


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
        self._fleet = Servers(addresses, timeout, backoff)
        self._servers = self._fleet.all
        self.urls = tuple(server.url for server in self._servers)
        if len(set(self.urls)) < len(self.urls):
            raise RetrievalError(f"retriever URLs {', '.join(self.urls)} name a server twice; name each once")
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._max_queries_per_request = max_queries_per_request
        self._limit_names = limit_names
        self._pool = ThreadPoolExecutor(
            REQUESTS_AT_ONCE_PER_SERVER * len(self._servers), thread_name_prefix="retrieval"
        )

    @property
    def description(self) -> str:
        return f"retrieval server{'s' * (len(self.urls) > 1)} at {', '.join(self.urls)}"

    def close(self) -> None:
        """Close the pooled connections; the retriever cannot be used afterwards, and searches that wait fail."""
        self._fleet.close()
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
        tallies: dict[Server, Tally] = {}
        answers: dict[Server, list[Passage]] = {}
        for round_number in range(1, self._max_attempts + 1):
            returns = self._fleet.returns
            started = time.monotonic()
            asked = [server for server in self._servers if not _refused(tallies, server)]
            for server in asked:
                self._fleet.take(server, 1)
            # Threads of its own: the pool may be busy with searches, each of which may wait.
            with ThreadPoolExecutor(len(asked)) as pool:
                outcomes = [pool.submit(self._fleet.attempt, server, _searching(1), [CHECK_QUERY]) for server in asked]
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
        self._fleet.blame(tallies)
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
            self._fleet.pledge.hold("the card", index)
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
        with self._fleet.lock:  # `close` waits for it, so that the pool is still open
            self._check_open()
            return self._pool.submit(self._ask, ask, part, stop)

    def _split(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Cut a batch into even parts: as many as the limit demands, or as there are servers to share the work."""
        count = len(texts)
        in_service = self._fleet.in_service()
        parts = max(-(-count // self._max_queries_per_request), min(in_service, count // MIN_QUERIES_PER_REQUEST), 1)
        bounds = [count * part // parts for part in range(parts + 1)]
        return [texts[start:end] for start, end in itertools.pairwise(bounds)]

    def _ask(self, ask: Ask, texts: Sequence[str], stop: threading.Event) -> list[list[Passage]]:
        tallies: dict[Server, Tally] = {}
        for round_number in range(1, self._max_attempts + 1):
            returns = self._fleet.returns
            tried = {server for server in tallies if _refused(tallies, server)}
            while not stop.is_set() and (server := self._fleet.pick(tried, len(texts))) is not None:
                tried.add(server)
                started = time.monotonic()
                try:
                    found = self._fleet.attempt(server, ask, texts)
                except Trouble as trouble:
                    _count(tallies, server, started, trouble)
                else:
                    self._fleet.blame(tallies)
                    return found
            self._check_open()
            if stop.is_set():
                raise RetrievalError("the search was stopped because another part of its batch failed")
            self._wait_or_raise(tallies, round_number, returns, stop)
        raise AssertionError("the last round returns or raises")

    def _check_open(self) -> None:
        if self._fleet.closed:
            raise RetrievalError(f"the client of the {self.description} was closed; make a new one")

    def _wait_or_raise(
        self,
        tallies: Mapping[Server, Tally],
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
        seconds = max(self._fleet.delay(round_number), min(trouble.retry_after for trouble in hopeful))
        logger.debug("no server answered in round %d; the next is in %.2f s at most", round_number, seconds)
        self._fleet.wait_for_return(returns, seconds, stop)

    def _error(self, tallies: Mapping[Server, Tally]) -> RetrievalError:
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


def _of_other_index(tallies: Mapping[Server, Tally]) -> list[Server]:
    return [server for server, tally in tallies.items() if isinstance(tally.last, OtherIndex)]


def _searching(top_k: int) -> Ask:
    return lambda endpoint, part: endpoint.search(part, top_k)


def _count(tallies: dict[Server, Tally], server: Server, started: float, trouble: Trouble) -> None:
    attempts = tallies[server].attempts if server in tallies else 0
    tallies[server] = Tally(attempts + 1, started, trouble)


def _refused(tallies: Mapping[Server, Tally], server: Server) -> bool:
    return server in tallies and isinstance(tallies[server].last, Refusal)
