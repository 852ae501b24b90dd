"""An evaluation whose retrieval server is exchanged in the middle: it ends, and goes on with the right one alone."""

from __future__ import annotations

import json
import threading
import time

import pytest

from rex_rag.cli import main
from rex_rag.data.corpus import read_corpus, write_corpus
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.load import RetrieverArguments, retriever_identity
from rex_rag.types import Passage
from tests.evaluation.tiny_run import make_tiny_world
from tests.retrieval.running import Running, until

pytest.importorskip("fastapi", reason="the server needs fastapi: install the dev extra")


class Slow(BM25Retriever):
    """Leaves time for an accident."""

    def rank(self, encoded, top_k):
        time.sleep(0.1)
        return super().rank(encoded, top_k)


def serve(corpus, port=0):
    arguments = RetrieverArguments(corpus=[str(corpus)])
    return Running(
        lambda: Slow.from_corpus([corpus]), port=port, identify=lambda loaded: retriever_identity(arguments, loaded)
    ).ready()


def test_an_evaluation_ends_where_another_index_answers_and_goes_on_with_its_own(tmp_path, capsys):
    world = make_tiny_world(tmp_path)
    other = tmp_path / "other.jsonl"
    write_corpus([Passage(one.id, one.title, "nothing of use") for one in read_corpus([str(world.corpus)])], other)
    server = serve(world.corpus)
    port = int(server.url.rsplit(":", 1)[1])

    def words(output):
        return ["evaluate", *world.words(output, corpus="none", retriever=server.url, batch_size=4, temperature=1.0)]

    assert main(words(tmp_path / "whole")) == 0
    running = [server]
    chunks = tmp_path / "run" / "world" / "chunks"

    def exchange():
        until(lambda: list(chunks.glob("*.jsonl")))
        running.pop().stop()
        running.append(serve(other, port))

    thread = threading.Thread(target=exchange)
    thread.start()
    assert main(words(tmp_path / "run")) == 2
    thread.join()
    assert "searches something else" in capsys.readouterr().err
    done = len(list(chunks.glob("*.jsonl")))
    assert 0 < done < 10
    # Resumed over the other index it is another run.
    assert main(words(tmp_path / "run")) == 2
    assert "retriever (fingerprint)" in capsys.readouterr().err
    running.pop().stop()
    running.append(serve(world.corpus, port))
    assert main(words(tmp_path / "run")) == 0
    running.pop().stop()
    one, whole = ((tmp_path / name / "world" / "predictions.jsonl").read_bytes() for name in ("run", "whole"))
    assert one == whole and json.loads((tmp_path / "run" / "run.json").read_text())["retriever"]["fingerprint"]
