"""The kinds of index: how each is built into a directory, and opened from one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.estimate import Estimate
from rex_rag.retrieval.index.manifest import ENCODER_FOLDER_FILE, Manifest
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.passages import PassageStore
from rex_rag.support.durable import written_whole
from rex_rag.support.wording import counted
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

    from rex_rag.retrieval.dense.encoder import Encoder, EncoderSpec
    from rex_rag.retrieval.dense.vector_index import VectorIndex

BM25_FOLDER = "bm25"
VECTORS_FILE = "index.faiss"
FLAT = ("flat", "flat-fp16")


class IndexKind(Protocol):
    """What a kind of index adds to the passages of a directory."""

    def estimate(self, sample: Sequence[Passage], total: int) -> Estimate:
        """What building over `total` passages like those of the sample will take."""
        ...

    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Write the index's files into `directory`; `work` is for what is thrown away at the end.

        Both may hold what a killed build left. Returns what the manifest says of encoder and index.
        """
        ...


@dataclass(frozen=True)
class SearchOptions:
    """How an index is searched, as far as that is open once it is built."""

    engine: str = "auto"
    devices: tuple[str, ...] = ()
    encoder: str | None = None
    nprobe: int | None = None
    ef_search: int | None = None


class BM25Kind:
    """`bm25`: terms of titles and texts."""

    def __init__(self, arguments: IndexArguments) -> None:
        from rex_rag.retrieval.bm25.text import BM25Options

        self._options = BM25Options(arguments.stemmer, arguments.stopwords)

    def estimate(self, sample: Sequence[Passage], total: int) -> Estimate:
        from rex_rag.retrieval.bm25.estimate import estimate_bm25

        return estimate_bm25(sample, total, self._options)

    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[None, dict[str, Any]]:
        from rex_rag.retrieval.bm25.build import build_bm25

        build_bm25(passages, directory / BM25_FOLDER, self._options, work=work / BM25_FOLDER)
        return None, self._options.index_parameters


class DenseKind:
    """`dense`: vectors of an encoder, in FAISS or Qdrant."""

    def __init__(self, arguments: IndexArguments) -> None:
        self._arguments = arguments
        self._loaded: Encoder | None = None

    @property
    def _encoder(self) -> Encoder:
        if self._loaded is None:
            from rex_rag.retrieval.dense.encoder import Encoder
            from rex_rag.retrieval.dense.families import resolve_encoder

            wanted = self._arguments
            spec = resolve_encoder(
                wanted.model,
                wanted.revision,
                wanted.encoder_family,
                query_prefix=wanted.query_prefix,
                passage_prefix=wanted.passage_prefix,
                passage_format=wanted.passage_format,
                pooling=wanted.pooling,
                normalize=wanted.normalize,
                max_tokens=wanted.max_tokens,
            )
            self._loaded = Encoder(spec, _encoding_devices(wanted), wanted.batch_size, wanted.dtype)
        return self._loaded

    def _options(self):
        from rex_rag.retrieval.dense.faiss_index import FaissOptions

        wanted = self._arguments
        given = {
            "nlist": wanted.nlist,
            "nprobe": wanted.nprobe,
            "m": wanted.hnsw_m,
            "ef_construction": wanted.ef_construction,
            "ef_search": wanted.ef_search,
            "build_threads": wanted.build_threads,
        }
        # Qdrant's embedded mode is filled from an exact index in half precision.
        kind = "flat-fp16" if wanted.index == "qdrant" else wanted.index
        return FaissOptions(kind=kind, **{name: value for name, value in given.items() if value is not None})

    def estimate(self, sample: Sequence[Passage], total: int) -> Estimate:
        from rex_rag.retrieval.dense.estimate import estimate_dense
        from rex_rag.retrieval.dense.faiss_index import check_lists
        from rex_rag.retrieval.dense.flat_file import import_faiss

        # What would stop the build once all is encoded, hours later, stops it here.
        if self._arguments.qdrant_url:
            from rex_rag.retrieval.dense.qdrant_calls import check_reachable

            check_reachable(self._arguments.qdrant_url, self._arguments.qdrant_collection)
        else:
            import_faiss()
        check_lists(self._options(), total)
        return estimate_dense(sample, total, self._encoder, self._options())

    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from rex_rag.retrieval.dense.checkpoints import LOCAL, public_name
        from rex_rag.retrieval.dense.encode_corpus import encode_corpus, write_check_vectors
        from rex_rag.retrieval.dense.faiss_index import build_faiss_index

        options = self._options()
        with self._encoder as encoder:
            vectors = encode_corpus(passages, encoder, work / "vectors", dtype=options.dtype)
        spec = encoder.spec
        described = asdict(spec) | {"name": public_name(spec.name, spec.revision)}
        write_check_vectors(vectors, directory)
        if spec.revision.startswith(LOCAL):
            with written_whole(directory / ENCODER_FOLDER_FILE) as file:
                file.write(f"{encoder.folder.resolve()}\n".encode())
        if self._arguments.qdrant_url:
            from rex_rag.retrieval.dense.qdrant_calls import connect_qdrant
            from rex_rag.retrieval.dense.qdrant_load import QdrantOptions, load_qdrant

            graph = {"hnsw_m": self._arguments.hnsw_m, "hnsw_ef_construct": self._arguments.ef_construction}
            load_qdrant(
                _numbered(vectors),
                connect_qdrant(self._arguments.qdrant_url),
                self._arguments.qdrant_collection,
                len(passages),
                encoder.dimension,
                _qdrant_fingerprint(corpus_sha256, described),
                QdrantOptions(**{name: value for name, value in graph.items() if value is not None}),
            )
            place = {"url": self._arguments.qdrant_url, "collection": self._arguments.qdrant_collection}
            return described, {"type": "qdrant", **place}
        # A build that was killed while hashing finds the index finished.
        if not (directory / VECTORS_FILE).exists():
            build_faiss_index(vectors, directory / VECTORS_FILE, options)
        if self._arguments.index == "qdrant":
            return described, {"type": "qdrant", "url": None}
        return described, {"type": self._arguments.index, "faiss": asdict(options)}


