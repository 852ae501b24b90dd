"""The load that a benchmark puts on a server: many HTTP connections driven by as little Python as possible.

A general HTTP client takes half a millisecond of CPU a request, more than many a search; this one knows POST, JSON and
kept connections, and no more. It checks every answer's shape, outside of the measured time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from urllib.parse import unquote_to_bytes, urlsplit

from rex_rag.retrieval.remote.wire import SEARCH_PATH
from rex_rag.support.wording import counted, shorten

STAGES = ("queue", "encode", "search", "fetch")
_DURATION = re.compile(rb"(\w+);dur=([0-9.]+)")
_MAX_HEADER_BYTES = 64 * 1024
# After a failed connection: a server that is away should not cost a thousand attempts a second.
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Load:
    """What one process sends: `batches`, each a request, over `concurrency` connections at once; `warm_up` before."""

    url: str
    batches: Sequence[Sequence[str]]
    warm_up: Sequence[Sequence[str]]
    concurrency: int
    top_k: int
    timeout: float


@dataclass
class Samples:
    """What was measured of the answered requests, in seconds, one entry a request, and the causes of the others."""

    latencies: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    answered_queries: int = 0
    errors: Counter = field(default_factory=Counter)
    started: float = 0.0
    ended: float = 0.0
    cpu_seconds: float = 0.0


class RequestFailed(Exception):
    """A request without a usable answer; the text is the cause that is counted."""


def drive(load: Load, ready: Callable[[], object], tick: Callable[[int], object]) -> Samples:
    """Warm up, call `ready`, send everything; `tick` gets the queries of every finished request."""
    return asyncio.run(_drive(load, ready, tick))


async def _drive(load: Load, ready: Callable[[], object], tick: Callable[[int], object]) -> Samples:
    connections = [Connection(load.url, load.timeout) for _ in range(load.concurrency)]
    await _send(connections, load.warm_up, load.top_k, Samples(), lambda _: None)
    ready()
    samples = Samples(started=perf_counter())
    cpu = thread_time()
    await _send(connections, load.batches, load.top_k, samples, tick)
    samples.ended, samples.cpu_seconds = perf_counter(), thread_time() - cpu
    for connection in connections:
        connection.close()
    return samples


async def _send(
    connections: list[Connection],
    batches: Sequence[Sequence[str]],
    top_k: int,
    samples: Samples,
    tick: Callable[[int], object],
) -> None:
    waiting = iter(batches)
    await asyncio.gather(*(_work(connection, waiting, top_k, samples, tick) for connection in connections))


async def _work(
    connection: Connection,
    waiting: Iterator[Sequence[str]],
    top_k: int,
    samples: Samples,
    tick: Callable[[int], object],
) -> None:
    for queries in waiting:
        request = connection.request(queries, top_k)
        started = perf_counter()
        try:
            timing, body = await connection.send(request)
            seconds = perf_counter() - started
            _check(body, len(queries))
        except RequestFailed as failure:
            samples.errors[str(failure)] += 1
        else:
            samples.latencies.append(seconds)
            samples.answered_queries += len(queries)
            known = {name.decode(): float(value) / 1e3 for name, value in _DURATION.findall(timing)}
            for stage in STAGES:
                if stage in known:
                    samples.stages.setdefault(stage, []).append(known[stage])
            if known:
                wire = seconds - sum(known.get(stage, 0.0) for stage in STAGES)
                samples.stages.setdefault("wire", []).append(max(0.0, wire))
        tick(len(queries))


def _check(body: bytes, count: int) -> None:
    try:
        result = json.loads(body)["result"]
    except (ValueError, KeyError, TypeError):
        raise RequestFailed(f"no Search-R1 answer: {shorten(body[:60])}") from None
    if not isinstance(result, list):
        raise RequestFailed(f"no Search-R1 answer: {shorten(body[:60])}")
    if len(result) != count:
        raise RequestFailed(f"{counted(len(result), 'result')} for {counted(count, 'query', 'queries')}")
    if not all(result):
        raise RequestFailed("an empty ranking")


def _authorization(credentials: str) -> str:
    if not credentials:
        return ""
    return f"Authorization: Basic {base64.b64encode(unquote_to_bytes(credentials)).decode()}\r\n"


class Connection:
    """One kept HTTP/1.1 connection, opened when first needed and again after a failure."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        path = parts.path.rstrip("/")
        credentials, _, host = parts.netloc.rpartition("@")
        self._head = (
            f"POST {path if path.endswith(SEARCH_PATH) else path + SEARCH_PATH} HTTP/1.1\r\nHost: {host}\r\n"
            f"{_authorization(credentials)}Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._timeout = timeout
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def request(self, queries: Sequence[str], top_k: int) -> bytes:
        payload = {"queries": list(queries), "topk": top_k, "return_scores": True}
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    async def send(self, request: bytes) -> tuple[bytes, bytes]:
        """The Server-Timing header and the body of the answer."""
        try:
            async with asyncio.timeout(self._timeout):
                status, timing, body = await self._exchange(request)
        except TimeoutError:
            self.close()
            raise RequestFailed(f"no answer within {self._timeout:g} s") from None
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
            self.close()
            await asyncio.sleep(_PAUSE_SECONDS)
            raise RequestFailed(f"connection failed ({type(error).__name__})") from None
        if status != 200:
            raise RequestFailed(f"HTTP {status}: {body[:200].decode('utf-8', 'replace')}")
        return timing, body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    async def _exchange(self, request: bytes) -> tuple[int, bytes, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                self._host, self._port, ssl=self._tls, limit=_MAX_HEADER_BYTES
            )
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        status = int(first.split(b" ", 2)[1])
        if b"content-length" in headers:
            body = await reader.readexactly(int(headers[b"content-length"]))
        elif headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            body = await _read_chunks(reader)
        else:
            body = await reader.read()
            self.close()
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return status, headers.get(b"server-timing", b""), body


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        chunks.append((await reader.readexactly(size + 2))[:-2])
        if not size:
            return b"".join(chunks)
