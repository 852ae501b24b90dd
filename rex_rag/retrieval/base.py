"""What the rest of the package knows of a retriever, and how a failed search is reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rex_rag.support.errors import UserError
from rex_rag.types import Passage

if TYPE_CHECKING:
    from rex_rag.retrieval.indexed import IndexedRetriever

# A batch of several hundred queries against an exact index over 21 million passages takes seconds, not a minute.
DEFAULT_TIMEOUT_SECONDS = 60.0
# With the client's pauses between them 4.5 minutes on average: a killed server may restart and load its index again.
DEFAULT_MAX_ATTEMPTS = 18


class RetrievalError(UserError):
    """A search could not be answered. Raised instead of ever returning nothing in its place."""


class EngineAway(RetrievalError):
    """The engine behind a search cannot be reached: no query is to blame, and no other one would fare better."""


class CannotRead(RetrievalError):
    """This retriever searches and cannot look documents up, whatever is asked for."""


class Retriever(ABC):
    """Answers batches of queries with ranked passages: what a retriever must say, and what it may offer besides.

    A class of a user's own may inherit from this, or offer the three that are required: see `as_retriever`.
    """

    # The most passages that a search gives, None without such a limit.
    max_top_k: int | None = None
    # Whether several searches at once, from several threads, are worth it.
    is_concurrent: bool = False
    # How many passages are searched, None where nobody knows.
    passage_count: int | None = None
    # The steps of a search, for whoever times, overlaps and batches them; None where a search is one step.
    stages: IndexedRetriever | None = None

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for model cards and logs: kind, corpus, size or address."""

    @abstractmethod
    def check(self) -> None:
        """Raise `RetrievalError` unless a search would be answered now; called before a model is loaded."""

    @abstractmethod
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return for each query, in the order asked, at least one and at most `top_k` passages, best first.

        A blank query gets passages as any that nothing matches: Search-R1's client asks such, beside others.

        Raises:
            RetrievalError: when a query could not be answered; the message names query or address, and cause.
        """

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        """Return for each key the passages of one document, in corpus order; none for a key that nothing has.

        A key is a title, or the id of any of its passages. What has exactly this title comes first, then an id, then a
        title that differs in case alone. White space counts as one blank, and at the ends not at all.

        Raises:
            CannotRead: for a retriever that only searches.
            RetrievalError: when a document could not be looked up; never an empty list in its place.
        """
        raise CannotRead(
            f"{self.description} only searches and cannot look documents up by title; read from a corpus (bm25), an "
            "index directory or a server that `rex-rag serve` runs, or leave reading out"
        )

    def hold_to(self, index: str) -> None:  # noqa: B027 (may be left as it is)
        """Answer from this index alone from now on: of a server the digest that it tells (`remote.wire.index_digest`).

        Raises:
            RetrievalError: where another one has answered already.
        """

    def warm_up(self) -> None:  # noqa: B027 (may be left as it is)
        """Spare the first search what is done once; costs no request and contacts nobody."""

    def close(self) -> None:  # noqa: B027 (may be left as it is)
        """Let go of connections and threads; the retriever cannot be used afterwards."""


class _Adapted(Retriever):
    """Somebody's own object as a `Retriever`: what it lacks is as the base class has it."""

    def __init__(self, own: Any) -> None:
        self._own = own
        for name in ("read", "close", "max_top_k", "passage_count", "is_concurrent"):
            if hasattr(own, name):
                setattr(self, name, getattr(own, name))

    @property
    def description(self) -> str:
        return self._own.description

    def check(self) -> None:
        self._own.check()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return self._own.search(queries, top_k)


def as_retriever(own: Any) -> Retriever:
    """A retriever as it is, and any object with description, check and search as one.

    Raises:
        TypeError: for an object that lacks one of them.
    """
    if isinstance(own, Retriever):
        return own
    lacking = [name for name in ("description", "check", "search") if not hasattr(own, name)]
    if lacking:
        raise TypeError(
            f"retriever is a {type(own).__name__} without {' and '.join(lacking)}; it must offer description, check "
            "and search"
        )
    return _Adapted(own)


def checked_search(retriever: Retriever, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
    """Search and hold the retriever to its contract: one non-empty ranking per query."""
    rankings = retriever.search(queries, top_k)
    if len(rankings) != len(queries):
        raise RetrievalError(
            f"{retriever.description} returned {len(rankings)} rankings for {len(queries)} queries; "
            "a retriever must answer every query, in the order asked"
        )
    for query, ranking in zip(queries, rankings, strict=True):
        if not ranking:
            raise RetrievalError(
                f"{retriever.description} returned no passage for the query {query!r}; an empty result is "
                "indistinguishable from a failed search, so it is refused: check the index"
            )
    return rankings


def check_request(queries: Sequence[str], top_k: int) -> None:
    """Raise `RetrievalError` for a `top_k` that is not a positive integer and for queries that are no strings."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RetrievalError(f"top_k={top_k!r} asks for no passage; it must be an integer of at least 1")
    check_texts(queries, "queries", "query")


def check_texts(texts: Sequence[str], name: str, one: str) -> None:
    """Raise `RetrievalError` for anything but a sequence of strings."""
    if isinstance(texts, str):
        raise RetrievalError(f"{name} is the single string {texts!r}; pass a list of strings")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise RetrievalError(f"{one} {position} is {text!r}, a {type(text).__name__}; it must be a string")
