"""Retrieval servers for tests, all real and on loopback: one that behaves as its path says, one that can be killed.

Run as a program, `python servers.py PORT NAME`, this file is the second: a process of its own on a port of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

with suppress(ImportError):
    import fastapi
    from fastapi import Request


_BLANK = {"id": "d9", "contents": '"T9"\n'}


def answer(queries, top_k):
    return [
        [
            {"document": {"id": f"d{rank}", "contents": f'"T{rank}"\nabout {query}'}, "score": 1.0 / (1 + rank)}
            for rank in range(top_k)
        ]
        for query in queries
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class BehavingServer:
    """An application whose path names its behaviour: `{url}/{behaviour}/retrieve`; each path passes for a server.

    `delays`, `statuses` and `health` (HTTP status of `{url}/{behaviour}/health`, 404 where not set) may be changed
    while it runs; a behaviour may be followed by `~` and any name, so that two servers can behave alike.
    """

    def __init__(self):
        from tests.retrieval.running import AppServer  # out of reach for this file as a program

        self._fastapi = fastapi
        self.authorization = None
        self.calls, self.payloads = {}, []
        self.delays, self.statuses, self.health, self.headers = {}, {}, {}, {}
        self._lock = threading.Lock()
        app = fastapi.FastAPI()

        @app.post("/{name}/retrieve")
        def retrieve(name: str, payload: dict, request: Request):
            with self._lock:
                self.calls[name] = call = self.calls.get(name, 0) + 1
                self.payloads.append(payload)
                self.authorization = request.headers.get("authorization")
            return self._behave(name, call, payload)

        @app.get("/{name}/health")
        def health(name: str):
            return fastapi.Response("health", status_code=self.health.get(name, 404))

        self._running = AppServer(app)
        self.url = self._running.url

    def stop(self):
        self._running.stop()

    def reset(self):
        for state in (self.calls, self.payloads, self.delays, self.statuses, self.health, self.headers):
            state.clear()

    def _behave(self, name, call, payload):
        behaviour = name.split("~")[0]
        good = answer(payload["queries"], payload["topk"])
        time.sleep(self.delays.get(name, 0))
        status = self.statuses.get(name, 200)
        if behaviour.startswith("status-"):  # status-503-2: the first two calls fail
            _, code, failures = behaviour.split("-")
            status = int(code) if call <= int(failures) else 200
        if behaviour in ("poisoned", "overloaded") and "poison" in payload["queries"]:
            status = 422 if behaviour == "poisoned" else 503
        respond = self._fastapi.Response
        if status != 200:
            return respond("out of order", status_code=status, headers=self.headers.get(name))
        if (behaviour == "hang-once" and call == 1) or behaviour == "hang":
            time.sleep(1.0)
        if behaviour == "drip":
            return self._fastapi.responses.StreamingResponse(_drip(json.dumps({"result": good})))
        if behaviour == "endless":
            return self._fastapi.responses.StreamingResponse(b" " * 1000 for _ in range(1000))
        if behaviour == "announced":
            return self._fastapi.responses.StreamingResponse(
                (b" " * 1000 for _ in range(1000)), headers={"content-length": "1000000"}
            )
        body = json.dumps({"result": good}).encode()
        raw = {
            "malformed": b'{"result": [[{"docu',
            "not-utf8": b'{"result": "\xff"}',
            "infinite": body.replace(b"1.0", b"Infinity"),
        }
        if behaviour in raw:
            return respond(raw[behaviour], media_type="application/json")
        if behaviour == "truncated-once" and call == 1:
            return respond(body[:40], media_type="application/json", headers={"content-length": str(len(body))})
        bare = [[hit["document"] for hit in ranking] for ranking in good]
        odd = {
            "bare": bare,
            "title-text": [[{"document": {"title": "T", "text": "x"}, "score": 2}]],
            "generous": answer(payload["queries"], payload["topk"] + 5),
            "one-blank": [[ranking[0], {"document": _BLANK, "score": 0.9}, *ranking[1:2]] for ranking in good],
            "all-blank": [[{"document": _BLANK, "score": 0.9}, {"document": _BLANK, "score": 0.8}] for _ in good],
            "other-index": [[{"id": "z", "contents": '"Z"\nelse'}] for _ in good],
            "miscount": good[:-1],
            "empty": [[] for _ in good],
            "flat": [{"document": {}} for _ in good],
            "text-documents": [["words"] for _ in good],
            "no-text": [[{"document": {"id": "1", "title": "T"}, "score": 1.0}] for _ in good],
            "odd-score": [[{"document": bare[0][0], "score": "high"}] for _ in good],
        }
        if behaviour == "array":
            return [good]
        return {"results" if behaviour == "no-result" else "result": odd.get(behaviour, good)}


def _drip(text):
    for character in text:
        time.sleep(0.05)
        yield character


class ProcessServer:
    """A server process that can be killed, stopped and started again on the same port."""

    def __init__(self, name):
        self.name, self.port, self.process = name, free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = subprocess.Popen([sys.executable, __file__, str(self.port), self.name], stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == b"ready\n"

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()
            self.process = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    name = ""

    def do_GET(self):
        self._send(200, b"ok")

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(0.005)
        hits = [[{"id": self.name, "contents": f'"T"\nabout {query}'}] for query in payload["queries"]]
        self._send(200, json.dumps({"result": hits}).encode())

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def main(port, name):
    _Handler.name = name
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), _Handler)
    os.write(1, b"ready\n")
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
