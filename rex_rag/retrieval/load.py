"""From arguments (a recipe or the command line) to a retriever."""

from __future__ import annotations

from dataclasses import dataclass, field

from rex_rag.retrieval.base import DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT_SECONDS, Retriever

BM25 = "bm25"


@dataclass
class RetrieverArguments:
    """Which retriever answers searches. Relative corpus paths are relative to the working directory.

    Raises:
        ValueError: for values that are out of range or do not go together.
    """

    retriever: str = field(
        default=BM25,
        metadata={
            "help": "`bm25` to search `corpus` in this process, or the http(s) URL of a server that speaks the "
            "Search-R1 format (POST /retrieve)."
        },
    )
    corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON lines files of passages, `{id, contents}` or `{id, title, text}`; for bm25 only."},
    )
    retriever_timeout: float = field(
        default=DEFAULT_TIMEOUT_SECONDS, metadata={"help": "Seconds one attempt at a remote search may take."}
    )
    retriever_max_attempts: int = field(
        default=DEFAULT_MAX_ATTEMPTS,
        metadata={"help": "Attempts at a remote search before it is an error."},
    )

    def __post_init__(self) -> None:
        # YAML gives a lone path as a string and whole numbers as integers.
        self.corpus = [self.corpus] if isinstance(self.corpus, str) else list(self.corpus or [])
        if isinstance(self.retriever_timeout, int) and not isinstance(self.retriever_timeout, bool):
            self.retriever_timeout = float(self.retriever_timeout)
        remote = isinstance(self.retriever, str) and self.retriever.startswith(("http://", "https://"))
        if not remote and self.retriever != BM25:
            raise ValueError(
                f"retriever={self.retriever!r} is neither {BM25!r} nor an http(s) URL; use one of the two, "
                "for example http://127.0.0.1:8000"
            )
        if remote and self.corpus:
            raise ValueError(
                f"retriever={self.retriever!r} is a server, which has its own corpus, but corpus={self.corpus} is set "
                f"too; leave corpus out, or use retriever={BM25!r}"
            )
        if not remote and not self.corpus:
            raise ValueError(
                f"retriever={BM25!r} searches a corpus in this process, but corpus is empty; name at least one JSON "
                "lines file of passages"
            )
        blank = [path for path in self.corpus if not isinstance(path, str) or not path.strip()]
        if blank:
            raise ValueError(f"corpus={self.corpus} holds {blank[0]!r}; each entry must be the path of a file")
        if not isinstance(self.retriever_timeout, float) or not 0 < self.retriever_timeout < float("inf"):
            raise ValueError(f"retriever_timeout={self.retriever_timeout!r}; it must be a finite number above 0")
        attempts = self.retriever_max_attempts
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ValueError(f"retriever_max_attempts={attempts!r}; it must be an integer of at least 1")


def load_retriever(arguments: RetrieverArguments) -> Retriever:
    """Build the retriever that the arguments name. A remote one is not contacted: call its `check()`.

    Raises:
        CorpusError: for a corpus file that is missing, empty or malformed.
        RetrievalError: for a malformed URL or a corpus that cannot be indexed.
    """
    if arguments.retriever == BM25:
        from rex_rag.retrieval.bm25 import BM25Retriever

        return BM25Retriever.from_corpus(arguments.corpus)
    from rex_rag.retrieval.client import RemoteRetriever

    return RemoteRetriever(
        arguments.retriever,
        timeout=arguments.retriever_timeout,
        max_attempts=arguments.retriever_max_attempts,
    )
