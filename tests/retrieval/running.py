"""Applications under real uvicorn on loopback, in a thread of the test."""

from __future__ import annotations

import socket
import threading
import time

import httpx
import uvicorn

from rex_rag.retrieval.server.app import create_app


class Running:
    """A retrieval server made from `load` and `options`, or any other `app`."""

    def __init__(self, load=None, options=None, app=None, **arguments):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = app or create_app(load, options, **arguments)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        until(lambda: self._server.started)

    def ready(self):
        until(lambda: self.http.get("/health").status_code == 200)
        return self

    def search(self, queries, top_k=3, scores=True):
        payload = {"queries": queries, "topk": top_k, "return_scores": scores}
        return self.http.post("/retrieve", json=payload)

    def metrics(self):
        lines = self.http.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def stop(self):
        self.http.close()
        self._server.should_exit = True
        self._thread.join(timeout=10)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
