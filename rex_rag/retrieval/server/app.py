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
from rex_rag.retrieval.remote.wire import HEALTH_PATH, INDEX_HEADER, READ_PATH, SEARCH_PATH, index_digest
from rex_rag.retrieval.server.batching import MicroBatcher
from rex_rag.retrieval.server.metrics import ServerMetrics
from rex_rag.retrieval.server.options import ServerOptions
from rex_rag.retrieval.server.runner import DirectRunner, Overloaded, Runner, Threads
from rex_rag.retrieval.server.stages import Served, Timings, read_documents

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.requests import ClientDisconnect

    from rex_rag.retrieval.server.protocol import BoundedProtocol
    from rex_rag.retrieval.server.requests import MAX_PASSAGES, Bodies, Guard, Refused, check_limits, parse, problem
    from rex_rag.retrieval.server.schemas import (
        Health,
        Problem,
        ReadRequest,
        ReadResponse,
        RetrieveRequest,
        RetrieveResponse,
    )
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
GRACE_SECONDS = 10
CLIENT_CLOSED_REQUEST = 499  # never sent: it stands in the metrics for clients that went away
_NOTHING = Response(b'{"result":[]}', media_type="application/json")


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
    options = options or ServerOptions()
    service = _Service(load, options, on_load_failure or _terminate, identify)
    app = FastAPI(
        title="rex-rag retrieval server",
        description="Passages for queries in the Search-R1 wire format, and documents by title.",
        lifespan=service.lifespan,
        # Their scripts would come from elsewhere; /openapi.json says the same.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, options=options)
    problems: dict[int | str, dict[str, Any]] = {
        408: {"model": Problem, "description": "The body did not come in time."},
        413: {"model": Problem, "description": "The body is larger than the limit."},
        415: {"model": Problem, "description": "The body is not announced as application/json."},
        421: {"model": Problem, "description": "Another Host than this machine, on loopback."},
        422: {"model": Problem, "description": "Malformed, or more than a limit allows."},
        500: {"model": Problem, "description": "A query could not be answered."},
        503: {"model": Problem, "description": "Loading, or too much waits: come back after Retry-After seconds."},
    }
    unread: dict[int | str, dict[str, Any]] = {
        501: {"model": Problem, "description": "The retriever behind this server only searches."}
    }
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

    What is not finished `GRACE_SECONDS` later, such as half a request or an answer that nobody reads, is dropped.

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
        app,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="on",
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
        self._index: str | None = None
        self._options = options
        self._bodies = Bodies(options.max_body_bytes)
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
        if self._runner is not None and self._reads is not None:
            await self._runner.close()
            await self._reads.close()

    def _load_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        started = perf_counter()
        try:
            retriever = as_retriever(self._load())
            retriever.warm_up()  # not at a client's cost
            if self._identify is not None:
                self._identity = dict(self._identify(retriever))
                self._index = index_digest(self._identity)
        except BaseException as error:
            then: Callable[[], None] = partial(self._on_load_failure, error)
        else:
            logger.info("ready after %.1f s: %s", perf_counter() - started, retriever.description)
            then = partial(self._start, retriever)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server stopped meanwhile
            loop.call_soon_threadsafe(then)

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
        held = self._retriever.stages.held if self._retriever.stages is not None else None
        try:
            if held is not None:
                held.check()
        except RetrievalError as error:
            return JSONResponse({"status": "changed", "detail": str(error)}, 503)
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
                raise Refused(503, "the index is still being loaded; ask /health", LOADING_RETRY_SECONDS)
            response = await answer(request, started)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Refused as refused:
            response = problem(refused.status, str(refused), refused.retry_after)
        except Overloaded as error:
            response = problem(503, str(error), error.retry_after)
        except CannotRead as error:
            response = problem(501, str(error))
        except RetrievalError as error:
            logger.warning("a request failed: %s", error)
            response = problem(500, str(error))
        finally:
            self._metrics.in_flight.dec()
        self._metrics.request(response.status_code)
        return response

    async def _search(self, request: Request, started: float) -> Response:
        asked = parse(
            RetrieveRequest,
            '{"queries": ["…"], "topk": 3, "return_scores": true}',
            await self._bodies.read(request),
        )
        top_k = self._options.default_top_k if asked.topk is None else asked.topk
        assert self._retriever is not None and self._runner is not None  # until then all is refused
        # An engine may give fewer passages than the options allow, and its refusal would look like passing trouble.
        most = min(self._options.max_top_k, self._retriever.max_top_k or self._options.max_top_k)
        check_limits(asked.queries, "query", "queries", self._options)
        if not 1 <= top_k <= most:
            raise Refused(422, f"topk is {top_k}, and it must be between 1 and the limit of {most}")
        if len(asked.queries) * top_k > MAX_PASSAGES:
            raise Refused(
                422,
                f"{len(asked.queries)} queries of {top_k} passages, and the limit is {MAX_PASSAGES} passages a "
                "request; send several requests",
            )
        if not asked.queries:
            return _NOTHING
        served = await self._wait(request, self._runner.submit(asked.queries, top_k, asked.return_scores))
        if served is not None:
            served.timings.finish(perf_counter() - started)
            self._metrics.answered(len(asked.queries), served.timings)
        return self._response(served)

    async def _read(self, request: Request, started: float) -> Response:
        body = await self._bodies.read(request)
        keys = parse(ReadRequest, '{"keys": ["…"]}', body).keys
        check_limits(keys, "key", "keys", self._options)
        if not keys:
            return _NOTHING
        assert self._retriever is not None and self._reads is not None  # until then all is refused
        served = await self._wait(
            request, self._reads.submit(len(keys), partial(read_documents, self._retriever, keys))
        )
        if served is not None:
            served.timings.finish(perf_counter() - started)
        return self._response(served)

    def _response(self, served: Served | None) -> Response:
        if served is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        headers = {"Server-Timing": _server_timing(served.timings)}
        if self._index is not None:
            headers[INDEX_HEADER] = self._index
        return Response(served.body, media_type="application/json", headers=headers)

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


def _server_timing(timings: Timings) -> str:
    return (
        f"queue;dur={timings.queue * 1e3:.3f}, encode;dur={timings.encode * 1e3:.3f}, "
        f"search;dur={timings.search * 1e3:.3f}, fetch;dur={timings.fetch * 1e3:.3f}, "
        f"total;dur={timings.total * 1e3:.3f}"
    )
