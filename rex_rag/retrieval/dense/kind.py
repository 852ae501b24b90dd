"""The index kind `dense`: vectors of an encoder, in FAISS or Qdrant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.index_kind import IndexKind, SearchOptions
from rex_rag.retrieval.manifest import ENCODER_FOLDER_FILE
from rex_rag.support.durable import written_whole
from rex_rag.support.wording import shorten
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

    from rex_rag.retrieval.dense.encoder import Encoder
    from rex_rag.retrieval.dense.faiss_index import FaissOptions
    from rex_rag.retrieval.dense.retriever import DenseRetriever
    from rex_rag.retrieval.dense.vector_index import VectorIndex
    from rex_rag.retrieval.estimate import Estimate
    from rex_rag.retrieval.index.arguments import IndexArguments
    from rex_rag.retrieval.manifest import Manifest
    from rex_rag.retrieval.passages import PassageStore

VECTORS_FILE = "index.faiss"
FLAT = ("flat", "flat-fp16")
# What only some types of dense index have.
_TYPES_OF = {
    "nlist": ("ivf",),
    "nprobe": ("ivf",),
    "hnsw_m": ("hnsw", "qdrant"),
    "ef_construction": ("hnsw", "qdrant"),
    "ef_search": ("hnsw",),
    "build_threads": ("hnsw",),
    "qdrant_url": ("qdrant",),
    "qdrant_collection": ("qdrant",),
}
# Which of the options of a search, and of what type.
_OPTIONS_OF = {"nprobe": ("ivf",), "ef_search": ("hnsw", "qdrant"), "engine": (*FLAT, "ivf", "hnsw")}
# Arguments that say where and how fast to work, and so leave the index what it is; and another kind's.
_NOT_IDENTITY = ("corpus", "output", "workers", "devices", "qdrant_url", "stemmer", "stopwords")


class DenseKind(IndexKind):
    name = "dense"
    settings = (
        *("model", "revision", "encoder_family", "query_prefix", "passage_prefix", "passage_format", "pooling"),
        *("normalize", "max_tokens", "dtype", "devices", "workers", *_TYPES_OF),
    )
    _loaded: Encoder | None = None

    @staticmethod
    def problems(arguments: IndexArguments) -> Iterator[str]:
        if not arguments.model:
            yield "kind='dense' needs an encoder; set model, for example intfloat/e5-base-v2"
        for name, types in _TYPES_OF.items():
            if getattr(arguments, name) is not None and arguments.index not in types:
                yield (
                    f"{name}={getattr(arguments, name)!r} is for index={' or '.join(map(repr, types))}, but index is "
                    f"{arguments.index!r}"
                )
        if arguments.qdrant_url and not arguments.qdrant_collection:
            yield f"qdrant_url={arguments.qdrant_url!r} needs qdrant_collection, the name to load the passages under"
        if arguments.workers and arguments.devices:
            yield (
                f"workers={arguments.workers} and devices={arguments.devices} both say how many processes encode; "
                "name a device as often as it is to work, or drop one of the two"
            )

    @staticmethod
    def identity(arguments: IndexArguments) -> dict[str, Any]:
        """Of a local encoder its content, wherever it lies."""
        values = {name: value for name, value in asdict(arguments).items() if name not in _NOT_IDENTITY}
        return values | local_identity(arguments.model)

    @staticmethod
    def options(manifest: Manifest) -> tuple[str, ...]:
        return ("encoder", *(name for name, types in _OPTIONS_OF.items() if manifest.index["type"] in types))

    @property
    def _encoder(self) -> Encoder:
        if self._loaded is None:
            from rex_rag.retrieval.dense.encoder import Encoder
            from rex_rag.retrieval.dense.families import resolve_encoder

            wanted = self.arguments
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

    @property
    def _options(self) -> FaissOptions:
        from rex_rag.retrieval.dense.faiss_index import FaissOptions

        wanted = self.arguments
        given: dict[str, Any] = {
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
        if self.arguments.qdrant_url:
            from rex_rag.retrieval.dense.qdrant_calls import check_reachable

            check_reachable(self.arguments.qdrant_url, self.arguments.qdrant_collection)
        else:
            import_faiss()
        check_lists(self._options, total)
        return estimate_dense(sample, total, self._encoder, self._options)

    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from rex_rag.retrieval.dense.checkpoints import public_name
        from rex_rag.retrieval.dense.encode_corpus import encode_corpus, write_check_vectors
        from rex_rag.retrieval.dense.faiss_index import build_faiss_index

        options = self._options
        with self._encoder as encoder:
            vectors = encode_corpus(passages, encoder, work / "vectors", dtype=options.dtype)
        spec = encoder.spec
        described = asdict(spec) | {"name": public_name(spec.name, spec.revision)}
        write_check_vectors(vectors, directory)
        note_encoder_folder(directory, encoder.folder, spec.revision)
        if self.arguments.qdrant_url:
            from rex_rag.retrieval.dense.qdrant_calls import connect_qdrant
            from rex_rag.retrieval.dense.qdrant_load import QdrantOptions, load_qdrant

            graph: dict[str, Any] = {
                "hnsw_m": self.arguments.hnsw_m,
                "hnsw_ef_construct": self.arguments.ef_construction,
            }
            load_qdrant(
                _numbered(vectors),
                connect_qdrant(self.arguments.qdrant_url),
                self.arguments.qdrant_collection,
                len(passages),
                encoder.dimension,
                _qdrant_fingerprint(corpus_sha256, described),
                QdrantOptions(**{name: value for name, value in graph.items() if value is not None}),
            )
            place = {"url": self.arguments.qdrant_url, "collection": self.arguments.qdrant_collection}
            return described, {"type": "qdrant", **place}
        # A build that was killed while hashing finds the index finished.
        if not (directory / VECTORS_FILE).exists():
            build_faiss_index(vectors, directory / VECTORS_FILE, options)
        if self.arguments.index == "qdrant":
            return described, {"type": "qdrant", "url": None}
        return described, {"type": self.arguments.index, "faiss": asdict(options)}

    @staticmethod
    def open(
        directory: Path, manifest: Manifest, passages: PassageStore, options: SearchOptions, name: str
    ) -> DenseRetriever:
        from rex_rag.retrieval.dense.checkpoints import short_name
        from rex_rag.retrieval.dense.encode_corpus import read_check_vectors
        from rex_rag.retrieval.dense.encoder import Encoder, check_encoder, spec_from_dict
        from rex_rag.retrieval.dense.retriever import DenseRetriever

        spec = spec_from_dict(manifest.encoder)
        # Queries take one device; the CPU unless told otherwise, since the GPUs of this machine may be training.
        devices = list(options.devices[:1]) or ["cpu"]
        location = options.encoder or encoder_folder(directory, spec.name, spec.revision)
        try:
            encoder = Encoder(spec, devices, location=location)
        except RetrievalError as error:
            if location is None or options.encoder:
                raise
            note = directory / ENCODER_FOLDER_FILE
            raise RetrievalError(f"{error} (it was looked for where {note} says; else: retriever_encoder)") from error
        check_encoder(encoder, *read_check_vectors(directory, passages))
        index = _open_vectors(directory, manifest, len(passages), encoder.dimension, options)
        short = short_name(spec.name, spec.revision)
        return DenseRetriever(encoder, index, passages, description=f"{short}, {index.description} {name}")


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


def local_identity(model: str) -> dict[str, str]:
    """What stands for a local encoder among the arguments of an index; nothing for one from the Hub."""
    if not Path(model).expanduser().is_dir():
        return {}
    from rex_rag.retrieval.dense.checkpoints import find_checkpoint, public_name

    revision = find_checkpoint(model).revision
    return {"model": public_name(model, revision), "revision": revision}


def note_encoder_folder(directory: Path, folder: Path, revision: str) -> None:
    """Keep beside an index where its local encoder lies on this machine."""
    from rex_rag.retrieval.dense.checkpoints import LOCAL

    if revision.startswith(LOCAL):
        with written_whole(directory / ENCODER_FOLDER_FILE) as file:
            file.write(f"{folder.resolve()}\n".encode())


def encoder_folder(directory: Path, name: str, revision: str) -> str | None:
    """Where the local encoder of an index lies on this machine; None for one from the Hub."""
    from rex_rag.retrieval.dense.checkpoints import LOCAL

    if not revision.startswith(LOCAL):
        return None
    note = directory / ENCODER_FOLDER_FILE
    # Without the note: an index of an earlier version, whose manifest holds the path, or one that was published.
    folder = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else name
    if not folder or not Path(folder).is_dir():
        raise RetrievalError(
            f"{directory} was built with a local encoder, {name} ({revision}), and there is no folder "
            f"{shorten(folder)} here, as {note} has it; say where it lies: retriever_encoder"
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
        settings: dict[str, Any] = {} if options.ef_search is None else {"ef": options.ef_search}
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
