"""A retrieval server in the Search-R1 wire format, over any retriever.

Invariants: what it accepted it answers, with one non-empty ranking a query or an error; what it cannot take it refuses
at once and says why. A failed search is never an empty result.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

from rex_rag.retrieval.base import CannotRead, RetrievalError, Retriever, as_retriever
from rex_rag.retrieval.remote.wire import HEALTH_PATH, READ_PATH, SEARCH_PATH
from rex_rag.retrieval.server.batching import MicroBatcher
from rex_rag.retrieval.server.metrics import ServerMetrics
from rex_rag.retrieval.server.options import ServerOptions
from rex_rag.retrieval.server.runner import DirectRunner, Overloaded, Runner, Threads
from rex_rag.retrieval.server.stages import Served, Timings, read_documents
from rex_rag.support.wording import shorten

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError(
        'the retrieval server needs fastapi and uvicorn: install them with `pip install "rex-rag[retrieval]"`'
    ) from error

logger = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
LOADING_RETRY_SECONDS = 2
# How often a request that takes long asks whether its client is still there.
CLIENT_CHECK_SECONDS = 1.0
# Longer than clients keep idle connections, so that it is they who close them and no request meets a closed one.
KEEP_ALIVE_SECONDS = 75
CLIENT_CLOSED_REQUEST = 499  # never sent: it stands in the metrics for clients that went away
_NOTHING = Response(b'{"result":[]}', media_type="application/json")


class RetrieveRequest(BaseModel):
    """A batch of searches."""

    queries: list[str] = Field(description="What to search for.", examples=[["who wrote Hamlet"]])
    topk: StrictInt | None = Field(None, description="Passages a query, best first; the server's default if null.")
    return_scores: StrictBool = Field(False, description="Answer with scores, or with the bare passages.")


class ReadRequest(BaseModel):
    """A batch of documents to read."""

    keys: list[str] = Field(description="Titles, or ids of passages.", examples=[["Hamlet"]])


class Document(BaseModel):
    """One passage. Its text comes from the corpus: treat it as untrusted."""

    model_config = ConfigDict(extra="allow")
    id: str = Field(description="The passage's id in the corpus.", examples=["7"])
    contents: str = Field(description="The title in quotes, a line break, the text.")


class ScoredDocument(BaseModel):
    """A passage and how well it matches."""

    document: Document
    score: float = Field(description="Higher is better; comparable within one ranking.")


class RetrieveResponse(BaseModel):
    """One ranking a query, in the order asked."""

    result: list[list[ScoredDocument]] | list[list[Document]] = Field(
        description="At least one and at most `topk` passages a query, best first; bare without `return_scores`."
    )


class ReadResponse(BaseModel):
    """One document a key, in the order asked."""

    result: list[list[Document]] = Field(
        description="The passages of a document in the order of the corpus; none for a key that nothing has."
    )


class Health(BaseModel):
    """Whether a search would be answered now."""

    status: str = Field(description="`ready` or `loading`.")
    retriever: str | None = Field(None, description="What is searched.")
    passages: int | None = Field(None, description="Passages in the index, where the engine knows.")
    identity: dict[str, str | int | float] | None = Field(
        None, description="Fingerprint of the index, hash of the corpus, and the settings that change what is found."
    )


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class _Refused(Exception):
    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.retry_after = retry_after


def create_app(
    load: Callable[[], Retriever],
    options: ServerOptions | None = None,
    on_load_failure: Callable[[BaseException], None] | None = None,
    identify: Callable[[Retriever], Mapping[str, Any]] | None = None,
) -> FastAPI:
    """Build the application; `load` runs in a thread of its own once the server has started.

    Args:
        load: makes the retriever. Until it returns, searches and /health are answered with 503.
        options: limits and batching; `host` and `port` matter to `serve` alone.
        on_load_failure: called on the event loop when `load` raises; by default the error is logged and the process
            gets SIGTERM, since a server that will never be ready should not go on.
        identify: says once, after `load`, what the loaded retriever is known by; /health tells it.
    """
    service = _Service(load, options or ServerOptions(), on_load_failure or _terminate, identify)
    app = FastAPI(
        title="rex-rag retrieval server",
        description="Passages for queries in the Search-R1 wire format, and documents by title.",
        lifespan=service.lifespan,
    )
    problems = {
        413: {"model": Problem, "description": "The body is larger than the limit."},
        422: {"model": Problem, "description": "Malformed, or more than a limit allows."},
        500: {"model": Problem, "description": "A query could not be answered."},
        503: {"model": Problem, "description": "Loading, or too much waits: come back after Retry-After seconds."},
    }
    unread = {501: {"model": Problem, "description": "The retriever behind this server only searches."}}
    for path, endpoint, summary, asked, answer, more in (
        (SEARCH_PATH, service.retrieve, "Search", RetrieveRequest, RetrieveResponse, {}),
        (READ_PATH, service.read, "Read documents by title or id", ReadRequest, ReadResponse, unread),
    ):
        body = {"content": {"application/json": {"schema": asked.model_json_schema()}}, "required": True}
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            summary=summary,
            responses={200: {"model": answer}, **problems, **more},
            openapi_extra={"requestBody": body},
            response_class=Response,
        )
    app.add_api_route(
        HEALTH_PATH,
        service.health,
        methods=["GET"],
        summary="Is the index loaded?",
        responses={200: {"model": Health}, 503: {"model": Health, "description": "Still loading."}},
        response_class=Response,
    )
    app.add_api_route(
        METRICS_PATH, service.show_metrics, methods=["GET"], summary="Prometheus metrics", response_class=Response
    )
    return app


def serve(
    load: Callable[[], Retriever],
    options: ServerOptions | None = None,
    identify: Callable[[Retriever], Mapping[str, Any]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted; a second signal ends the process at once.

    Args:
        identify: see `create_app`.

    Raises:
        RetrievalError: when the address cannot be bound.
        Exception: whatever `load` raises.
    """
    options = options or ServerOptions()
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def load_for_good() -> Retriever:
        retriever = load()
        # What was loaded stays: without this, every full collection would walk through all of it.
        gc.collect()
        gc.freeze()
        return retriever

    app = create_app(load_for_good, options, stop, identify)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, lifespan="on"
    )
    server = _Server(config)
    with _bind(options) as listener:
        host, port = listener.getsockname()[:2]
        logger.info("listening at http://%s:%d, loading", f"[{host}]" if ":" in host else host, port)
        if not options.is_loopback:
            logger.warning(
                "host=%s is reachable from other machines, and whoever reaches port %d may search without a password; "
                "keep it inside a trusted network",
                options.host,
                port,
            )
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


