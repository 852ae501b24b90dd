"""One retrieval server as seen from a client: one attempt at a search, one look at its health, no retries.

Every attempt ends within its time, in rankings or in one of two kinds of trouble: `PassingTrouble`, which another
attempt may be spared, and `Refusal`, which the same request would meet again at the same server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.remote.wire import (
    HEALTH_PATH,
    READ_PATH,
    SEARCH_PATH,
    UnusableRanking,
    WireError,
    decode_documents,
    decode_rankings,
    encode_keys,
    encode_request,
)
from rex_rag.support.politeness import retry_after
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

# A server that does not accept a connection within this time is away; waiting for an answer may take longer.
MAX_CONNECT_SECONDS = 10.0
# Health is answered without work: a server that takes longer is no use to anybody.
PROBE_TIMEOUT_SECONDS = 2.0
# Servers drop idle connections (uvicorn after 5 s); a request sent at that moment would look like a dead server.
KEEPALIVE_SECONDS = 3.0
# 256 queries of 100 passages of 10 kB each; beyond it something is wrong, and memory is at stake.
MAX_RESPONSE_BYTES = 256 * 2**20
MAX_RETRY_AFTER_SECONDS = 30.0
# Statuses below 500 that say "later" rather than "no": the server gave up waiting, or is asked too much at once.
_PASSING_STATUSES = (408, 429)
# What a server without documents to read answers: it knows no such page, or its engine only searches.
_NOT_OFFERED = (404, 405, 501)
_JSON = {"Content-Type": "application/json"}
# An address on this machine is never behind the proxy that the environment may name.
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


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


class Endpoint:
    """A server's address with its pooled connections. Safe to share between threads.

    Args:
        url: http(s) address of the server, with or without the final `/retrieve`.
        timeout: seconds one attempt may take.

    Raises:
        RetrievalError: for a malformed address.
    """

    def __init__(self, url: str, timeout: float) -> None:
        host = check_url(url)
        base = url.rstrip("/").removesuffix(SEARCH_PATH)
        self._read_url = httpx.URL(base + READ_PATH).copy_with(userinfo=b"")
        # Without a user name or password: httpx logs the addresses it asks, and ours stand in errors and model cards.
        self._search_url = httpx.URL(base + SEARCH_PATH).copy_with(userinfo=b"")
        self._health_url = httpx.URL(base + HEALTH_PATH).copy_with(userinfo=b"")
        self.url = str(self._search_url)
        self._timeout = timeout
        self._connect_timeout = min(timeout, MAX_CONNECT_SECONDS)
        self._trust_env = host not in _LOOPBACK_HOSTS
        # Reading certificates takes 30 ms; plain HTTP on this machine, without a proxy, never looks at one.
        certified = self._trust_env or self._search_url.scheme == "https"
        self._ssl = httpx.create_ssl_context(verify=certified, trust_env=self._trust_env)
        credentials = httpx.URL(url)
        self._auth = (credentials.username, credentials.password) if credentials.userinfo else None
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
            client = httpx.Client(
                auth=self._auth,
                timeout=httpx.Timeout(self._timeout, connect=self._connect_timeout),
                limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
                # Between machines of one rack packing passages costs more than sending them.
                headers={"Accept-Encoding": "identity"},
                verify=self._ssl,
                trust_env=self._trust_env,
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
            lambda body: decode_rankings(body, queries, top_k, self._tell_left_out),
        )

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        """Ask once for documents. Raises as `search`, and `NotOffered` for a server that has no such page."""
        return self._ask(
            self._read_url, encode_keys(keys), lambda body: decode_documents(body, keys, self._tell_left_out)
        )

    def _ask(
        self, url: httpx.URL, content: bytes, decode: Callable[[bytes], list[list[Passage]]]
    ) -> list[list[Passage]]:
        response, body = self._post(url, content)
        status = response.status_code
        if status != 200:
            said = f"HTTP {status} {response.reason_phrase}: {shorten(body.decode('utf-8', 'replace'), 200)}"
            if url == self._read_url and status in _NOT_OFFERED:
                raise NotOffered(
                    f"{said}; the server only searches, as Search-R1's own does: serve the index with "
                    "`rex-rag serve`, or leave reading documents out"
                )
            if status >= 500 or status in _PASSING_STATUSES:
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

    def probe(self) -> None:
        """Ask for the server's health. A server that knows no such question (Search-R1's own: 404) is up.

        Raises:
            PassingTrouble: when it does not answer within `PROBE_TIMEOUT_SECONDS`, or says that it is not ready.
        """
        timeout = min(PROBE_TIMEOUT_SECONDS, self._timeout)
        try:
            # The status is the whole answer: a body is not waited for.
            with self._client() as client, client.stream("GET", self._health_url, timeout=timeout) as response:
                status = response.status_code
        except httpx.HTTPError as error:
            raise PassingTrouble(f"no sign of life ({type(error).__name__}: {error})", away=True) from error
        if status >= 500 or status in _PASSING_STATUSES:
            said = f"not ready: HTTP {status} {response.reason_phrase} from {HEALTH_PATH}"
            raise PassingTrouble(said, away=True, retry_after=retry_after(response.headers, MAX_RETRY_AFTER_SECONDS))

    def health(self) -> dict[str, Any]:
        """What the server says of itself; empty for one that is away or says nothing that can be read."""
        timeout = min(MAX_CONNECT_SECONDS, self._timeout)
        deadline = time.monotonic() + timeout
        try:
            with self._client() as client, client.stream("GET", self._health_url, timeout=timeout) as response:
                said = json.loads(self._read(response, deadline))
        except (httpx.HTTPError, Trouble, ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}

    def _post(self, url: httpx.URL, content: bytes) -> tuple[httpx.Response, bytes]:
        deadline = time.monotonic() + self._timeout
        try:
            with (
                self._client() as client,
                client.stream("POST", url, content=content, headers=_JSON) as response,
            ):
                return response, self._read(response, deadline)
        except httpx.ConnectTimeout as error:
            raise PassingTrouble(f"no connection within {self._connect_timeout:g} s", away=True) from error
        except httpx.TimeoutException as error:
            raise PassingTrouble(f"no answer within {self._timeout:g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise PassingTrouble(f"connection failed ({type(error).__name__}: {error})", away=True) from error
        except httpx.DecodingError as error:
            raise Refusal(f"the answer's content encoding is broken ({error})") from error

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        _check_size(int(response.headers.get("content-length", 0)))
        chunks, size = [], 0
        for chunk in response.iter_bytes():
            chunks.append(chunk)
            size += len(chunk)
            _check_size(size)
            # The connection's read timeout starts anew with each chunk: a dripping server would never hit it.
            if time.monotonic() > deadline:
                raise PassingTrouble(f"the answer was not complete after {self._timeout:g} s")
        return b"".join(chunks)


def _check_size(size: int) -> None:
    if size > MAX_RESPONSE_BYTES:
        raise Refusal(
            f"an answer of at least {size:,} bytes, beyond the {MAX_RESPONSE_BYTES:,} that are read: ask for fewer "
            "passages, or for fewer queries a request"
        )


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
