"""The kinds of retrievers, each one object: how settings name it, what it needs, how it is opened.

To add one, write a `RetrieverKind` and put it into `KINDS`. A class of your own needs none: it is named
`module:Class`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import Retriever, as_retriever
from rex_rag.support.named import is_named, load_named

if TYPE_CHECKING:
    from rex_rag.retrieval.load import RetrieverArguments

BM25 = "bm25"
BM25S = "bm25s"
ONLINE = ("google", "serpapi")


@dataclass(frozen=True, slots=True)
class RetrieverKind:
    """One kind.

    matches: whether an entry of the setting `retriever` names it. load: opens it. corpus: whether it searches the
    setting `corpus` ("needed"), checks its own by it ("checked") or has nothing to do with it ("none"). reason: why it
    does not read the settings of an index directory; empty where it does. problems: what else is wrong with settings.
    """

    name: str
    matches: Callable[[str], bool]
    load: Callable[[RetrieverArguments], Retriever]
    corpus: str = "none"
    reason: str = ""
    problems: Callable[[RetrieverArguments], Iterator[str]] = lambda arguments: iter(())


def _load_bm25(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.bm25.retriever import BM25Retriever

    return BM25Retriever.from_corpus(arguments.corpus)


def _load_bm25s(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.bm25.free_parameters import BM25sRetriever

    return BM25sRetriever.from_corpus(arguments.corpus, arguments.bm25s_k1, arguments.bm25s_b)


def _load_online(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.online.retriever import OnlineRetriever

    return OnlineRetriever(
        arguments.retriever[0],
        arguments.search_cache,
        max_searches=arguments.max_paid_searches or 0,
        mode=arguments.search_cache_mode,
    )


def _online_problems(arguments: RetrieverArguments) -> Iterator[str]:
    if not arguments.search_cache:
        yield (
            f"retriever={arguments.retriever[0]!r} needs search_cache, the directory that keeps answers and the count "
            "of paid searches"
        )
    if arguments.max_paid_searches is None and arguments.search_cache_mode != "replay":
        yield (
            f"retriever={arguments.retriever[0]!r} costs money; set max_paid_searches to what may be spent, or "
            "search_cache_mode to replay, which asks nobody"
        )


def _load_remote(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.remote.client import RemoteRetriever

    return RemoteRetriever(
        arguments.retriever,
        timeout=arguments.retriever_timeout,
        max_attempts=arguments.retriever_max_attempts,
        limit_names=("retriever_timeout", "retriever_max_attempts"),
    )


def _load_own(arguments: RetrieverArguments) -> Retriever:
    return as_retriever(load_named(arguments.retriever[0], None, "retriever")())


def _load_index(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.index.kinds import open_index
    from rex_rag.retrieval.index_kind import SearchOptions

    return open_index(
        Path(arguments.retriever[0]),
        SearchOptions(
            engine=arguments.retriever_engine,
            devices=tuple(arguments.retriever_devices),
            encoder=arguments.retriever_encoder,
            nprobe=arguments.retriever_nprobe,
            ef_search=arguments.retriever_ef_search,
        ),
        corpus=arguments.corpus,
    )


def _index_problems(arguments: RetrieverArguments) -> Iterator[str]:
    name = arguments.retriever[0]
    if "/" not in name and not Path(name).is_dir():
        yield (
            f"retriever={name!r} is neither {BM25!r}, {' nor '.join(ONLINE)}, nor an http(s) URL, nor a directory "
            f"here ({Path.cwd()}); name an index directory, or write ./{name} if it is to be one"
        )


_IN_MEMORY = "searches in memory on the CPU"
# The first that matches; an index directory is what is nothing else.
KINDS = (
    RetrieverKind(BM25, BM25.__eq__, _load_bm25, "needed", _IN_MEMORY),
    RetrieverKind(BM25S, BM25S.__eq__, _load_bm25s, "needed", _IN_MEMORY),
    RetrieverKind("online", ONLINE.__contains__, _load_online, "none", "is an online engine", _online_problems),
    RetrieverKind(
        "remote",
        lambda name: name.startswith(("http://", "https://")),
        _load_remote,
        "none",
        "is searched by its server, which has settings of its own",
    ),
    RetrieverKind("own", is_named, _load_own, "none", "is a class of your own"),
    RetrieverKind("index", lambda name: True, _load_index, "checked", problems=_index_problems),
)


def kind_of(name: str) -> RetrieverKind:
    """The kind that an entry of the setting `retriever` names."""
    return next(kind for kind in KINDS if kind.matches(name))
