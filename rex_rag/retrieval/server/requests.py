"""What a server takes of a request: within bounds of size, time and memory, checked, or refused with the reason."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rex_rag.retrieval.server.options import ServerOptions
from rex_rag.support.wording import shorten

# Of all queries of a request: with passages of 100 words an answer of 45 MB.
MAX_PASSAGES = 65_536
# Bodies that have not come whole may take so many times the largest one, all together.
BODIES_AT_ONCE = 4
BODY_SECONDS = 30.0
_THIS_MACHINE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)


class Refused(Exception):
    """A request is not answered; `retry_after`: seconds until another attempt makes sense."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.retry_after = retry_after


def problem(status: int, detail: str, retry_after: int | None = None) -> Response:
    """The answer that says why there is none."""
    return JSONResponse({"detail": detail}, status, None if retry_after is None else {"Retry-After": str(retry_after)})


class Guard:
    """Keeps pages in a browser from making a server search, or from reading what it finds.

    A page may send a POST anywhere, but not as application/json unless the server agrees; and it may have its own name
    point to this machine, but not change the Host that the browser sends. So a server on loopback answers to the names
    of this machine alone.
    """

    def __init__(self, app: Any, options: ServerOptions) -> None:
        self._app = app
        self._host = options.host.lower() if options.is_loopback else None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Mapping[str, Any]) -> Response | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if self._host is not None and not (len(hosts) == 1 and self._is_ours(hosts[0])):
            return problem(
                421,
                f"this server listens on loopback and answers to the Host localhost, 127.0.0.1 or [::1] alone, not to "
                f"{shorten(', '.join(hosts))}; use such an address, or serve with another --host",
            )
        kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        if scope["method"] == "POST" and kind.partition(b";")[0].strip().lower() != b"application/json":
            return problem(415, "the body must be JSON; send Content-Type: application/json")
        return None

    def _is_ours(self, host: str) -> bool:
        return bool(_THIS_MACHINE.fullmatch(host)) or host.lower().rpartition(":")[0] == self._host


class Bodies:
    """Reads the bodies of requests, bounded one by one and all together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            Refused: for one that is too large, comes too slowly, or too many of which come at once.
        """
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            raise _too_large(f"is {int(announced)} bytes long", self._limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    self._held += len(chunk)
                    if size > self._limit:
                        raise _too_large(f"is longer than {self._limit} bytes", self._limit)
                    if self._held > BODIES_AT_ONCE * self._limit:
                        raise Refused(503, "too many bodies are on their way at once; send it again", 1)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, f"the body was not complete after {BODY_SECONDS:g} s; send it again") from None
        finally:
            self._held -= size
        return b"".join(chunks)


def _too_large(said: str, limit: int) -> Refused:
    return Refused(413, f"the body {said}, and the limit is {limit} bytes; send fewer queries a request")


def parse(model: type[BaseModel], example: str, body: bytes) -> Any:
    """A body as what it should hold, or `Refused`."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("json_invalid", "missing") else f", found {shorten(first['input'])}"
        raise Refused(422, f"{f'{place}: ' if place else ''}{first['msg']}{found}; a request is {example}") from None


def check_limits(texts: list[str], one: str, several: str, options: ServerOptions) -> None:
    """Raise `Refused` for more or longer texts than a request may hold."""
    if len(texts) > options.max_queries:
        raise Refused(
            422, f"{len(texts)} {several}, and the limit is {options.max_queries} a request; send several requests"
        )
    for position, text in enumerate(texts):
        if len(text) > options.max_query_characters:
            raise Refused(
                422,
                f"{one} {position} of {len(texts)} has {len(text)} characters, and the limit is "
                f"{options.max_query_characters}; shorten it",
            )
