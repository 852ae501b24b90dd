"""Applications under real uvicorn on loopback, in a thread of the test."""

from __future__ import annotations

import socket
import threading
import time

import httpx


class AppServer:
    """Any ASGI application on a port, by default a free one, up when made."""

    def __init__(self, app, port=0):
        import uvicorn

        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Its access log would hold what tests say that the library does not log.
        config = uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self):
        self._server.should_exit = True
        self._thread.join(timeout=10)


def search_r1_app(retriever, asked=None):
    """Search-R1's own server: /retrieve over `retriever` and nothing else, no health page; `asked` takes requests."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(request: dict) -> dict:
        if asked is not None:
            asked.append(request)
        rankings = retriever.search(request["queries"], request["topk"])
        return {
            "result": [
                [
                    {
                        "document": {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'},
                        "score": passage.score,
                    }
                    for passage in ranking
                ]
                for ranking in rankings
            ]
        }

    return app


class Running(AppServer):
    """A retrieval server made from `load` and `options`, or any other `app` that is asked like one."""

    def __init__(self, load=None, options=None, app=None, port=0, **arguments):
        from rex_rag.retrieval.server.app import create_app

        super().__init__(app or create_app(load, options, **arguments), port)
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

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
        super().stop()


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
