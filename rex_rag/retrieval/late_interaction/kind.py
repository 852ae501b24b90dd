"""The index kind `late_interaction`: one vector a token, searched by MaxSim (ColBERT, PyLate)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.kind import encoder_folder, local_identity, note_encoder_folder
from rex_rag.retrieval.estimate import Estimate, human_bytes
from rex_rag.retrieval.index_kind import IndexKind, SearchOptions
from rex_rag.types import Passage

if TYPE_CHECKING:
    from rex_rag.retrieval.index.arguments import IndexArguments
    from rex_rag.retrieval.late_interaction.retriever import LateInteractionRetriever
    from rex_rag.retrieval.late_interaction.token_encoder import TokenEncoder
    from rex_rag.retrieval.manifest import Manifest
    from rex_rag.retrieval.passages import PassageStore

# A scan reads all vectors for every batch of queries: 64 GB of 128 dimensions, about two million passages.
MOST_VECTORS = 250_000_000
_IDENTITY = ("kind", "model", "revision", "passage_format", "max_tokens", "dtype", "batch_size")


class LateInteractionKind(IndexKind):
    name = "late_interaction"
    settings = ("model", "revision", "passage_format", "max_tokens", "dtype", "devices")
    _loaded: TokenEncoder | None = None

    @staticmethod
    def problems(arguments: IndexArguments) -> Iterator[str]:
        if not arguments.model:
            yield "kind='late_interaction' needs an encoder; set model, for example colbert-ir/colbertv2.0"
        if len(arguments.devices) > 1:
            yield f"devices={arguments.devices}: late_interaction encodes on one device; name one"
        if arguments.index != "flat":
            yield f"index={arguments.index!r} is for kind='dense'; late_interaction has an exact scan alone: drop it"

    @staticmethod
    def identity(arguments: IndexArguments) -> dict[str, Any]:
        """Of a local encoder its content, wherever it lies."""
        values = {name: getattr(arguments, name) for name in _IDENTITY}
        return values | local_identity(arguments.model)

    @staticmethod
    def options(manifest: Manifest) -> tuple[str, ...]:
        return ("encoder",)

    @property
    def _encoder(self) -> TokenEncoder:
        if self._loaded is None:
            from rex_rag.retrieval.late_interaction.token_encoder import TokenEncoder, TokenEncoderSpec

            wanted = self.arguments
            layout: dict[str, Any] = {} if wanted.passage_format is None else {"passage_format": wanted.passage_format}
            spec = TokenEncoderSpec(wanted.model, wanted.revision, max_tokens=wanted.max_tokens, **layout)
            device = wanted.devices[0] if wanted.devices else None
            self._loaded = TokenEncoder(spec, device, wanted.batch_size, wanted.dtype)
        return self._loaded

    def estimate(self, sample: Sequence[Passage], total: int) -> Estimate:
        from rex_rag.retrieval.late_interaction.token_vectors import SHARD_ROWS

        encoder = self._encoder
        rate, each = encoder.measure([encoder.spec.passage_text(passage) for passage in sample])
        vectors = int(total * each)
        size = vectors * encoder.dimension * 2
        if vectors > MOST_VECTORS:
            raise RetrievalError(
                f"{total:,} passages of {each:.0f} tokens are {vectors:,} vectors ({human_bytes(size)}), and a search "
                f"scans all of them, so that {MOST_VECTORS:,} are the most; build a dense index and re-rank what it "
                "finds (rerank_model), lower max_tokens, or take a smaller corpus"
            )
        return Estimate(
            # A shard in single and in half precision.
            peak_ram=encoder.weight_bytes + int(min(SHARD_ROWS, total) * each * encoder.dimension * 8),
            serving_ram=encoder.weight_bytes + size,
            work_disk=size,
            final_disk=size + 8 * (total + 1),
            seconds=total / rate,
            notes=(f"encoding at {rate:,.0f} passages a second, {each:.0f} vectors of {encoder.dimension} each",),
        )

    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from rex_rag.retrieval.dense.checkpoints import public_name
        from rex_rag.retrieval.late_interaction.token_vectors import encode_tokens, write_token_vectors

        encoder = self._encoder
        vectors = write_token_vectors(encode_tokens(passages, encoder, work / "tokens"), directory)
        spec = encoder.spec
        note_encoder_folder(directory, encoder.folder, spec.revision)
        described = asdict(spec) | {"name": public_name(spec.name, spec.revision)}
        return described, {"type": "maxsim", "dtype": "float16", "vectors": vectors}

    @staticmethod
    def open(
        directory: Path, manifest: Manifest, passages: PassageStore, options: SearchOptions, name: str
    ) -> LateInteractionRetriever:
        from rex_rag.retrieval.dense.checkpoints import short_name
        from rex_rag.retrieval.dense.encode_corpus import check_rows
        from rex_rag.retrieval.late_interaction.maxsim import MaxSimIndex
        from rex_rag.retrieval.late_interaction.retriever import LateInteractionRetriever
        from rex_rag.retrieval.late_interaction.token_encoder import (
            TokenEncoder,
            TokenEncoderSpec,
            check_token_encoder,
        )
        from rex_rag.retrieval.late_interaction.token_vectors import TOKENS_FILE, map_token_vectors

        spec = TokenEncoderSpec(**manifest.encoder)
        # As for a dense index: the CPU unless told otherwise, since the GPUs of this machine may be training.
        device = options.devices[0] if options.devices else "cpu"
        location = options.encoder or encoder_folder(directory, spec.name, spec.revision)
        encoder = TokenEncoder(spec, device, location=location)
        vectors, offsets = map_token_vectors(directory, len(passages), encoder.dimension)
        rows = check_rows(len(passages))
        stored = [vectors[offsets[row] : offsets[row + 1]] for row in rows]
        check_token_encoder(encoder, [passages[row] for row in rows], stored, directory / TOKENS_FILE)
        index = MaxSimIndex(vectors, offsets, device)
        description = f"{short_name(spec.name, spec.revision)}, {index.description} {name}"
        return LateInteractionRetriever(encoder, index, passages, description)
