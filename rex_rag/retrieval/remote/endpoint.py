"""One retrieval server as seen from a client: one attempt at a search, one look at its health, no retries.

Every attempt ends within its time, in rankings or in one of two kinds of trouble: `PassingTrouble`, which another
attempt may be spared, and `Refusal`, which the same request would meet again at the same server.

Invariant: all answers that are given come from servers that search the same, as far as servers tell what they search
(`Pledge`): ours tell it with every answer, others at most on their health page, which is read after each trouble.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.remote.wire import (
    HEALTH_PATH,
    INDEX_HEADER,
    READ_PATH,
    SEARCH_PATH,
    UnusableRanking,
    WireError,
    decode_documents,
    decode_rankings,
    encode_keys,
    encode_request,
    index_of,
)
from rex_rag.support.http import AnswerTooLarge, bounded_client, parse_json
from rex_rag.support.politeness import retry_after
from rex_rag.support.secrets import hide
from rex_rag.support.tables import one_line
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

# Health is answered without work: a server that takes longer is no use to anybody.
PROBE_TIMEOUT_SECONDS = 2.0
HEALTH_TIMEOUT_SECONDS = 10.0
# 256 queries of 100 passages of 10 kB each; beyond it something is wrong, and memory is at stake.
MAX_RESPONSE_BYTES = 256 * 2**20
# A smaller request is answered in less: so much for each passage asked for, and for each document.
MAX_PASSAGE_BYTES = 2**20
MAX_DOCUMENT_BYTES = 64 * 2**20
MAX_HEALTH_BYTES = 2**20
MAX_RETRY_AFTER_SECONDS = 30.0
# Statuses below 500 that say "later" rather than "no": the server gave up waiting, or is asked too much at once.
_PASSING_STATUSES = (408, 429)
# What a server without documents to read answers: it knows no such page, or its engine only searches.
_NOT_OFFERED = (404, 405, 501)
_JSON = {"Content-Type": "application/json"}
_MOST_TOLD_CHARACTERS = 64


class Trouble(Exception):
    """A failed attempt. `away`: nobody is there to answer. `retry_after`: seconds the server asks to be spared."""

    def __init__(self, cause: str, *, away: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(cause)
        self.away = away
        self.retry_after = retry_after


class PassingTrouble(Trouble):
    """A failed attempt that is worth another one."""


class Refusal(Trouble):
    """The server refuses the request, or answers something else than was asked: it would do so again."""


class NotOffered(Refusal):
    """The server answers searches alone: no fault of it, and none of the request."""


class OtherIndex(Refusal):
    """The server searches something else than was searched before."""


class Pledge:
    """What the servers of one list search: whoever tells it first, all are held to it from then on."""

    def __init__(self) -> None:
        self.index: str | None = None
        self._first = ""
        self._lock = threading.Lock()

    def hold(self, who: str, told: str | None) -> None:
        """Raise `OtherIndex` unless `told` is what was told before; None where nothing was told."""
        with self._lock:
            if self.index is None:
                self.index, self._first = told, who
            if told != self.index:
                said = "does not say what it searches" if told is None else f"searches something else ({told})"
                raise OtherIndex(
                    f"it {said}, and this run began with what {self._first} told ({self.index}): figures would be of "
                    "neither; serve that index again, and name servers of one index"
                )


class Endpoint:
    """A server's address with its pooled connections. Safe to share between threads.

    Args:
        url: http(s) address of the server, with or without the final `/retrieve`.
        timeout: seconds one attempt may take, all in all.
        pledge: what the server is held to; its own by default.

    Raises:
        RetrievalError: for a malformed address.
    """

    def __init__(self, url: str, timeout: float, pledge: Pledge | None = None) -> None:
        self._host = check_url(url)
        base = url.rstrip("/").removesuffix(SEARCH_PATH)
        self._read_url = httpx.URL(base + READ_PATH).copy_with(userinfo=b"")
        # Without a user name or password: httpx logs the addresses it asks, and ours stand in errors and model cards.
        self._search_url = httpx.URL(base + SEARCH_PATH).copy_with(userinfo=b"")
        self._health_url = httpx.URL(base + HEALTH_PATH).copy_with(userinfo=b"")
        self.url = str(self._search_url)
        self._timeout = timeout
        self._pledge = pledge or Pledge()
        # What a server that does not tell it with its answers told on its health page, asked after each trouble.
        self._told: str | None = None
        self._asked = False
        # Reading certificates takes 30 ms; one context serves all clients.
        self._ssl = httpx.create_ssl_context(trust_env=self._search_url.scheme == "https")
        credentials = httpx.URL(url)
        self._auth = (credentials.username, credentials.password) if credentials.userinfo else None
        together = ":".join(self._auth or ())
        self._secrets = (credentials.password, base64.b64encode(together.encode()).decode() if together else "")
        # A client for each request under way, the last one used first: one client shared by 64 threads takes four
        # times the CPU a request, since it looks through all of its connections at each.
        self._idle: list[httpx.Client] = []
        self._lock = threading.Lock()
        self._closed = self._told_left_out = False

    def close(self) -> None:
        """Close the idle connections now, and each other one after its request; no request can be begun."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()

    @contextlib.contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        with self._lock:
            if self._closed:
                raise PassingTrouble("the client was closed")
            client = self._idle.pop() if self._idle else None
        if client is None:
            client = bounded_client(
                self._host,
                self._timeout,
                auth=self._auth,
                verify=self._ssl,
            )
        try:
            yield client
        finally:
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(client)
            if closed:
                client.close()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Ask once. Raises `PassingTrouble` or `Refusal`."""
        return self._ask(
            self._search_url,
            encode_request(queries, top_k),
            len(queries) * top_k * MAX_PASSAGE_BYTES,
            lambda body: decode_rankings(body, queries, top_k, self._tell_left_out),
        )

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        """Ask once for documents. Raises as `search`, and `NotOffered` for a server that has no such page."""
        return self._ask(
            self._read_url,
            encode_keys(keys),
            len(keys) * MAX_DOCUMENT_BYTES,
            lambda body: decode_documents(body, keys, self._tell_left_out),
        )

    @property
    def told(self) -> str | None:
        """What the server told of what it searches, as far as it was asked."""
        return self._told

    def _ask(
        self, url: httpx.URL, content: bytes, most_bytes: int, decode: Callable[[bytes], list[list[Passage]]]
    ) -> list[list[Passage]]:
        try:
            response = self._post(url, content, MAX_PASSAGE_BYTES + most_bytes)
            body, status = response.content, response.status_code
            if status == 200:
                self._hold(response.headers.get(INDEX_HEADER))
        except PassingTrouble:
            self._asked = False
            raise
        if status != 200:
            said = f"HTTP {status} {shorten(response.reason_phrase)}: {self._shown(body)}"
            if url == self._read_url and status in _NOT_OFFERED:
                raise NotOffered(
                    f"{said}; the server only searches, as Search-R1's own does: serve the index with "
                    "`rex-rag serve`, or leave reading documents out"
                )
            if status >= 500 or status in _PASSING_STATUSES:
                self._asked = False
                raise PassingTrouble(said, retry_after=retry_after(response.headers, MAX_RETRY_AFTER_SECONDS))
            raise Refusal(f"{said}; the server refuses this request, so it was not repeated: check the URL")
        try:
            return decode(body)
        except UnusableRanking as error:
            raise Refusal(f"{error}; a document needs a text: mend what the server serves") from None
        except WireError as error:
            if "content-length" in response.headers or "transfer-encoding" in response.headers:
                raise Refusal(f"{error}; the server does not speak the Search-R1 format") from None
            # The end of such an answer is the end of the connection, whoever ended it.
            raise PassingTrouble(f"{error}; its length was not announced, so it may have been cut off") from None

    def _tell_left_out(self, said: str) -> None:
        if not self._told_left_out:
            self._told_left_out = True
            logger.warning("%s: %s; such results are left out of rankings from now on without a word", self.url, said)

    def _hold(self, told: str | None) -> None:
        """Hold an answer to the pledge. `told`: with the answer, None of a server that does not do that."""
        if told is None and not self._asked:
            self._told, self._asked = index_of(self.health()), True
        elif told is not None:
            self._told = one_line(told)[:_MOST_TOLD_CHARACTERS]
        self._pledge.hold(self.url, self._told)

    def _shown(self, body: bytes) -> str:
        return shorten(hide(body.decode("utf-8", "replace"), *self._secrets), 200)

    def probe(self) -> None:
        """Ask for the server's health. A server that knows no such question (Search-R1's own: 404) is up.

        Raises:
            PassingTrouble: when it does not answer within `PROBE_TIMEOUT_SECONDS`, or says that it is not ready.
            OtherIndex: when it says that it searches something else than it is held to.
        """
        try:
            response = self._get_health(PROBE_TIMEOUT_SECONDS)
        except httpx.RequestError as error:
            raise PassingTrouble(f"no sign of life ({type(error).__name__}: {error})", away=True) from error
        status = response.status_code
        if status >= 500 or status in _PASSING_STATUSES:
            said = f"not ready: HTTP {status} {shorten(response.reason_phrase)} from {HEALTH_PATH}"
            raise PassingTrouble(said, away=True, retry_after=retry_after(response.headers, MAX_RETRY_AFTER_SECONDS))
        told = index_of(_object(response.content))
        # One that says nothing here may do so with its answers.
        if told is not None and self._pledge.index is not None:
            self._pledge.hold(self.url, told)

    def health(self) -> dict[str, Any]:
        """What the server says of itself; empty for one that is away or says nothing that can be read."""
        try:
            return _object(self._get_health(HEALTH_TIMEOUT_SECONDS).content)
        except (httpx.RequestError, Trouble):
            return {}

    def _get_health(self, seconds: float) -> httpx.Response:
        with self._client() as client:
            extensions = {"max_bytes": MAX_HEALTH_BYTES}
            return client.get(self._health_url, timeout=min(seconds, self._timeout), extensions=extensions)

    def _post(self, url: httpx.URL, content: bytes, most_bytes: int) -> httpx.Response:
        extensions = {"max_bytes": min(most_bytes, MAX_RESPONSE_BYTES)}
        try:
            with self._client() as client:
                return client.post(url, content=content, headers=_JSON, extensions=extensions)
        except httpx.ConnectTimeout as error:
            raise PassingTrouble(f"no connection in time ({error})", away=True) from error
        except httpx.TimeoutException as error:
            raise PassingTrouble(f"no answer within {self._timeout:g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise PassingTrouble(f"connection failed ({type(error).__name__}: {error})", away=True) from error
        except AnswerTooLarge as error:
            raise Refusal(f"{error}: ask for fewer passages, or for fewer queries a request") from error
        except httpx.DecodingError as error:
            raise Refusal(f"the answer cannot be read ({error})") from error


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; empty for anything else."""
    try:
        said = parse_json(body)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def without_password(url: str) -> str:
    """An address as it may be shown, well formed or not: without user name and password."""
    return re.sub("//[^/]*@", "//", url)


def check_url(url: str) -> str:
    """Return the host of an http(s) URL, or raise `RetrievalError`, in which no user name or password stands."""
    shown = without_password(url) if isinstance(url, str) else url
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise RetrievalError(f"retriever URL {shown!r} is malformed ({error}); use http://host:port") from None
    odd = parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment
    if odd or not 0 < (parsed.port or 80) < 2**16:
        raise RetrievalError(f"retriever URL {shown!r} is not a plain http(s) address; use http://host:port[/path]")
    return parsed.host
