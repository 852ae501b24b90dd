"""Remote retrieval over the Search-R1 wire format.

Request: POST {url}/retrieve with `{"queries": [str], "topk": int, "return_scores": true}`. Response: `{"result":
[[{"document": {...}, "score": float}, ...], ...]}`, one ranking a query. Servers that ignore `return_scores` answer
with the bare documents; both shapes are read. A document holds `contents`, or `title` and `text`, and perhaps an `id`.

A search is answered in full or raises `RetrievalError`; trouble that may pass is retried a bounded number of times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from rex_rag.data.corpus import CorpusError, passage_from_row
from rex_rag.data.jsonl import shorten
from rex_rag.retrieval.base import DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT_SECONDS, RetrievalError, check_request
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

ENDPOINT = "/retrieve"
CHECK_QUERY = "Who wrote Hamlet?"
DEFAULT_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# A server that does not accept a connection within this time is away; waiting for an answer may take longer.
MAX_CONNECT_SECONDS = 10.0
# An address on this machine is never behind the proxy that the environment may name.
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class _PassingTrouble(Exception):
    """A failed attempt that is worth another one."""


class RemoteRetriever:
    """Asks a retrieval server for passages. Safe to share between threads; connections are pooled.

    Args:
        url: http(s) address of the server, with or without the final `/retrieve`.
        timeout: seconds one attempt may take, > 0.
        max_attempts: attempts a search, >= 1.
        backoff: seconds before the second attempt, >= 0; doubled for each further one up to `MAX_BACKOFF_SECONDS`, and
            shortened by a random part of up to a half, so that many workers do not return at the same moment.

    Raises:
        RetrievalError: for an argument that makes no sense.
    """

    def __init__(
        self,
        url: str,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        backoff: float = DEFAULT_BACKOFF_SECONDS,
    ) -> None:
        host = check_url(url)
        if not (timeout > 0 and math.isfinite(timeout)):
            raise RetrievalError(f"timeout={timeout} seconds; an attempt needs a finite time above 0")
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
            raise RetrievalError(f"max_attempts={max_attempts!r}; it must be an integer of at least 1")
        if not (backoff >= 0 and math.isfinite(backoff)):
            raise RetrievalError(f"backoff={backoff} seconds; it must be finite and at least 0")
        base = url.rstrip("/")
        self._target = httpx.URL(base if base.endswith(ENDPOINT) else base + ENDPOINT)
        # What logs, errors and model cards may show: the address without a user name or password.
        self.url = str(self._target.copy_with(userinfo=b""))
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._backoff = backoff
        # Own generator: waiting must not advance the seeded global one that a run draws from.
        self._jitter = random.Random()
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, MAX_CONNECT_SECONDS)),
            trust_env=host not in _LOOPBACK_HOSTS,
        )

    @property
    def description(self) -> str:
        return f"retrieval server at {self.url}"

    def close(self) -> None:
        """Close the pooled connections; the retriever cannot be used afterwards."""
        self._http.close()

    def check(self) -> None:
        """Send one real query, with the retries of any search."""
        self.search([CHECK_QUERY], top_k=1)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return for each query the server's passages, best first: at least one, at most `top_k`.

        Raises:
            RetrievalError: for a blank query or a `top_k` below 1; when every attempt failed; at once when the server
                refuses the request (4xx but 429) or answers with something other than one non-empty ranking a query.
        """
        check_request(queries, top_k)
        if not queries:
            return []
        payload = {"queries": list(queries), "topk": top_k, "return_scores": True}
        for attempt in range(1, self._max_attempts + 1):
            try:
                body = self._post(payload, attempt)
                break
            except _PassingTrouble as trouble:
                if attempt == self._max_attempts:
                    raise self._error(
                        f"{trouble}. Is the server running and reachable from here? Otherwise raise the timeout "
                        f"({self._timeout:g} s) or max_attempts",
                        attempt,
                    ) from trouble.__cause__
                delay = self._delay(attempt)
                logger.warning(
                    "%s: attempt %d of %d failed (%s); trying again in %.2f s",
                    self.url,
                    attempt,
                    self._max_attempts,
                    trouble,
                    delay,
                )
                time.sleep(delay)
        try:
            return _read_rankings(body, queries, top_k)
        except _WrongAnswer as error:
            raise self._error(f"{error}; the server does not speak the Search-R1 format", attempt) from None

    def _post(self, payload: dict[str, Any], attempt: int) -> bytes:
        deadline = time.monotonic() + self._timeout
        try:
            with self._http.stream("POST", self._target, json=payload) as response:
                chunks = []
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    # The client's read timeout starts anew with each chunk, so a dripping server would never hit it.
                    if time.monotonic() > deadline:
                        raise _PassingTrouble(f"the answer was not complete after {self._timeout:g} s")
        except httpx.TimeoutException as error:
            raise _PassingTrouble(f"no answer within {self._timeout:g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise _PassingTrouble(f"connection failed ({type(error).__name__}: {error})") from error
        except httpx.DecodingError as error:
            raise self._error(f"the answer's content encoding is broken ({error})", attempt) from error
        body = b"".join(chunks)
        status = response.status_code
        if status == 200:
            return body
        said = f"HTTP {status} {response.reason_phrase}: {shorten(body.decode('utf-8', 'replace'), 200)}"
        if status == 429 or status >= 500:
            raise _PassingTrouble(said)
        raise self._error(f"{said}; the server refuses this request, so it was not repeated: check the URL", attempt)

    def _delay(self, attempt: int) -> float:
        longest = min(MAX_BACKOFF_SECONDS, self._backoff * 2 ** (attempt - 1))
        return longest * self._jitter.uniform(0.5, 1.0)

    def _error(self, cause: str, attempts: int) -> RetrievalError:
        return RetrievalError(f"search at {self.url} failed after {attempts} attempt{'s' * (attempts > 1)}: {cause}")


def check_url(url: str) -> str:
    """Return the host of an http(s) URL, or raise `RetrievalError`."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise RetrievalError(f"retriever URL {url!r} is malformed ({error}); use http://host:port") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise RetrievalError(f"retriever URL {url!r} is not a plain http(s) address; use http://host:port[/path]")
    return parsed.host


class _WrongAnswer(Exception):
    """A complete answer that is not what the wire format promises."""


def _read_rankings(body: bytes, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _WrongAnswer(f"malformed JSON ({error}) in {shorten(body)}") from None
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, list):
        raise _WrongAnswer(f'no list under "result" in {shorten(answer)}')
    if len(result) != len(queries):
        raise _WrongAnswer(f"{len(result)} results for {len(queries)} queries")
    return [_read_ranking(entry, query, top_k) for entry, query in zip(result, queries, strict=True)]


def _read_ranking(entry: Any, query: str, top_k: int) -> list[Passage]:
    if not isinstance(entry, list):
        raise _WrongAnswer(f"the result of query {shorten(query)} is not a list: {shorten(entry)}")
    if not entry:
        raise _WrongAnswer(f"the result of query {shorten(query)} is empty")
    return [_read_passage(item, query) for item in entry[:top_k]]


def _read_passage(item: Any, query: str) -> Passage:
    if not isinstance(item, dict):
        raise _WrongAnswer(f"a result of query {shorten(query)} is not an object: {shorten(item)}")
    document, score = (item["document"], item.get("score")) if "document" in item else (item, None)
    if not isinstance(document, dict):
        raise _WrongAnswer(f"a document for query {shorten(query)} is not an object: {shorten(document)}")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise _WrongAnswer(f"a score for query {shorten(query)} is not a number: {shorten(score)}")
    try:
        passage = passage_from_row(document, default_id="")
    except CorpusError as error:
        raise _WrongAnswer(f"a document for query {shorten(query)} is unusable: {error}") from None
    # Without an id from the server the text itself identifies the passage, the same in every run.
    identity = passage.id or hashlib.sha1(f"{passage.title}\n{passage.text}".encode()).hexdigest()[:16]
    return Passage(identity, passage.title, passage.text, None if score is None else float(score))
