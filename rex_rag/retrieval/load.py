"""From arguments (a recipe or the command line) to a retriever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rex_rag.retrieval.base import DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT_SECONDS, Retriever
from rex_rag.retrieval.identity import of_settings
from rex_rag.retrieval.kinds import BM25, BM25S_DEFAULTS, KINDS, RetrieverKind, kind_of
from rex_rag.support.errors import UserError

CACHE_MODES = ("record", "replay", "off")
ENGINES = ("auto", "faiss", "faiss-gpu", "torch")
# What only the search of an index directory reads, with the value that asks for nothing.
_INDEX_ONLY = {
    "retriever_engine": "auto",
    "retriever_encoder": None,
    "retriever_nprobe": None,
    "retriever_ef_search": None,
}


@dataclass
class RetrieverArguments:
    """Which retriever answers searches. Relative paths are relative to the working directory.

    Raises:
        ValueError: for values that are out of range or do not go together.
    """

    retriever: list[str] = field(
        default_factory=lambda: [BM25],
        metadata={
            "help": "`bm25` to search `corpus` in this process, or `bm25s` with `bm25s_k1` and `bm25s_b`; the "
            "directory of an index; http(s) URLs of one or several servers that speak the Search-R1 format; `google` "
            "or `serpapi`."
        },
    )
    corpus: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSON lines files of passages, `{id, contents}` or `{id, title, text}`: what bm25 searches; with "
            "an index directory, what it must have been built from."
        },
    )
    retriever_timeout: float = field(
        default=DEFAULT_TIMEOUT_SECONDS, metadata={"help": "Seconds one attempt at a remote search may take."}
    )
    retriever_max_attempts: int = field(
        default=DEFAULT_MAX_ATTEMPTS,
        metadata={"help": "Attempts at a remote search, a server, before it is an error."},
    )
    retriever_engine: str = field(
        default="auto",
        metadata={
            "help": "What searches a flat index: faiss (CPU), faiss-gpu (shards in half precision), torch (matrix "
            "products on `retriever_devices`); auto takes a GPU if `retriever_devices` names one, or else faiss."
        },
    )
    retriever_devices: list[str] = field(
        default_factory=list,
        metadata={"help": "Where to encode queries and search, for example cuda:0 cuda:1. Default: cpu."},
    )
    retriever_encoder: str | None = field(
        default=None, metadata={"help": "Where the index's encoder lies on this machine, if not where it was built."}
    )
    retriever_nprobe: int | None = field(default=None, metadata={"help": "ivf: lists searched, instead of built-in."})
    retriever_ef_search: int | None = field(
        default=None, metadata={"help": "hnsw and qdrant: candidates of a search, instead of built-in."}
    )
    bm25s_k1: float = field(
        default=BM25S_DEFAULTS["bm25s_k1"],
        metadata={"help": "bm25s: term frequency saturation, Pyserini's. bm25 has 1.2."},
    )
    bm25s_b: float = field(
        default=BM25S_DEFAULTS["bm25s_b"], metadata={"help": "bm25s: length normalisation, Pyserini's. bm25 has 0.75."}
    )
    rerank_model: str | None = field(
        default=None, metadata={"help": "Cross-encoder (sentence-transformers) that orders the candidates anew."}
    )
    rerank_candidates: int = field(default=50, metadata={"help": "Passages that the cross-encoder reads a query."})
    search_cache: str | None = field(
        default=None, metadata={"help": "google, serpapi: directory in which answers are kept, so that runs repeat."}
    )
    search_cache_mode: str = field(
        default="record",
        metadata={"help": "google, serpapi: record (ask once, keep), replay (never ask), off (always ask)."},
    )
    max_paid_searches: int | None = field(
        default=None, metadata={"help": "google, serpapi: paid searches allowed with this cache, over all runs."}
    )

    def __post_init__(self) -> None:
        # YAML gives a lone entry as such and whole numbers as integers.
        for name in ("retriever", "corpus", "retriever_devices"):
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, list | tuple) else [] if value is None else [value])
        if self.corpus == ["none"]:  # a command line has no other word for leaving out what a recipe names
            self.corpus = []
        if isinstance(self.retriever_timeout, int) and not isinstance(self.retriever_timeout, bool):
            self.retriever_timeout = float(self.retriever_timeout)
        problems = [*self._source_problems(), *self._value_problems()]
        if problems:
            raise UserError("; ".join(problems))

    @property
    def kind(self) -> RetrieverKind:
        return kind_of(self.retriever[0])

    @property
    def name(self) -> str:
        """The retriever as one line for people."""
        return " ".join([*self.retriever, *self.corpus])

    def _source_problems(self) -> Iterator[str]:
        for name in ("retriever", "corpus", "retriever_devices"):
            blank = [value for value in getattr(self, name) if not isinstance(value, str) or not value.strip()]
            if blank:
                yield f"{name}={getattr(self, name)} holds {blank[0]!r}; each entry must be a non-blank string"
                return
        if not self.retriever:
            yield f"retriever is empty; use {BM25!r}, an index directory or a URL such as http://127.0.0.1:8000"
            return
        if len(self.retriever) > 1 and not all(kind_of(name).is_served for name in self.retriever):
            yield f"retriever={self.retriever} names several that are not all URLs; only servers can share the work"
            return
        kind = self.kind
        if kind.corpus == "none" and self.corpus:
            yield (
                f"retriever={self.retriever} has its own corpus, but corpus={self.corpus} is set too; leave corpus "
                f"out (--corpus none where a recipe names it), or use retriever={BM25!r}"
            )
        if kind.corpus == "needed" and not self.corpus:
            yield (
                f"retriever={kind.name!r} searches a corpus in this process, but corpus is empty; name at least one "
                "JSON lines file of passages"
            )
        yield from kind.problems(self)
        yield from self._misplaced()

    def _misplaced(self) -> Iterator[str]:
        """Settings that this kind of retriever does not read: taking them and doing nothing would mislead."""
        for other in KINDS:
            for name, unset in other.settings.items() if other is not self.kind else ():
                if getattr(self, name) != unset:
                    yield (
                        f"{name}={getattr(self, name)!r} is for retriever={other.name!r}, not for {self.kind.name}; "
                        "leave it out"
                    )
        reason = self.kind.reason
        if not reason:
            return
        unread = {name: "leave it out" for name, unset in _INDEX_ONLY.items() if getattr(self, name) != unset}
        if "retriever_engine" in unread:  # a command line cannot leave out what a recipe names
            unread["retriever_engine"] += " or at auto"
        if self.retriever_devices and self.rerank_model is None:
            unread["retriever_devices"] = "leave it out, or set rerank_model, which would run there"
        for name, way_out in unread.items():
            yield (
                f"{name}={getattr(self, name)!r} is for an index directory, but retriever={' '.join(self.retriever)} "
                f"{reason}; {way_out}"
            )

    def _value_problems(self) -> Iterator[str]:
        if not isinstance(self.retriever_timeout, float) or not 0 < self.retriever_timeout < float("inf"):
            yield f"retriever_timeout={self.retriever_timeout!r}; it must be a finite number above 0"
        for name, highest in (("bm25s_k1", 1e6), ("bm25s_b", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                yield f"{name}={value!r}; it must be a number within 0 and {highest:g}"
        if self.retriever_engine not in ENGINES:
            yield f"retriever_engine={self.retriever_engine!r}; it must be one of {', '.join(ENGINES)}"
        if self.search_cache_mode not in CACHE_MODES:
            yield f"search_cache_mode={self.search_cache_mode!r}; it must be one of {', '.join(CACHE_MODES)}"
        optional = ("retriever_nprobe", "retriever_ef_search", "max_paid_searches")
        for name in ("retriever_max_attempts", "rerank_candidates", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{name}={value!r}; it must be an integer of at least 1"


def load_retriever(arguments: RetrieverArguments) -> Retriever:
    """Build the retriever that the arguments name. A remote one is not contacted: call its `check()`.

    Raises:
        CorpusError: for a corpus file that is missing, empty or malformed.
        RetrievalError: for a malformed URL, a corpus that cannot be indexed, a directory that holds no index, or one
            that does not belong to the encoder or corpus.
    """
    retriever = kind_of(arguments.retriever[0]).load(arguments)
    if arguments.rerank_model is None:
        return retriever
    from rex_rag.retrieval.rerank import rerank

    return rerank(retriever, arguments.rerank_model, arguments.rerank_candidates, arguments.retriever_devices)


def retriever_identity(arguments: RetrieverArguments, loaded: Retriever | None = None) -> dict[str, Any]:
    """`fingerprint` and `corpus_sha256`, where they can be known, and the settings that change what is found.

    fingerprint: of an index's manifest. BM25 over a corpus in this process has that of the index which `rex-rag index
    --kind bm25` would make of it, and finds the same. A server tells its own; `served` is what it says it searches.

    answers_sha256: of a server that tells no fingerprint (Search-R1's own): the hash of the passages' texts, in order,
    that it finds for `FIXED_QUERIES`. One other passage among them and it counts as another retriever; a change that
    none of them shows goes unseen. An online engine has nothing of the kind: what it finds changes by the day.

    Args:
        loaded: the retriever that the arguments name, where it is loaded: spares reading its corpus again. Without
            it, a server is not asked to search.

    Raises:
        CorpusError, RetrievalError: for a corpus or index that cannot be read, a re-ranker that is not there, and
            servers that search different things.
    """
    return arguments.kind.identity(arguments, loaded) | of_settings(arguments)