class _Service:
    """The state of one application."""

    def __init__(
        self,
        load: Callable[[], Retriever],
        options: ServerOptions,
        on_load_failure: Callable[[BaseException], None],
        identify: Callable[[Retriever], Mapping[str, Any]] | None,
    ) -> None:
        self._load = load
        self._identify = identify
        self._identity: dict[str, Any] = {}
        self._options = options
        self._on_load_failure = on_load_failure
        self._metrics = ServerMetrics()
        self._retriever: Retriever | None = None
        self._runner: Runner | None = None
        self._reads: Threads | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        # Daemon: a stop does not wait for an index that is still being loaded.
        threading.Thread(target=self._load_in_thread, args=(asyncio.get_running_loop(),), daemon=True).start()
        yield
        if self._runner is not None:
            await self._runner.close()
            await self._reads.close()

    def _load_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        started = perf_counter()
        try:
            retriever = as_retriever(self._load())
            retriever.warm_up()  # not at a client's cost
            if self._identify is not None:
                self._identity = dict(self._identify(retriever))
        except BaseException as error:
            then, argument = self._on_load_failure, error
        else:
            logger.info("ready after %.1f s: %s", perf_counter() - started, retriever.description)
            then, argument = self._start, retriever
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server stopped meanwhile
            loop.call_soon_threadsafe(then, argument)

    def _start(self, retriever: Retriever) -> None:
        options = self._options
        if options.micro_batching and retriever.stages is not None:
            self._runner = MicroBatcher(
                retriever.stages,
                max_batch=options.max_batch,
                max_waiting=options.max_waiting,
                wait=options.batch_wait_ms / 1000,
                cache_size=options.cache_size,
                observer=self._metrics,
            )
        else:
            self._runner = DirectRunner(retriever, max_waiting=options.max_waiting, observer=self._metrics)
        self._reads = Threads(retriever.description, options.max_waiting)
        self._retriever = retriever

    async def health(self) -> Response:
        if self._retriever is None:
            return JSONResponse({"status": "loading"}, 503, {"Retry-After": str(LOADING_RETRY_SECONDS)})
        said = {
            "status": "ready",
            "retriever": self._retriever.description,
            "passages": self._retriever.passage_count,
        }
        return JSONResponse({**said, "identity": self._identity} if self._identity else said)

    async def show_metrics(self) -> Response:
        body, content_type = self._metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    async def retrieve(self, request: Request) -> Response:
        return await self._reply(request, self._search)

    async def read(self, request: Request) -> Response:
        return await self._reply(request, self._read)

    async def _reply(self, request: Request, answer: Callable[[Request, float], Awaitable[Response]]) -> Response:
        started = perf_counter()
        self._metrics.in_flight.inc()
        try:
            if self._runner is None:
                raise _Refused(503, "the index is still being loaded; ask /health", LOADING_RETRY_SECONDS)
            response = await answer(request, started)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except _Refused as refused:
            response = _problem(refused.status, str(refused), refused.retry_after)
        except Overloaded as error:
            response = _problem(503, str(error), error.retry_after)
        except CannotRead as error:
            response = _problem(501, str(error))
        except RetrievalError as error:
            logger.warning("a request failed: %s", error)
            response = _problem(500, str(error))
        finally:
            self._metrics.in_flight.dec()
        self._metrics.request(response.status_code)
        return response

    async def _search(self, request: Request, started: float) -> Response:
        asked = _parse(
            RetrieveRequest,
            '{"queries": ["…"], "topk": 3, "return_scores": true}',
            await _read_body(request, self._options.max_body_bytes),
        )
        top_k = self._options.default_top_k if asked.topk is None else asked.topk
        # An engine may give fewer passages than the options allow, and its refusal would look like passing trouble.
        most = min(self._options.max_top_k, self._retriever.max_top_k or self._options.max_top_k)
        _check_limits(asked.queries, "query", "queries", self._options)
        if not 1 <= top_k <= most:
            raise _Refused(422, f"topk is {top_k}, and it must be between 1 and the limit of {most}")
        if not asked.queries:
            return _NOTHING
        served = await self._wait(request, self._runner.submit(asked.queries, top_k, asked.return_scores))
        if served is not None:
            served.timings.finish(perf_counter() - started)
            self._metrics.answered(len(asked.queries), served.timings)
        return _response(served)

    async def _read(self, request: Request, started: float) -> Response:
        body = await _read_body(request, self._options.max_body_bytes)
        keys = _parse(ReadRequest, '{"keys": ["…"]}', body).keys
        _check_limits(keys, "key", "keys", self._options)
        if not keys:
            return _NOTHING
        served = await self._wait(
            request, self._reads.submit(len(keys), partial(read_documents, self._retriever, keys))
        )
        if served is not None:
            served.timings.finish(perf_counter() - started)
        return _response(served)

    async def _wait(self, request: Request, future: asyncio.Future[Served]) -> Served | None:
        """The answer, or `None` when the client went away: nobody should search for it then."""
        while True:
            done, _ = await asyncio.wait((future,), timeout=CLIENT_CHECK_SECONDS)
            if done:
                return future.result()
            if await request.is_disconnected():
                future.cancel()
                return None


