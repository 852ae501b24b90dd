"""What the tests of the client share: one server that behaves as its paths say, and clients that get closed."""

import pytest

from rex_rag.retrieval.remote import servers
from rex_rag.retrieval.remote.client import RemoteRetriever
from tests.retrieval.servers import BehavingServer


@pytest.fixture(scope="package")
def behaving_server():
    pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
    pytest.importorskip("uvicorn", reason="the HTTP tests need uvicorn: install the dev extra")
    server = BehavingServer()
    yield server
    server.stop()


@pytest.fixture
def server(behaving_server):
    behaving_server.reset()
    return behaving_server


@pytest.fixture
def remote(server, monkeypatch):
    """Makes clients of the paths of `server`, or of other URLs, with short pauses and frequent looks."""
    monkeypatch.setattr(servers, "PROBE_SECONDS", 0.1)
    opened = []

    def make(*names, **options):
        urls = [name if name.startswith("http") else f"{server.url}/{name}" for name in names]
        opened.append(RemoteRetriever(urls, **{"backoff": 0.01, **options}))
        return opened[-1]

    yield make
    for retriever in opened:
        retriever.close()
