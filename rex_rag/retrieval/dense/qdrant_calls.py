"""The one way this package talks to Qdrant: connection, retries, and what a collection says about itself."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rex_rag.retrieval.base import EngineAway, RetrievalError
from rex_rag.support.http import bound
from rex_rag.support.politeness import PassingTrouble, persist
from rex_rag.support.secrets import hide
from rex_rag.support.tables import one_line
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

logger = logging.getLogger(__name__)
T = TypeVar("T")

API_KEY_VARIABLE = "QDRANT_API_KEY"
FINGERPRINT_KEY = "rex_rag_fingerprint"  # as one string of JSON, since clients and servers drop nulls from objects
COMPLETE_KEY = "rex_rag_complete"
MAX_BACKOFF_SECONDS = 30.0
_MOST_SAID_CHARACTERS = 500


def connect_qdrant(url: str | None = None, timeout: float = 60.0) -> QdrantClient:
    """A client of the cluster at `url` (port 6333 unless it names one), or of a new embedded instance.

    timeout: seconds a request may take, rounded to whole ones. The API key is read from the environment
    (`QDRANT_API_KEY`), where the cluster wants one. Nothing is contacted yet.

    Raises:
        RetrievalError: where qdrant-client is missing or the URL is malformed.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise RetrievalError(
            "Qdrant needs qdrant-client: install it with `pip install 'rex-rag[retrieval]'`"
        ) from error
    if url is None:
        return QdrantClient(":memory:")
    if not url.startswith(("http://", "https://")):
        raise RetrievalError(f"the Qdrant address {url!r} is not an http(s) URL; use https://host:6333")
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise RetrievalError(
            f"the Qdrant address holds a user name or password, which would end up in manifests; put a key into "
            f"{API_KEY_VARIABLE} and give the host alone"
        )
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    # A key that no HTTP header can carry would otherwise be spelled out in the transport's own error.
    if not (key.isascii() and key.isprintable()):
        raise RetrievalError(
            f"the environment variable {API_KEY_VARIABLE} holds characters that no key has; set it anew"
        )
    try:
        client = QdrantClient(
            url=url,
            api_key=key or None,
            timeout=max(1, round(timeout)),
            # The check would contact the server from the constructor, and only warn where that fails.
            check_compatibility=False,
        )
    except ValueError as error:
        raise RetrievalError(f"the Qdrant address {url!r} is malformed ({error}); use https://host:6333") from error
    bound(client.http.client._client)
    return client


class NotApplied(Exception):
    """The cluster took a request without saying that it was carried out; sending it again is worth a try."""


class QdrantCalls:
    """Calls of the client with bounded retries where trouble may pass, and one kind of error."""

    def __init__(self, client: QdrantClient, collection: str, max_attempts: int, backoff: float) -> None:
        if max_attempts < 1 or backoff < 0:
            raise RetrievalError(f"max_attempts={max_attempts}, backoff={backoff}; at least 1 attempt and 0 seconds")
        self.client, self.collection = client, collection
        self.troubles = 0  # attempts that failed so far
        self._max_attempts, self._backoff = max_attempts, backoff

    def __call__(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        made = 0

        def attempt() -> T:
            nonlocal made
            made += 1
            try:
                return call(*args, **kwargs)
            except ResourceExhaustedResponse as error:
                raise PassingTrouble(_said(error), retry_after=float(error.retry_after_s)) from error
            except ResponseHandlingException as error:
                raise PassingTrouble(_said(error.source)) from error.source
            except NotApplied as error:
                raise PassingTrouble(_said(error)) from error
            except UnexpectedResponse as error:
                if error.status_code == 429 or (error.status_code or 500) >= 500:
                    raise PassingTrouble(_said(error)) from error
                raise

        def say(number: int, trouble: PassingTrouble, delay: float) -> None:
            self.troubles += 1
            logger.warning("Qdrant: attempt %d of %d failed (%s)", number, self._max_attempts, trouble)

        def failed(said: str, way_out: str) -> str:
            return (
                f"Qdrant collection {self.collection!r}: {getattr(call, '__name__', call)} failed after "
                f"{counted(made, 'attempt')} ({said}); {way_out}"
            )

        try:
            return persist(
                attempt, attempts=self._max_attempts, backoff=self._backoff, longest=MAX_BACKOFF_SECONDS, say=say
            )
        except PassingTrouble as trouble:
            way_out = "is the cluster up and reachable from here?"
            raise EngineAway(failed(str(trouble), way_out)) from trouble.__cause__
        except (UnexpectedResponse, ValueError) as error:
            way_out = "the request was refused"
            if isinstance(error, UnexpectedResponse) and error.status_code in (401, 403):
                way_out = f"set the environment variable {API_KEY_VARIABLE} to a key that may do this"
            raise RetrievalError(failed(_said(error), way_out)) from error


def _said(error: Exception) -> str:
    said = hide(f"{type(error).__name__}: {error}", os.environ.get(API_KEY_VARIABLE, "").strip())
    return one_line(said)[:_MOST_SAID_CHARACTERS]


def check_reachable(url: str, collection: str, max_attempts: int = 3, backoff: float = 0.5) -> None:
    """Ask the cluster at `url` one question, before hours go into vectors for it.

    Raises:
        RetrievalError: for a cluster that is away or refuses the key, naming address and last cause.
    """
    client = connect_qdrant(url, timeout=10.0)
    try:
        QdrantCalls(client, collection, max_attempts, backoff)(client.collection_exists, collection)
    except RetrievalError as error:
        raise type(error)(f"nothing was built, since the vectors could not go to {url}: {error}") from error
    finally:
        client.close()


def is_embedded(client: QdrantClient) -> bool:
    """Whether the client holds its collections in this process."""
    from qdrant_client.local.qdrant_local import QdrantLocal

    return isinstance(client._client, QdrantLocal)


def full_fingerprint(fingerprint: Mapping[str, Any], rows: int, dimension: int) -> dict[str, Any]:
    """What a collection is told to be made of: the caller's fingerprint and the shape of the matrix."""
    if rows < 1 or dimension < 1:
        raise RetrievalError(f"{rows} rows of {dimension} dimensions; a collection needs at least one of each")
    # As it comes back from the server: keys and lists as JSON has them.
    return json.loads(json.dumps({**fingerprint, "rows": rows, "dimension": dimension}))


def is_complete(calls: QdrantCalls, wanted: dict[str, Any]) -> bool:
    """Whether the collection holds all rows of `wanted`, a fingerprint from `full_fingerprint`.

    Raises:
        RetrievalError: for a collection made from something else.
    """
    metadata = calls(calls.client.get_collection, calls.collection).config.metadata or {}
    name = calls.collection
    try:
        found = json.loads(metadata[FINGERPRINT_KEY])
    except (KeyError, TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RetrievalError(
            f"the Qdrant collection {name!r} carries no fingerprint: it was not made by `rex-rag index`, or the "
            "server is older than 1.16 and keeps none; take another collection name or a newer server"
        )
    differing = [
        f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise RetrievalError(
            f"the Qdrant collection {name!r} was made from something else ({'; '.join(differing)}); it was not "
            "touched: take another collection name, or delete it yourself"
        )
    return metadata.get(COMPLETE_KEY) is True
