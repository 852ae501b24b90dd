"""What a user may say of an index to build: the fields behind `rex-rag index` and the `index:` part of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rex_rag.support.errors import UserError

KINDS = ("bm25", "dense")
INDEX_TYPES = ("flat", "flat-fp16", "ivf", "hnsw", "qdrant")
DTYPES = ("float32", "bfloat16", "float16")
# Arguments that say where and how fast to work, and so leave the index what it is.
_NOT_IDENTITY = ("corpus", "output", "workers", "devices", "qdrant_url")
_COUNTS = (
    *("workers", "max_tokens", "batch_size", "nlist", "nprobe", "hnsw_m", "ef_construction", "ef_search"),
    "build_threads",
)
_LISTS = ("corpus", "devices")
_BM25_ONLY = ("stemmer", "stopwords")
# What only a dense index has, unset by default; and of that, what only some types of it have.
_DENSE_ONLY = (
    *("model", "revision", "encoder_family", "query_prefix", "passage_prefix", "passage_format", "pooling"),
    *("normalize", "max_tokens", "dtype", "devices", "workers"),
)
_TYPES_OF = {
    "nlist": ("ivf",),
    "nprobe": ("ivf",),
    "hnsw_m": ("hnsw", "qdrant"),
    "ef_construction": ("hnsw", "qdrant"),
    "ef_search": ("hnsw",),
    "build_threads": ("hnsw",),
}
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
    kind: str = field(default="bm25", metadata={"help": "bm25 (lexical) or dense (an encoder's vectors)."})
    workers: int | None = field(
        default=None,
        metadata={"help": "dense: processes that encode on the CPU. Default: one."},
    )

    stemmer: str | None = field(default="english", metadata={"help": "bm25: language of a stemmer, or `none`."})
    stopwords: str | None = field(
        default="english", metadata={"help": "bm25: language of a list of stop words, or `none`."}
    )

    model: str | None = field(
        default=None, metadata={"help": "dense: sentence-transformers encoder, for example intfloat/e5-base-v2."}
    )
    revision: str | None = field(default=None, metadata={"help": "dense: commit of the encoder on the Hub."})
    encoder_family: str | None = field(
        default=None,
        metadata={"help": "dense: e5, bge-en, gte, contriever or minilm, for a local copy or fine-tune of one."},
    )
    query_prefix: str | None = field(
        default=None, metadata={"help": "dense: text before a query. Default: what the encoder was trained with."}
    )
    passage_prefix: str | None = field(
        default=None, metadata={"help": "dense: text before a passage. Default: what the encoder was trained with."}
    )
    passage_format: str | None = field(
        default=None, metadata={"help": "dense: how title and text are joined: contents, lines or blank."}
    )
    pooling: str | None = field(
        default=None, metadata={"help": "dense: mean, cls or lasttoken. Default: the encoder's own."}
    )
    normalize: bool | None = field(
        default=None, metadata={"help": "dense: vectors of length 1. Default: as the encoder was trained."}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "dense: longest text encoded, in tokens. Default: the encoder's own."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": f"dense: the encoder computes in {', '.join(DTYPES)}. Default: float16 on GPUs, or float32."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "dense: passages an encoder takes at once."})
    devices: list[str] = field(
        default_factory=list,
        metadata={"help": "dense: where to encode, for example cuda:0 cuda:1. Default: all GPUs."},
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
        if self.kind == "dense" and not self.model:
            yield "kind='dense' needs an encoder; set model, for example intfloat/e5-base-v2"
        yield from self._misplaced()
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
        if (self.qdrant_url or self.qdrant_collection) and self.index != "qdrant":
            yield f"qdrant_url and qdrant_collection are for index='qdrant', but index is {self.index!r}"
        if self.qdrant_url and not self.qdrant_collection:
            yield f"qdrant_url={self.qdrant_url!r} needs qdrant_collection, the name to load the passages under"

    def _misplaced(self):
        """Settings of another kind or type of index: taking them and doing nothing with them would mislead."""
        if self.kind == "bm25":
            for name in _DENSE_ONLY:
                if getattr(self, name) not in (None, []):
                    given = f"{name}={getattr(self, name)!r}"
                    yield f"{given} is for kind='dense', but kind is 'bm25'; set kind to dense, or drop {name}"
        for name, types in _TYPES_OF.items():
            if getattr(self, name) is not None and (self.kind == "bm25" or self.index not in types):
                given = "kind is 'bm25'" if self.kind == "bm25" else f"index is {self.index!r}"
                yield f"{name}={getattr(self, name)!r} is for index={' or '.join(map(repr, types))}, but {given}"
        if self.kind == "dense" and self.workers and self.devices:
            yield (
                f"workers={self.workers} and devices={self.devices} both say how many processes encode; name a device "
                "as often as it is to work, or drop one of the two"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The arguments that make the index what it is; of a local encoder its content, wherever it lies.

        Raises:
            RetrievalError: for a local folder that holds no encoder.
        """
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_IDENTITY}
        if self.kind == "bm25":
            return {"kind": self.kind, **{name: values[name] for name in _BM25_ONLY}}
        if Path(self.model).expanduser().is_dir():
            from rex_rag.retrieval.dense.checkpoints import find_checkpoint, public_name

            revision = find_checkpoint(self.model).revision
            values |= {"model": public_name(self.model, revision), "revision": revision}
        return {name: value for name, value in values.items() if name not in _BM25_ONLY}
