"""What decides what a retriever finds, told alike wherever it runs: in this process, from an index, by a server."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError, Retriever
from rex_rag.retrieval.bm25.text import BM25Options
from rex_rag.retrieval.manifest import Manifest
from rex_rag.retrieval.passages import passage_json
from rex_rag.support.tables import one_line
from rex_rag.types import Passage

if TYPE_CHECKING:
    from rex_rag.retrieval.load import RetrieverArguments

logger = logging.getLogger(__name__)

# What servers without an identity are asked, to be known by their answers; another list would be another identity.
FIXED_QUERIES = (
    "Who wrote Hamlet?",
    "capital city of Australia",
    "When did the Second World War end?",
    "chemical element with the highest melting point",
    "the longest river in South America",
    "film directed by a woman about a chess player",
    "Who is the mother of the founder of the company?",
    "population of the town where he was born",
)
FIXED_TOP_K = 3
# An identity that a server tells is small and flat.
_MOST_ENTRIES = 20
_MOST_CHARACTERS = 200
# What cards say of a retriever themselves.
_NOT_TOLD = ("kind", "description", "served")


def of_bm25(arguments: RetrieverArguments, loaded: Retriever | None, **parameters: Any) -> dict[str, Any]:
    """That of the index which `rex-rag index --kind bm25` would make of the corpus, with further parameters."""
    stages = None if loaded is None else loaded.stages
    passages = read_corpus(arguments.corpus) if stages is None else stages.passages
    return _in_process(passages, BM25Options().index_parameters | parameters)


def of_index(arguments: RetrieverArguments, loaded: Retriever | None) -> dict[str, Any]:
    """Of one that is loaded, what was opened: its files are hashed, since its name goes on a card."""
    held = loaded.stages.held if loaded is not None and loaded.stages is not None else None
    if held is not None:
        held.verify()
    manifest = Manifest.read(arguments.retriever[0]) if held is None else held.manifest
    return {"fingerprint": manifest.fingerprint, "corpus_sha256": manifest.corpus_sha256}


def of_servers(arguments: RetrieverArguments, loaded: Retriever | None) -> dict[str, Any]:
    """What servers tell; where they tell no fingerprint, and may be asked, by what they find.

    A loaded client is held to it: what is told here is what answers, to its end.
    """
    told, index = _served(arguments.retriever)
    if loaded is not None and index is not None:
        loaded.hold_to(index)
    if loaded is not None and "fingerprint" not in told:
        told |= _answers(arguments)
    return told


def of_settings(arguments: RetrieverArguments) -> dict[str, Any]:
    """What is done here with an index or with what a retriever finds."""
    settings = {
        "nprobe": arguments.retriever_nprobe,
        "ef_search": arguments.retriever_ef_search,
        "engine": None if arguments.retriever_engine == "auto" else arguments.retriever_engine,
    }
    if arguments.rerank_model is not None:
        settings["rerank_model"] = _checkpoint(arguments.rerank_model)
        settings["rerank_candidates"] = arguments.rerank_candidates
    return {name: value for name, value in settings.items() if value is not None}


def _in_process(passages: Iterable[Passage], index: dict[str, Any]) -> dict[str, str]:
    digest, count = hashlib.sha256(), 0
    for passage in passages:
        digest.update(passage_json(passage) + b"\n")
        count += 1
    manifest = Manifest("bm25", count, [], digest.hexdigest(), None, index, {}, {}, {})
    return {"fingerprint": manifest.fingerprint, "corpus_sha256": manifest.corpus_sha256}


def _checkpoint(name: str) -> str:
    """A model by name and revision; of a folder only the last part of its path."""
    from rex_rag.retrieval.dense.checkpoints import LOCAL, find_checkpoint, public_name

    revision = find_checkpoint(name).revision
    return f"{public_name(name, revision)} ({revision.removeprefix(LOCAL)[:12]})"


def _served(urls: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """What servers say of themselves, and its digest; those that say nothing are taken at the word of the others."""
    from rex_rag.retrieval.remote.endpoint import Endpoint
    from rex_rag.retrieval.remote.wire import index_of

    index = None
    said: dict[str, dict[str, Any]] = {}
    for url in urls:
        endpoint = Endpoint(url, timeout=60.0)
        try:
            health = endpoint.health()
        finally:
            endpoint.close()
        if found := read_identity(health):
            said[endpoint.url] = found
            index = index or index_of(health)
    if len({tuple(sorted(_what_counts(found).items())) for found in said.values()}) > 1:
        listed = "; ".join(f"{url}: {found['served']}, {_what_counts(found)}" for url, found in said.items())
        raise RetrievalError(
            f"the retrieval servers search different things, so that figures would depend on which one answers: "
            f"{listed}. Name servers of one index"
        )
    return next(iter(said.values()), {}), index


def _answers(arguments: RetrieverArguments) -> dict[str, str]:
    """The hash of what servers find for the fixed queries, each asked once; empty where none answers all of them."""
    from rex_rag.retrieval.remote.client import RemoteRetriever

    # One of several that is away must not hold up the others; the only one is worth waiting for.
    attempts = arguments.retriever_max_attempts if len(arguments.retriever) == 1 else 1
    found: dict[str, str] = {}
    for url in arguments.retriever:
        client = RemoteRetriever([url], timeout=arguments.retriever_timeout, max_attempts=attempts)
        try:
            rankings = client.search(FIXED_QUERIES, FIXED_TOP_K)
        except RetrievalError as error:
            logger.warning("what this retrieval server searches cannot be known by its answers: %s", error)
            continue
        finally:
            client.close()
        texts = [[[passage.title, passage.text] for passage in ranking] for ranking in rankings]
        found[client.urls[0]] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    if len(set(found.values())) > 1:
        listed = "; ".join(f"{url}: {digest[:12]}" for url, digest in found.items())
        raise RetrievalError(
            "the retrieval servers find different passages for the same queries, so that figures would depend on "
            f"which one answers (hashes of their answers: {listed}). Name servers of one index"
        )
    return {"answers_sha256": next(iter(found.values()))} if found else {}


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
