"""The kinds of retrievers, each one object: how settings name it, what it needs, how it is opened.

To add one, write a `RetrieverKind` and put it into `KINDS`. A class of your own needs none: it is named
`module:Class`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import Retriever, as_retriever
from rex_rag.retrieval.identity import of_bm25, of_index, of_servers
from rex_rag.retrieval.manifest import Manifest
from rex_rag.support.named import is_named, load_named

if TYPE_CHECKING:
    from rex_rag.retrieval.load import RetrieverArguments

BM25 = "bm25"
BM25S = "bm25s"
ONLINE = ("google", "serpapi")
# Pyserini's, with which most published BM25 baselines were made.
BM25S_DEFAULTS = {"bm25s_k1": 0.9, "bm25s_b": 0.4}


@dataclass(frozen=True, slots=True)
class RetrieverKind:
    """One kind.

    matches: whether an entry of the setting `retriever` names it. load: opens it. identity: what decides what it
    finds, see `retriever_identity`. corpus: whether it searches the setting `corpus` ("needed"), checks its own by it
    ("checked") or has nothing to do with it ("none"). reason: why it does not read the settings of an index directory;
    empty where it does. settings: what it alone reads, with the value that asks for nothing. problems: what else is
    wrong with settings. check: raises where what is named is not there. passages: files in which to look its passages
    through. is_served: other processes search, several of which can share the work. loads_engine: whether opening it
    loads libraries that vLLM cannot start beside.
    """

    name: str
    matches: Callable[[str], bool]
    load: Callable[[RetrieverArguments], Retriever]
    identity: Callable[[RetrieverArguments, Retriever | None], dict[str, Any]] = lambda arguments, loaded: {}
    corpus: str = "none"
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    problems: Callable[[RetrieverArguments], Iterator[str]] = lambda arguments: iter(())
    check: Callable[[RetrieverArguments], object] = lambda arguments: None
    passages: Callable[[RetrieverArguments], list[str]] = lambda arguments: arguments.corpus
    is_served: bool = False
    loads_engine: bool = True


def _load_bm25(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.bm25.retriever import BM25Retriever

    return BM25Retriever.from_corpus(arguments.corpus)


def _load_bm25s(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.bm25.free_parameters import BM25sRetriever

    return BM25sRetriever.from_corpus(arguments.corpus, arguments.bm25s_k1, arguments.bm25s_b)


def _load_online(arguments: RetrieverArguments) -> Retriever:
    from rex_rag.retrieval.online.retriever import OnlineRetriever

    assert arguments.search_cache  # `_online_problems` asks for it
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
    RetrieverKind(
        BM25,
        BM25.__eq__,
        _load_bm25,
        of_bm25,
        corpus="needed",
        reason=_IN_MEMORY,
        loads_engine=False,
    ),
    RetrieverKind(
        BM25S,
        BM25S.__eq__,
        _load_bm25s,
        lambda arguments, loaded: of_bm25(arguments, loaded, engine=BM25S, k1=arguments.bm25s_k1, b=arguments.bm25s_b),
        corpus="needed",
        reason=_IN_MEMORY,
        settings=BM25S_DEFAULTS,
    ),
    RetrieverKind(
        "online",
        ONLINE.__contains__,
        _load_online,
        reason="is an online engine",
        problems=_online_problems,
        loads_engine=False,
    ),
    RetrieverKind(
        "remote",
        lambda name: name.startswith(("http://", "https://")),
        _load_remote,
        of_servers,
        reason="is searched by its server, which has settings of its own",
        is_served=True,
        loads_engine=False,
    ),
    RetrieverKind("own", is_named, _load_own, reason="is a class of your own"),
    RetrieverKind(
        "index",
        lambda name: True,
        _load_index,
        of_index,
        corpus="checked",
        problems=_index_problems,
        check=lambda arguments: Manifest.read(arguments.retriever[0]),
        passages=lambda arguments: arguments.corpus or arguments.retriever,
    ),
)


def kind_of(name: str) -> RetrieverKind:
    """The kind that an entry of the setting `retriever` names."""
    return next(kind for kind in KINDS if kind.matches(name))