def _encoding_devices(wanted: IndexArguments) -> list[str] | None:
    """The devices asked for, or as many processes on the CPU; None leaves the choice to the encoder."""
    if wanted.devices or not wanted.workers:
        return wanted.devices or None
    import torch

    if torch.cuda.device_count():
        raise RetrievalError(
            f"workers={wanted.workers} is for encoding on the CPU, and this machine has GPUs, one process each: drop "
            f"workers, or say --devices{' cpu' * wanted.workers}"
        )
    return ["cpu"] * wanted.workers


def index_kind(arguments: IndexArguments) -> IndexKind:
    """The kind of index that the arguments ask for."""
    return BM25Kind(arguments) if arguments.kind == "bm25" else DenseKind(arguments)


def open_index(
    directory: Path, options: SearchOptions | None = None, corpus: Sequence[str | Path] = ()
) -> IndexedRetriever:
    """Open an index directory for searching, once manifest, files and encoder have been checked.

    corpus: files that the index must have been built from; none: whatever it was built from.

    Raises:
        RetrievalError: for a directory that is no index or damaged, another corpus or encoder, and options that the
            index does not take.
    """
    options = options or SearchOptions()
    manifest = Manifest.read(directory)
    if corpus:
        from rex_rag.data.corpus import corpus_files
        from rex_rag.retrieval.index.passage_writer import scan_corpus

        manifest.check_corpus([asdict(file) for file in scan_corpus(corpus_files(corpus))], directory)
    passages = PassageStore(directory)
    if len(passages) != manifest.passages:
        raise RetrievalError(
            f"{directory} holds {counted(len(passages), 'passage')}, its manifest says {manifest.passages:,}; "
            "build it again"
        )
    _check_options(manifest, options, directory)
    name = f"over {counted(len(passages), 'passage')} (index {directory.resolve().name}, {manifest.fingerprint})"
    if manifest.kind == "bm25":
        from rex_rag.retrieval.bm25.retriever import BM25Retriever

        return BM25Retriever.load(directory / BM25_FOLDER, passages, description=f"BM25 {name}")
    return _open_dense(directory, manifest, passages, options, name)


def _open_dense(
    directory: Path, manifest: Manifest, passages: PassageStore, options: SearchOptions, name: str
) -> IndexedRetriever:
    from rex_rag.retrieval.dense.checkpoints import short_name
    from rex_rag.retrieval.dense.encode_corpus import read_check_vectors
    from rex_rag.retrieval.dense.encoder import Encoder, check_encoder, spec_from_dict
    from rex_rag.retrieval.dense.retriever import DenseRetriever

    spec = spec_from_dict(manifest.encoder)
    # Queries take one device; the CPU unless told otherwise, since the GPUs of this machine may be training.
    encoder = Encoder(
        spec, list(options.devices[:1]) or ["cpu"], location=options.encoder or _encoder_folder(directory, spec)
    )
    check_encoder(encoder, *read_check_vectors(directory, passages))
    index = _open_vectors(directory, manifest, len(passages), encoder.dimension, options)
    short = short_name(spec.name, spec.revision)
    return DenseRetriever(encoder, index, passages, description=f"{short}, {index.description} {name}")


