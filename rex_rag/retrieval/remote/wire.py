"""The Search-R1 wire format, for both ends of the wire.

Request: POST {url}/retrieve with `{"queries": [str], "topk": int, "return_scores": bool}`. Answer: `{"result": [...]}`
with one ranking a query, a list of `{"document": {...}, "score": float}`, or of the bare documents without scores. A
document holds `contents`, or `title` and `text`, and perhaps an `id`.

Documents, which Search-R1 knows nothing of: POST {url}/read with `{"keys": [str]}`, titles or ids. The answer has the
same form without scores: for each key the passages of one document, in order, and none for a key that is unknown.

What is read is read strictly: an answer becomes one non-empty ranking of usable passages for every query, or a
`WireError`. A passage that cannot be used is left out and told. Scores that are not finite cross in neither direction.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rex_rag.data.corpus import CorpusError, passage_from_row
from rex_rag.retrieval.base import RetrievalError
from rex_rag.support.wording import counted, shorten
from rex_rag.types import Passage

logger = logging.getLogger(__name__)

SEARCH_PATH = "/retrieve"
READ_PATH = "/read"
HEALTH_PATH = "/health"
# With every answer of ours: a digest of what is searched and how, so that no other index can answer unnoticed.
INDEX_HEADER = "X-Rex-Rag-Index"
# A server that over-fetches is cut to what was asked for; one that sends far more is broken or means harm.
MAX_SURPLUS_PASSAGES = 100


class WireError(ValueError):
    """A complete answer that is not what the wire format promises."""


class UnusableRanking(WireError):
    """A ranking in the right form, none of whose passages can be used."""


def index_digest(identity: Mapping[str, Any]) -> str | None:
    """Sixteen hexadecimal digits of what a server says of what it searches; None where it has no fingerprint."""
    if not isinstance(identity.get("fingerprint"), str):
        return None
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:16]


def index_of(health: Mapping[str, Any]) -> str | None:
    """The same from a health page."""
    identity = health.get("identity")
    return index_digest(identity) if isinstance(identity, dict) else None


def encode_request(queries: Sequence[str], top_k: int) -> bytes:
    """The body of a search. Half a surrogate pair, which UTF-8 cannot hold, is sent as a question mark."""
    payload = {"queries": list(queries), "topk": top_k, "return_scores": True}
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def encode_keys(keys: Sequence[str]) -> bytes:
    """The body of a request for documents."""
    return json.dumps({"keys": list(keys)}, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def encode_documents(documents: Iterable[Iterable[bytes]]) -> bytes:
    """The body of an answer, from each document's passages as UTF-8 JSON objects."""
    return b'{"result":[' + b",".join(b"[" + b",".join(passages) + b"]" for passages in documents) + b"]}"


def encode_rankings(rankings: Iterable[Iterable[tuple[bytes, float]]], return_scores: bool) -> bytes:
    """The body of an answer, from each ranking's (passage as a UTF-8 JSON object, score) pairs, best first.

    Raises:
        RetrievalError: for a score that is not finite, scores asked for or not: such a ranking has no order.
    """
    return b'{"result":[' + b",".join(_encode_ranking(ranking, return_scores) for ranking in rankings) + b"]}"


def _encode_ranking(ranking: Iterable[tuple[bytes, float]], return_scores: bool) -> bytes:
    entries = []
    for rank, (document, score) in enumerate(ranking, start=1):
        score = float(score)
        if not math.isfinite(score):
            raise RetrievalError(
                f"rank {rank} has the score {score}, which orders nothing and which JSON cannot hold; check the index "
                f"for broken vectors. The passage: {shorten(document.decode('utf-8', 'replace'))}"
            )
        entries.append(b'{"document":%b,"score":%b}' % (document, repr(score).encode()) if return_scores else document)
    return b"[" + b",".join(entries) + b"]"


def decode_rankings(
    body: bytes, queries: Sequence[str], top_k: int, tell: Callable[[str], object] = logger.warning
) -> list[list[Passage]]:
    """Read an answer: for each query its usable passages, best first, cut to `top_k`.

    A document without an id is identified by its text, the same in every run.

    Args:
        tell: is told which passages cannot be used, and why, one a ranking.

    Raises:
        WireError: for anything but one ranking with a usable passage for every query.
    """
    rankings = _result(body, counted(len(queries), "query", "queries"), len(queries))
    for entry, query in zip(rankings, queries, strict=True):
        if not entry:
            raise WireError(f"the result of query {shorten(query)} is empty")
        if len(entry) > top_k + MAX_SURPLUS_PASSAGES:
            raise WireError(f"{len(entry):,} passages for query {shorten(query)}, which asked for {top_k}")
    return [
        _read_passages(entry, f"query {shorten(query)}", top_k, tell)
        for entry, query in zip(rankings, queries, strict=True)
    ]


def decode_documents(
    body: bytes, keys: Sequence[str], tell: Callable[[str], object] = logger.warning
) -> list[list[Passage]]:
    """Read an answer to `encode_keys`: for each key its document's usable passages; none for an unknown key.

    Raises:
        WireError: for anything but one list of passages for every key, and for a document without a usable one.
    """
    documents = _result(body, counted(len(keys), "key"), len(keys))
    return [
        _read_passages(entry, f"key {shorten(key)}", None, tell) if entry else []
        for entry, key in zip(documents, keys, strict=True)
    ]


def _result(body: bytes, asked: str, count: int) -> list[list[Any]]:
    """The lists of an answer, one for each of what was asked for."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        shown = shorten(body.decode("utf-8", "replace"))
        raise WireError(f"malformed JSON ({error}) in {len(body):,} bytes: {shown}") from None
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, list):
        raise WireError(f'no list under "result" in {shorten(answer)}')
    if len(result) != count:
        raise WireError(f"{counted(len(result), 'result')} for {asked}")
    for place, entry in enumerate(result):
        if not isinstance(entry, list):
            raise WireError(f"result {place} is not a list: {shorten(entry)}")
    return result


def _read_passages(entry: list[Any], asked: str, most: int | None, tell: Callable[[str], object]) -> list[Passage]:
    passages: list[Passage] = []
    problems: list[str] = []
    for item in entry:
        if len(passages) == most:
            break
        try:
            passages.append(_read_passage(item))
        except (WireError, CorpusError) as error:
            problems.append(f"{error} in {shorten(item, 160)}")
    said = f"{counted(len(problems), 'result')} for {asked} cannot be used"
    said += f": {problems[0]}" if problems else ""
    if not passages:
        kind = UnusableRanking if any(isinstance(item, dict) for item in entry) else WireError
        raise kind(said)
    if problems:
        tell(said)
    return passages


def _read_passage(item: Any) -> Passage:
    if not isinstance(item, dict):
        raise WireError(f"not an object: {shorten(item)}")
    document, score = (item["document"], item.get("score")) if "document" in item else (item, None)
    if not isinstance(document, dict):
        raise WireError(f"its document is not an object: {shorten(document)}")
    passage = passage_from_row(document, default_id="")
    identity = passage.id or hashlib.sha1(f"{passage.title}\n{passage.text}".encode()).hexdigest()[:16]
    return Passage(identity, passage.title, passage.text, None if score is None else _read_score(score))


def _read_score(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise WireError(f"its score is not a number: {shorten(score)}")
    # An integer may be too large for a float, and a number such as 1e999 is read as infinity.
    if not abs(score) <= sys.float_info.max:
        raise WireError(f"its score is not finite: {shorten(score)}")
    return float(score)