class _Server(uvicorn.Server):
    """Differs from uvicorn's in what signals do: the first one stops gracefully with exit status 0, the next kills."""

    _signalled = False

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = self.should_exit = True
        logger.info("%s: finishing what was accepted; a second signal ends at once", signal.Signals(sig).name)


def _bind(options: ServerOptions) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RetrievalError(
            f"host={options.host!r} is no address of this machine ({error}); use 127.0.0.1"
        ) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RetrievalError(
            f"cannot listen at {options.host}:{options.port} ({error}); stop what listens there, or take another port "
            "(0 for a free one) or host"
        ) from error
    return listener


def _terminate(error: BaseException) -> None:
    logger.critical("the index could not be loaded, the server ends", exc_info=error)
    os.kill(os.getpid(), signal.SIGTERM)


async def _read_body(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(f"is {int(announced)} bytes long", limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(f"is longer than {limit} bytes", limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(said: str, limit: int) -> _Refused:
    return _Refused(413, f"the body {said}, and the limit is {limit} bytes; send fewer queries a request")


def _parse(model: type[BaseModel], example: str, body: bytes) -> Any:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("json_invalid", "missing") else f", found {shorten(first['input'])}"
        raise _Refused(422, f"{f'{place}: ' if place else ''}{first['msg']}{found}; a request is {example}") from None


def _check_limits(texts: list[str], one: str, several: str, options: ServerOptions) -> None:
    if len(texts) > options.max_queries:
        raise _Refused(
            422, f"{len(texts)} {several}, and the limit is {options.max_queries} a request; send several requests"
        )
    for position, text in enumerate(texts):
        if len(text) > options.max_query_characters:
            raise _Refused(
                422,
                f"{one} {position} of {len(texts)} has {len(text)} characters, and the limit is "
                f"{options.max_query_characters}; shorten it",
            )


def _response(served: Served | None) -> Response:
    if served is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(
        served.body, media_type="application/json", headers={"Server-Timing": _server_timing(served.timings)}
    )


def _problem(status: int, detail: str, retry_after: int | None = None) -> Response:
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"detail": detail}, status, headers)


def _server_timing(timings: Timings) -> str:
    return (
        f"queue;dur={timings.queue * 1e3:.3f}, encode;dur={timings.encode * 1e3:.3f}, "
        f"search;dur={timings.search * 1e3:.3f}, fetch;dur={timings.fetch * 1e3:.3f}, "
        f"total;dur={timings.total * 1e3:.3f}"
    )