def _encoder_folder(directory: Path, spec: EncoderSpec) -> str | None:
    """Where a local encoder lies on this machine; None for one from the Hub."""
    from rex_rag.retrieval.dense.checkpoints import LOCAL

    if not spec.revision.startswith(LOCAL):
        return None
    note = directory / ENCODER_FOLDER_FILE
    # Without the note: an index of an earlier version, whose manifest holds the path, or one that was published.
    folder = note.read_text(encoding="utf-8").strip() if note.is_file() else spec.name
    if not Path(folder).expanduser().is_dir():
        raise RetrievalError(
            f"{directory} was built with a local encoder, {spec.name} ({spec.revision}), and there is no folder "
            f"{folder!r} here; say where it lies: retriever_encoder"
        )
    return folder


def _open_vectors(
    directory: Path, manifest: Manifest, rows: int, dimension: int, options: SearchOptions
) -> VectorIndex:
    kind = manifest.index["type"]
    if kind == "qdrant":
        from rex_rag.retrieval.dense.flat_file import map_flat
        from rex_rag.retrieval.dense.qdrant_index import QdrantIndex

        fingerprint = _qdrant_fingerprint(manifest.corpus_sha256, manifest.encoder)
        if manifest.index["url"] is None:
            return QdrantIndex.embedded([(0, map_flat(directory / VECTORS_FILE))], rows, dimension, fingerprint)
        settings = {} if options.ef_search is None else {"ef": options.ef_search}
        place = manifest.index["url"], manifest.index["collection"]
        return QdrantIndex.connect(*place, rows, dimension, fingerprint, **settings)
    engine = _engine(kind, options)
    if engine == "torch":
        from rex_rag.retrieval.dense.torch_index import TorchFlatIndex

        return TorchFlatIndex.load(directory / VECTORS_FILE, devices=list(options.devices) or ["cpu"])
    from rex_rag.retrieval.dense.faiss_index import FaissIndex, FaissOptions

    changed = {"nprobe": options.nprobe, "ef_search": options.ef_search}
    built_with = FaissOptions(**manifest.index["faiss"] | {k: v for k, v in changed.items() if v is not None})
    return FaissIndex(directory / VECTORS_FILE, built_with, _gpus(options) if engine == "faiss-gpu" else None)


def _engine(kind: str, options: SearchOptions) -> str:
    """What searches an index of vectors: as asked for, or the fastest that the devices allow."""
    if options.engine != "auto":
        return options.engine
    if kind not in FLAT or not any(device.startswith("cuda") for device in options.devices):
        return "faiss"
    import faiss

    return "faiss-gpu" if getattr(faiss, "get_num_gpus", lambda: 0)() else "torch"


def _check_options(manifest: Manifest, options: SearchOptions, directory: Path) -> None:
    kind = manifest.index["type"]
    what = f"{directory} is a {kind} index"
    if options.engine not in ("auto", "faiss") and kind not in FLAT:
        raise RetrievalError(
            f"{what}, which only its own engine searches, not {options.engine}; leave retriever_engine at auto, or "
            f"build with --index {' or '.join(FLAT)}"
        )
    if options.nprobe is not None and kind != "ivf":
        raise RetrievalError(f"{what} and has no lists to probe; leave retriever_nprobe={options.nprobe} out")
    if options.ef_search is not None and kind not in ("hnsw", "qdrant"):
        raise RetrievalError(f"{what} and has no graph; leave retriever_ef_search={options.ef_search} out")
    if options.encoder is not None and manifest.kind == "bm25":
        raise RetrievalError(f"{what} and has no encoder; leave retriever_encoder={options.encoder!r} out")


def _gpus(options: SearchOptions) -> list[int]:
    numbers = [device.partition(":")[2] for device in options.devices if device.startswith("cuda")]
    return [int(number or 0) for number in numbers] or [0]


def _numbered(vectors) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for shard in vectors:
        yield start, shard
        start += len(shard)


def _qdrant_fingerprint(corpus_sha256: str, encoder: dict[str, Any]) -> dict[str, Any]:
    # Where a checkpoint lies is no part of what it is; its revision is.
    return {"corpus_sha256": corpus_sha256, "encoder": {k: v for k, v in encoder.items() if k != "name"}}
