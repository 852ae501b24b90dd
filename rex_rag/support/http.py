"""The one manner in which this package asks others over HTTP: whoever answers, a request ends in time and in bounds.

`httpx` bounds every wait for bytes, but neither the whole of an answer nor its size: a server that drips its headers
or its body, or never ends, would be listened to for ever. Here the read timeout of a request is that of all of it, and
an answer that is too large or compressed (what it holds could not be bounded) is an error of `httpx` like any other.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

# An address on this machine is never behind the proxy that the environment may name.
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
MAX_CONNECT_SECONDS = 10.0
# Unless a request says otherwise, by its extension `max_bytes`.
MAX_ANSWER_BYTES = 16 * 2**20
# Servers drop idle connections (uvicorn after 5 s); a request sent at that moment would look like a dead server.
KEEPALIVE_SECONDS = 3.0
_WRITTEN_AT_ONCE = 2**16
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_until = threading.local()


class AnswerTooLarge(httpx.DecodingError):
    """An answer beyond the bytes that are read."""


def bounded_client(host: str, seconds: float, connections: int | None = None, **options: Any) -> httpx.Client:
    """A client for the server at `host`, whose requests take `seconds` at most, all in all.

    A request may differ: by its `timeout`, and by `extensions={"max_bytes": n}`.
    """
    trust_env = host not in _LOOPBACK_HOSTS
    if not trust_env and "verify" not in options:
        options["verify"] = httpx.create_ssl_context(trust_env=False)
    timeout = httpx.Timeout(seconds, connect=min(seconds, MAX_CONNECT_SECONDS))
    limits = httpx.Limits(max_connections=connections, keepalive_expiry=KEEPALIVE_SECONDS)
    return bound(httpx.Client(timeout=timeout, limits=limits, trust_env=trust_env, **options))


def bound(client: httpx.Client) -> httpx.Client:
    """Put the bounds on a client that somebody else made."""
    # Private names of httpx and httpcore, here alone: a transport given at first would leave out the proxies that the
    # environment names.
    client._transport = _Bounded(client._transport)
    client._mounts = {pattern: inner and _Bounded(inner) for pattern, inner in client._mounts.items()}
    return client


def parse_json(body: bytes) -> Any:
    """What a body of JSON holds; half a surrogate pair, which nothing can encode, is a question mark.

    Raises:
        ValueError: for anything but UTF-8 JSON, and for one that is nested too deeply.
    """
    try:
        value = json.loads(body.decode("utf-8"))
        if _HALF_A_PAIR.search(body):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


class _Bounded(httpx.BaseTransport):
    def __init__(self, inner: Any) -> None:
        self._inner = inner
        inner._pool._network_backend = _Backend(inner._pool._network_backend)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Accept-Encoding"] = "identity"
        seconds = request.extensions.get("timeout", {}).get("read")
        until = math.inf if seconds is None else time.monotonic() + seconds
        with _within(until):
            response = self._inner.handle_request(request)
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            response.close()
            raise httpx.DecodingError(f"the answer is compressed ({encoding!r:.40}), which was not asked for")
        most = request.extensions.get("max_bytes", MAX_ANSWER_BYTES)
        announced = int(response.headers.get("content-length", 0))
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _BoundedBody(response.stream, until, most, announced)
        return response

    def close(self) -> None:
        self._inner.close()


class _BoundedBody(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, until: float, most: int, announced: int) -> None:
        self._stream, self._until, self._most, self._announced = stream, until, most, announced

    def __iter__(self) -> Iterator[bytes]:
        self._check(self._announced)
        size, chunks = 0, iter(self._stream)
        while True:
            with _within(self._until):
                chunk = next(chunks, None)
            if chunk is None:
                return
            size += len(chunk)
            self._check(size)
            yield chunk

    def _check(self, size: int) -> None:
        if size > self._most:
            raise AnswerTooLarge(f"an answer of at least {size:,} bytes, beyond the {self._most:,} that are read")

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _within(until: float) -> Iterator[None]:
    """What this thread reads and writes in the block ends then."""
    _until.time = until
    try:
        yield
    finally:
        _until.time = math.inf


def _left(timeout: float | None, error: type[Exception]) -> float | None:
    left = getattr(_until, "time", math.inf) - time.monotonic()
    if left <= 0:
        raise error("the time of the whole request is over")
    return timeout if left == math.inf else left if timeout is None else min(timeout, left)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *more: Any, **options: Any
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._inner.connect_tcp(host, port, left, *more, **options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # A part at a time: a server that reads in drips would have the whole timeout for each of them.
        for start in range(0, len(buffer), _WRITTEN_AT_ONCE):
            part = buffer[start : start + _WRITTEN_AT_ONCE]
            self._inner.write(part, _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _left(timeout, httpcore.ConnectTimeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
