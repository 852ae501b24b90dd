"""What a user may say of an index to build: the fields behind `rex-rag index` and the `index:` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rex_rag.retrieval.index.kinds import KINDS
from rex_rag.support.errors import UserError

INDEX_TYPES = ("flat", "flat-fp16", "ivf", "hnsw", "qdrant")
DTYPES = ("float32", "bfloat16", "float16")
_COUNTS = (
    *("workers", "max_tokens", "batch_size", "nlist", "nprobe", "hnsw_m", "ef_construction", "ef_search"),
    "build_threads",
)
_LISTS = ("corpus", "devices")
_TEXTS = (
    *("stemmer", "stopwords", "model", "revision", "encoder_family", "query_prefix", "passage_prefix"),
    *("passage_format", "pooling", "qdrant_url", "qdrant_collection"),
)


@dataclass
class IndexArguments:
    """Corpus, place and kind of an index.

    Raises:
        ValueError: for values that are out of range or do not go together, naming value, reason and way out.
    """

    corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON lines files of passages, plain or .gz: {id, contents} or {id, title, text}."},
    )
    output: str = field(default="", metadata={"help": "Directory to make; refused if it holds another index."})
    kind: str = field(
        default="bm25",
        metadata={
            "help": "bm25 (lexical), dense (a vector a passage) or late_interaction (a vector a token, ColBERT)."
        },
    )
    workers: int | None = field(
        default=None,
        metadata={"help": "dense: processes that encode on the CPU. Default: one."},
    )

    stemmer: str | None = field(default="english", metadata={"help": "bm25: language of a stemmer, or `none`."})
    stopwords: str | None = field(
        default="english", metadata={"help": "bm25: language of a list of stop words, or `none`."}
    )

    model: str | None = field(
        default=None,
        metadata={
            "help": "dense: sentence-transformers encoder, for example intfloat/e5-base-v2; late_interaction: "
            "a checkpoint of ColBERT or PyLate, for example colbert-ir/colbertv2.0."
        },
    )
    revision: str | None = field(
        default=None, metadata={"help": "dense, late_interaction: commit of the encoder on the Hub."}
    )
    encoder_family: str | None = field(
        default=None,
        metadata={
            "help": "dense: e5, bge-en, bge-m3, qwen3-embedding, gte, contriever or minilm, for a local copy or "
            "fine-tune of one."
        },
    )
    query_prefix: str | None = field(
        default=None, metadata={"help": "dense: text before a query. Default: what the encoder was trained with."}
    )
    passage_prefix: str | None = field(
        default=None, metadata={"help": "dense: text before a passage. Default: what the encoder was trained with."}
    )
    passage_format: str | None = field(
        default=None,
        metadata={"help": "dense, late_interaction: how title and text are joined: contents, lines or blank."},
    )
    pooling: str | None = field(
        default=None, metadata={"help": "dense: mean, cls or lasttoken. Default: the encoder's own."}
    )
    normalize: bool | None = field(
        default=None, metadata={"help": "dense: vectors of length 1. Default: as the encoder was trained."}
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "dense, late_interaction: longest text encoded, in tokens. Default: the encoder's own."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": f"dense, late_interaction: the encoder computes in {', '.join(DTYPES)}. Default: float16 on GPUs, "
            "or float32."
        },
    )
    batch_size: int = field(
        default=64, metadata={"help": "dense, late_interaction: passages an encoder takes at once."}
    )
    devices: list[str] = field(
        default_factory=list,
        metadata={
            "help": "dense, late_interaction (one): where to encode, for example cuda:0 cuda:1. Default: all GPUs."
        },
    )
    index: str = field(default="flat", metadata={"help": f"dense: one of {', '.join(INDEX_TYPES)}."})
    nlist: int | None = field(default=None, metadata={"help": "ivf: number of lists. Default: 4 sqrt(passages)."})
    nprobe: int | None = field(
        default=None, metadata={"help": "ivf: lists searched. Default: a sixteenth of them, and at least 64."}
    )
    hnsw_m: int | None = field(
        default=None, metadata={"help": "hnsw, qdrant: links a passage. Default: 32, qdrant 16."}
    )
    ef_construction: int | None = field(
        default=None, metadata={"help": "hnsw, qdrant: candidates while building. Default: 200, qdrant 100."}
    )
    ef_search: int | None = field(default=None, metadata={"help": "hnsw: candidates while searching. Default: 128."})
    build_threads: int | None = field(
        default=None,
        metadata={"help": "hnsw: threads that build the graph. Default: 1; with more no two builds are equal."},
    )
    qdrant_url: str | None = field(
        default=None, metadata={"help": "qdrant: address of a cluster. Default: embedded, in the searching process."}
    )
    qdrant_collection: str | None = field(default=None, metadata={"help": "qdrant: collection on that cluster."})

    def __post_init__(self) -> None:
        for name in _LISTS:  # YAML gives a lone entry as such
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, list | tuple) else [] if value is None else [value])
        problems = list(self._problems())
        if problems:
            raise UserError("; ".join(problems))

    def _problems(self):
        for name in _LISTS:
            wrong = [value for value in getattr(self, name) if not isinstance(value, str) or not value.strip()]
            if wrong:
                yield f"{name}={getattr(self, name)} holds {wrong[0]!r}; each entry must be a non-blank string"
        for name in ("output", *_TEXTS):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                yield f"{name}={value!r} is no text; put it in quotes"
        if not self.corpus:
            yield "corpus is empty; name at least one JSON lines file of passages"
        if not self.output:
            yield "output is not set; name the directory to make"
        if self.kind not in KINDS:
            yield f"kind={self.kind!r}; it must be one of {', '.join(KINDS)}"
        if self.index not in INDEX_TYPES:
            yield f"index={self.index!r}; it must be one of {', '.join(INDEX_TYPES)}"
        if self.kind in KINDS:
            yield from self._misplaced()
            yield from KINDS[self.kind].problems(self)
        if self.dtype is not None and self.dtype not in DTYPES:
            yield f"dtype={self.dtype!r}; it must be one of {', '.join(DTYPES)}"
        whole = True
        for name in _COUNTS:
            value = getattr(self, name)
            if (value is not None or name == "batch_size") and (type(value) is not int or value < 1):
                whole = False
                yield f"{name}={value!r}; it must be an integer of at least 1"
        if whole and self.nlist and self.nprobe and self.nprobe > self.nlist:
            yield f"nprobe={self.nprobe} is more than nlist={self.nlist}; search at most all lists"

    def _misplaced(self):
        """Settings of another kind of index: taking them and doing nothing with them would mislead."""
        own = KINDS[self.kind].settings
        said: set[str] = set()
        for kind in KINDS.values():
            for name in kind.settings:
                if name not in (*own, *said) and getattr(self, name) not in (None, []):
                    said.add(name)
                    yield (
                        f"{name}={getattr(self, name)!r} is for kind={kind.name!r}, but kind is {self.kind!r}; set "
                        f"kind to {kind.name}, or drop {name}"
                    )

    @property
    def identity(self) -> dict[str, Any]:
        """The arguments that make the index what it is.

        Raises:
            RetrievalError: for a local folder that holds no encoder.
        """
        return KINDS[self.kind].identity(self)
