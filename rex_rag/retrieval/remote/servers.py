"""The servers of one list: which is asked next, which is set aside, and how each comes back.

The state of all of them is guarded by one lock. Nothing here knows of batches, rounds or how long a search may wait.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

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
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

# One attempt at one server for a part of a batch.
Ask = Callable[[Endpoint, Sequence[str]], list[list[Passage]]]

CHECK_QUERY = "Who wrote Hamlet?"
MAX_BACKOFF_SECONDS = 30.0
# How often a server that is away is asked for its health.
PROBE_SECONDS = 1.0
# A server is named when its trouble begins, unless it comes and goes, and from time to time while it lasts.
SECONDS_BETWEEN_WARNINGS = 5.0
SECONDS_BETWEEN_REMINDERS = 60.0


@dataclass(eq=False)
class Server:
    """An endpoint and what is known of it. All fields are guarded by the lock of `Servers`; times are monotonic."""

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
    # Whether the last warning was of another index.
    told_other: bool = False

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def ready(self) -> bool:
        return self.aside_since is None or (self.on_trial and not self.queries_under_way)


@dataclass
class Tally:
    """What one search met at one server."""

    attempts: int
    started: float
    last: Trouble


class Servers:
    """Addresses over one index, and how each of them fares.

    Args:
        addresses: http(s) addresses; see `Endpoint`.
        timeout: seconds one attempt may take.
        backoff: see `RemoteRetriever`.
    """

    def __init__(self, addresses: Sequence[str], timeout: float, backoff: float) -> None:
        self.pledge = Pledge()
        self.all = [Server(Endpoint(address, timeout, self.pledge)) for address in addresses]
        self._backoff = backoff
        self._turns = 0
        # How often a server has come back: waiting searches watch this number.
        self.returns = 0
        self.lock = threading.Condition()
        self.closed = False

    def close(self) -> None:
        """Pick no server any more, and end the waiting."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()

    def in_service(self) -> int:
        """How many servers are not set aside."""
        with self.lock:
            return sum(server.aside_since is None for server in self.all)

    def pick(self, tried: Collection[Server], queries: int) -> Server | None:
        """Take the untried server with the fewest queries under way, those set aside last; ties go round."""
        with self.lock:
            if self.closed:
                return None
            self._start_due_probes()
            untried = [server for server in self.all if server not in tried]
            ready = [server for server in untried if server.ready]
            if ready:
                picked = min(ready, key=lambda server: (server.queries_under_way, server.last_turn))
            elif untried:
                picked = min(untried, key=lambda server: (not server.on_trial, server.away, server.last_turn))
            else:
                return None
            self.take(picked, queries)
            return picked

    def take(self, server: Server, queries: int) -> None:
        """Count queries as under way at a server; `attempt` ends that."""
        with self.lock:
            self._turns += 1
            server.last_turn = self._turns
            server.queries_under_way += queries

    def attempt(self, server: Server, ask: Ask, texts: Sequence[str]) -> list[list[Passage]]:
        """Ask a server that was taken, and note what comes of it.

        Raises:
            Trouble: whatever kind it met.
        """
        started = time.monotonic()
        with self.lock:
            aside = server.aside_since is not None
            doubtful = aside and not server.on_trial and len(self.all) > 1
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
            with self.lock:
                server.queries_under_way -= len(texts)
        self._answered(server, started)
        return found

    def blame(self, tallies: Mapping[Server, Tally]) -> None:
        """Another server has answered: those that refused the same request are at fault, not the request."""
        for server, tally in tallies.items():
            if isinstance(tally.last, Refusal) and not isinstance(tally.last, NotOffered):
                self._set_aside(server, tally.started, tally.last)

    def _set_aside(self, server: Server, started: float, trouble: Trouble) -> None:
        with self.lock:
            if started < server.changed:
                return
            now = time.monotonic()
            server.failures += 1
            spared = self.delay(server.failures)
            server.rest_until = now + max(spared, trouble.retry_after)
            server.probe_at = now + min(spared, PROBE_SECONDS)
            server.aside_since = now if server.aside_since is None else server.aside_since
            server.changed, server.on_trial, server.away = now, False, server.away or trouble.away
            self._warn(server, trouble)

    def _answered(self, server: Server, started: float) -> None:
        with self.lock:
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

    def _wake(self, server: Server) -> None:
        # An overloaded server answers one and turns the next away: whoever waits for that one should go on waiting.
        if server.away:
            self.returns += 1
            self.lock.notify_all()

    def _start_due_probes(self) -> None:
        now = time.monotonic()
        for server in self.all:
            resting = server.aside_since is not None and not server.on_trial and not server.probing
            if resting and now >= server.probe_at:
                server.probing = True
                threading.Thread(target=self._probe, args=(server,), name="retrieval-probe", daemon=True).start()

    def _probe(self, server: Server) -> None:
        trouble = None
        try:
            server.endpoint.probe()
        except (PassingTrouble, OtherIndex) as failed:
            trouble = failed
        with self.lock:
            server.probing = False
            if server.aside_since is None or server.on_trial or self.closed:
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

    def _warn(self, server: Server, trouble: Trouble) -> None:
        now = time.monotonic()
        told = server.aside_since is not None and server.warned >= server.aside_since
        news = isinstance(trouble, OtherIndex) != server.told_other
        if not news and now - server.warned < (SECONDS_BETWEEN_REMINDERS if told else SECONDS_BETWEEN_WARNINGS):
            return
        server.told_other = isinstance(trouble, OtherIndex)
        server.warned = now
        others = "the other servers are asked meanwhile" if len(self.all) > 1 else "searches wait for it"
        logger.warning("%s does not answer as it should (%s); %s", server.url, trouble, others)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the n-th failure in a row."""
        return pause(attempt, self._backoff, MAX_BACKOFF_SECONDS)

    def wait_for_return(self, returns: int, seconds: float, stop: threading.Event | None) -> None:
        """Wait for `seconds`, or until a server is back: `returns` is the number of returns so far."""
        deadline = time.monotonic() + seconds
        with self.lock:
            while self.returns == returns and not self.closed and not (stop is not None and stop.is_set()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                self._start_due_probes()
                self.lock.wait(min(remaining, PROBE_SECONDS))
