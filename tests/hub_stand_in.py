"""A stand-in for the Hub's API, as far as huggingface_hub uses it to push a model; it can fail in several ways."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_TOKEN"
_LARGE = 1000  # bytes from which a file goes to LFS


class Hub:
    """What was pushed: `commits` (summary, paths), `stored` (LFS object -> content), `tokens` that were shown.

    `fails` is a list of ways in which the next commits go wrong, each once: an HTTP status, "drop" or "hang".
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.commits: list[tuple[str, list[str]]] = []
        self.stored: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.fails: list[int | str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            return 200, {"url": f"{self.address}/me/model", "name": "me/model", "id": "me/model"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [(one["path"], "lfs" if one["size"] > _LARGE else "regular") for one in files]
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [{"upload": {"href": f"{self.address}/store/{one['oid']}"}} for one in objects]
            found = [
                {"oid": one["oid"], "size": one["size"], "actions": link}
                for one, link in zip(objects, links, strict=True)
            ]
            return 200, {"transfer": "basic", "objects": found}
        if path.startswith("/store/"):
            self.stored[path.removeprefix("/store/")] = body
            return 200, {}
        if "/commit/" in path:
            rows = [json.loads(line) for line in body.splitlines() if line.strip()]
            paths = [row["value"]["path"] for row in rows if row["key"] != "header"]
            self.commits.append((rows[0]["value"]["summary"], paths))
            return 200, {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1", "success": True}
        return 404, {"error": path}


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do(self) -> None:
            body = self.body()
            shown = self.headers.get("authorization", "").removeprefix("Bearer ")
            if shown:
                hub.tokens.add(shown)
            if self.path.startswith("/api/") and shown != TOKEN:
                return self.reply(401, {"error": "Invalid credentials"})
            if "/commit/" in self.path and hub.fails:
                way = hub.fails.pop(0)
                if way == "drop":
                    self.close_connection = True
                    return self.connection.close()
                if way == "hang":
                    time.sleep(3)
                    return self.connection.close()
                return self.reply(way, {"error": "not today"})
            return self.reply(*hub.answer(self.path, body))

        do_GET = do_POST = do_PUT = do

        def body(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            read = b""
            while size := int(self.rfile.readline().strip(), 16):
                read += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return read

        def reply(self, status: int, answer: dict) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
