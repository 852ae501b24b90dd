"""A stand-in for the Hub's API, as far as huggingface_hub uses it to push a model and to fetch the files of data sets;
it can fail in several ways."""

from __future__ import annotations

import hashlib
import json
import re
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

    What can be fetched: `datasets`, revision -> repository -> path -> content; the last revision is `main`. `served`
    lists (path, first byte) of every download, and `breaks` the bytes after which the next ones end, each once.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.commits: list[tuple[str, list[str]]] = []
        self.stored: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.fails: list[int | str] = []
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.served: list[tuple[str, int]] = []
        self.breaks: list[int] = []

    def commit(self, revision: str) -> str:
        """What a revision in an address means: the commit itself, or the newest."""
        return revision if revision in self.datasets else [*self.datasets][-1]

    def listing(self, path: str) -> tuple[int, dict]:
        repository, revision = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^?]+))?.*", path).groups()
        commit = self.commit(revision or "main")
        files = self.datasets[commit].get(repository.partition("?")[0])
        if files is None:
            return 404, {"error": "Repository not found"}
        siblings = []
        for name, content in files.items():
            one = {"rfilename": name, "size": len(content), "blobId": git_digest(content)}
            if len(content) > _LARGE:
                sha = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 100}
            siblings.append(one)
        return 200, {"id": repository.partition("?")[0], "sha": commit, "siblings": siblings}

    def file(self, path: str) -> tuple[str, bytes] | None:
        """The commit and content behind a download's address."""
        found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        commit = self.commit(found[2])
        content = self.datasets[commit].get(found[1], {}).get(found[3])
        return None if content is None else (commit, content)

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


def git_digest(content: bytes) -> str:
    """What Git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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
            if self.path.startswith("/datasets/"):
                return self.send_file()
            if self.path.startswith("/api/datasets/"):
                return self.reply(*hub.listing(self.path))
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

        do_GET = do_HEAD = do_POST = do_PUT = do

        def send_file(self) -> None:
            found = hub.file(self.path)
            if found is None:
                return self.reply(404, {"error": "Entry not found"})
            commit, content = found
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            first = int(span[1]) if span else 0
            last = min(int(span[2] or len(content) - 1), len(content) - 1) if span else len(content) - 1
            part = content[first : last + 1]
            self.send_response(206 if span else 200)
            self.send_header("etag", f'"{git_digest(content)}"')
            self.send_header("x-repo-commit", commit)
            self.send_header("content-length", str(len(part)))
            if span:
                self.send_header("content-range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            hub.served.append((self.path.partition("/resolve/")[2].partition("/")[2], first))
            end = hub.breaks.pop(0) if hub.breaks else len(part)
            self.wfile.write(part[:end])
            if end < len(part):
                self.close_connection = True
                self.connection.close()

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
