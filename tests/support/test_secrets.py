"""Secrets in what others say are not shown, however they are spelled there."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote

import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.qdrant_calls import QdrantCalls, connect_qdrant
from rex_rag.retrieval.online.retriever import OnlineRetriever
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.support.secrets import hide
from tests.odd_servers import answering

KEY = 'sk-"A/b\\c&<e%'


@pytest.mark.parametrize(
    "spelled",
    [
        KEY,
        json.dumps(KEY)[1:-1],
        json.dumps(json.dumps(KEY))[3:-3],
        "".join(f"\\u{ord(character):04X}" for character in KEY),
        json.dumps(KEY)[1:-1].replace("/", "\\/").replace("&", "\\u0026"),
        quote(KEY, safe=""),
        quote(quote(KEY, safe=""), safe=""),
        html.escape(KEY),
        "".join(f"&#x{ord(character):x};" for character in KEY),
        repr(json.dumps(KEY))[2:-2],
    ],
)
def test_every_spelling_is_hidden(spelled):
    assert hide(f"before {spelled} after", "", KEY) == "before *** after"


def test_other_text_stays_and_secrets_that_are_empty_hide_nothing():
    assert hide("sk-a SK-A", "sk-A") == "sk-a SK-A"
    assert hide("abc", "") == "abc"
    assert hide("\\" * 100_000 + "sk-" * 100_000, KEY) == "\\" * 100_000 + "sk-" * 100_000


BASIC = base64.b64encode(f"user:{KEY}".encode()).decode()


def ask_engine(url, folder):
    OnlineRetriever("serpapi", folder, 9, max_attempts=1, address=url).search(["a"], 1)


def ask_retriever(url, folder):
    RemoteRetriever(url.replace("//", f"//user:{quote(KEY, safe='')}@"), max_attempts=1).search(["a"], 1)


def ask_qdrant(url, folder):
    client = connect_qdrant(url)
    QdrantCalls(client, "c", 1, 0.0)(client.get_collection, "c")


@pytest.mark.parametrize("status", [403, 503])
@pytest.mark.parametrize(("ask", "secret"), [(ask_engine, KEY), (ask_retriever, BASIC), (ask_qdrant, KEY)])
def test_a_server_that_echoes_its_key_shows_it_to_nobody(ask, secret, status, tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    monkeypatch.setenv("QDRANT_API_KEY", KEY)
    body = json.dumps({"error": f"no: {secret}"}).encode()
    head = b"HTTP/1.1 %d Odd\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    with answering(lambda connection: connection.sendall(head + body)) as url, pytest.raises(RetrievalError) as raised:
        ask(url, tmp_path)
    said = f"{raised.value} {caplog.text}"
    assert str(status) in said
    for spelling in (secret, secret[5:], json.dumps(secret)[1:-1], repr(json.dumps(secret))[2:-2]):
        assert spelling not in said
