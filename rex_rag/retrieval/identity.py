"""What decides what a retriever finds, told alike wherever it runs: in this process, from an index, by a server."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError, Retriever
from rex_rag.retrieval.bm25.text import BM25Options
from rex_rag.retrieval.index.manifest import Manifest
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.load import BM25, RetrieverArguments
from rex_rag.retrieval.passages import passage_json
from rex_rag.tables import one_line
from rex_rag.types import Passage

# An identity that a server tells is small and flat.
_MOST_ENTRIES = 20
_MOST_CHARACTERS = 200
# What cards say of a retriever themselves.
_NOT_TOLD = ("kind", "description", "served")


def retriever_identity(arguments: RetrieverArguments, loaded: Retriever | None = None) -> dict[str, Any]:
    """`fingerprint` and `corpus_sha256`, where they can be known, and the settings that change what is found.

    fingerprint: of an index's manifest. BM25 over a corpus in this process has that of the index which `rex-rag index
    --kind bm25` would make of it, and finds the same. A server tells its own; `served` is what it says it searches.

    Args:
        loaded: the retriever that the arguments name, where it is loaded: spares reading its corpus again.

    Raises:
        CorpusError, RetrievalError: for a corpus or index that cannot be read, a re-ranker that is not there, and
            servers that search different things.
    """
    settings = {
        "nprobe": arguments.retriever_nprobe,
        "ef_search": arguments.retriever_ef_search,
        "engine": None if arguments.retriever_engine == "auto" else arguments.retriever_engine,
        "rerank_model": None,
        "rerank_candidates": None,
    }
    if arguments.rerank_model is not None:
        settings["rerank_model"] = _checkpoint(arguments.rerank_model)
        settings["rerank_candidates"] = arguments.rerank_candidates
    known = {name: value for name, value in settings.items() if value is not None}
    if arguments.kind == "remote":
        # What the server does comes first; what is done here with its passages may come on top.
        return {**_served(arguments.retriever), **known}
    if arguments.kind == BM25:
        passages = loaded.passages if isinstance(loaded, IndexedRetriever) else read_corpus(arguments.corpus)
        return {**_in_process(passages), **known}
    if arguments.kind == "index":
        manifest = Manifest.read(arguments.retriever[0])
        return {"fingerprint": manifest.fingerprint, "corpus_sha256": manifest.corpus_sha256, **known}
    return known


def _in_process(passages: Iterable[Passage]) -> dict[str, str]:
    digest, count = hashlib.sha256(), 0
    for passage in passages:
        digest.update(passage_json(passage) + b"\n")
        count += 1
    index = {"type": "bm25", **asdict(BM25Options())}
    manifest = Manifest("bm25", count, [], digest.hexdigest(), None, index, {}, {}, {})
    return {"fingerprint": manifest.fingerprint, "corpus_sha256": manifest.corpus_sha256}


def _checkpoint(name: str) -> str:
    """A model by name and revision; of a folder only the last part of its path."""
    from rex_rag.retrieval.dense.checkpoints import LOCAL, find_checkpoint, public_name

    revision = find_checkpoint(name).revision
    return f"{public_name(name, revision)} ({revision.removeprefix(LOCAL)[:12]})"


def _served(urls: Sequence[str]) -> dict[str, Any]:
    """What servers say of themselves; those that say nothing are taken at the word of the others."""
    from rex_rag.retrieval.remote.endpoint import Endpoint

    said: dict[str, dict[str, Any]] = {}
    for url in urls:
        endpoint = Endpoint(url, timeout=60.0)
        try:
            found = read_identity(endpoint.health())
        finally:
            endpoint.close()
        if found:
            said[endpoint.url] = found
    if len({tuple(sorted(_what_counts(found).items())) for found in said.values()}) > 1:
        listed = "; ".join(f"{url}: {found['served']}, {_what_counts(found)}" for url, found in said.items())
        raise RetrievalError(
            f"the retrieval servers search different things, so that figures would depend on which one answers: "
            f"{listed}. Name servers of one index"
        )
    return next(iter(said.values()), {})


def _what_counts(found: Mapping[str, Any]) -> dict[str, Any]:
    """An index may lie in folders of different names."""
    return {name: value for name, value in found.items() if name != "served" or "fingerprint" not in found}


def read_identity(health: Mapping[str, Any]) -> dict[str, Any]:
    """What a server's answer to /health says that it searches; empty for one that does not say."""
    if not isinstance(health.get("retriever"), str):
        return {}
    told = health.get("identity")
    plain = {
        one_line(str(name)): one_line(value) if isinstance(value, str) else value
        for name, value in (told.items() if isinstance(told, Mapping) and len(told) <= _MOST_ENTRIES else ())
        if name not in _NOT_TOLD and _is_plain(value) and len(str(name)) + len(str(value)) <= _MOST_CHARACTERS
    }
    # Without a fingerprint, their number helps to tell corpora of one name apart.
    count = "" if "fingerprint" in plain else f", {health.get('passages')} passages"
    return {**plain, "served": one_line(f"{health['retriever']}{count}"[: 2 * _MOST_CHARACTERS])}


def _is_plain(value: Any) -> bool:
    """NaN, which JSON has no word for, would differ from itself at every start."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
