"""uvicorn's HTTP protocol with bounds on what a client can have it keep, and on how long.

With httptools, uvicorn bounds neither a head without an end, nor a connection that never asks, nor one that never
reads its answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Ours send less than 1 kB. It also bounds what frames the parts of a body of unannounced length, eight times over it.
MAX_HEAD_BYTES = 16 * 1024
MAX_CONNECTIONS = 4096
HEAD_SECONDS = 30.0
ANSWER_SECONDS = 60.0


class BoundedProtocol(HttpToolsProtocol):
    """Drops a connection that sends an endless head, takes long over it, or does not read its answer."""

    _received = _body = 0
    _deadline: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # uvicorn narrows it as well
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._deadline = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._deadline, self._reading)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self._received - self._body > MAX_HEAD_BYTES + 8 * self._body:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._stop(self._deadline)
        self._deadline = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._received = self._body = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._reading = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop(self._reading)
        super().resume_writing()

    @staticmethod
    def _stop(*timers: Any) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()
