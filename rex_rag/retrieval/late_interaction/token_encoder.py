"""Encoders that make one vector a token (ColBERT, arXiv 2004.12832), through sentence-transformers' class for them.

It reads what sentence-transformers, PyLate and Stanford's ColBERT save, and does as the checkpoint says: markers
before queries and passages, queries filled up with mask tokens that count, punctuation of passages left out, a
projection, vectors of length 1. A checkpoint that was trained for one vector a text gives its token vectors as they
are. (PyLate 1.6 pins sentence-transformers 5.3, with which nothing else here works.)

Invariant: a `TokenEncoderSpec` taken from a `TokenEncoder` determines its vectors up to rounding. An index stores it
and is only searched with an equal one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.checkpoints import Checkpoint, loading, pinned_checkpoint
from rex_rag.retrieval.dense.encoder import (
    DEFAULT_BATCH_SIZE,
    EXTRA,
    MIN_CHECK_COSINE,
    check_passage_format,
    text_of_passage,
    torch_dtype,
)
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenEncoderSpec:
    """An encoder in all that its vectors depend on; the checkpoint, named by its revision, says the rest.

    Fields that are `None` are left to the checkpoint; `TokenEncoder.spec` has all of them filled in.

    Raises:
        RetrievalError: for an unknown passage format, and for a number below 1.
    """

    name: str  # Hub repository, or local folder; in a manifest the folder's name without its path
    revision: str | None = None  # Hub commit, or "sha256:..." over a local folder's weights and configuration
    passage_format: str = "contents"
    max_tokens: int | None = None  # of a passage; the rest of it is not read
    dimension: int | None = None

    def __post_init__(self) -> None:
        check_passage_format(self.passage_format)
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise RetrievalError(
                f"the encoder's max_tokens is {self.max_tokens!r}; it must be an integer of at least 1"
            )

    def passage_text(self, passage: Passage) -> str:
        """What of a passage is encoded; a passage without a title is its text alone."""
        return text_of_passage(passage, self.passage_format)


class TokenEncoder:
    """Encodes texts with the checkpoint that `spec` names. Safe to share between threads.

    Args:
        spec: what to load; where it is filled in, the checkpoint must agree.
        device: a torch device; by default a GPU if there is one.
        batch_size: texts a forward pass, >= 1.
        dtype: torch dtype by name; by default float16 on GPUs and float32 elsewhere.
        location: folder that holds the checkpoint where `spec.name` does not lead to it on this machine.

    Raises:
        RetrievalError: for a checkpoint that is absent, unsafe to load, or not what `spec` says.
    """

    def __init__(
        self,
        spec: TokenEncoderSpec,
        device: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        dtype: str | None = None,
        location: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise RetrievalError(f"batch_size={batch_size} encodes nothing; use 1 or more")
        checkpoint = pinned_checkpoint(spec.name, spec.revision, location)
        import torch

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.devices = [self.device]
        self.batch_size = batch_size
        self.dtype = dtype or ("float16" if self.device.startswith("cuda") else "float32")
        self.folder = checkpoint.folder
        self._model = _load_model(checkpoint, self.device, self.dtype)
        self.spec = self._completed(spec, checkpoint)
        # Fast tokenizers keep padding and truncation as state and refuse to be borrowed twice.
        self._lock = threading.Lock()

    @property
    def dimension(self) -> int:
        assert self.spec.dimension is not None  # completed when it was opened
        return self.spec.dimension

    @property
    def weight_bytes(self) -> int:
        """What the weights take on the device."""
        return sum(weight.numel() * weight.element_size() for weight in self._model.parameters())

    def encode_queries(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return for each of n queries (its tokens, dimension) float32.

        Raises:
            RetrievalError: for vectors that are not finite, a text without any, and when a batch does not fit into the
                device's memory.
        """
        return self._encode(list(texts), self._model.encode_query)

    def encode_passages(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for texts made by `TokenEncoderSpec.passage_text`."""
        return self._encode(list(texts), self._model.encode_document)

    def measure(self, texts: Sequence[str], seconds: float = 5.0) -> tuple[float, float]:
        """Passages a second, and vectors a passage, from encoding texts until they or the seconds run out."""
        batches = [list(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)]
        self.encode_passages(batches[0])
        done, vectors, start = 0, 0, time.perf_counter()
        for batch in batches:
            vectors += sum(map(len, self.encode_passages(batch)))
            done += len(batch)
            if time.perf_counter() - start > seconds:
                break
        return done / (time.perf_counter() - start), vectors / done

    def _encode(self, texts: list[str], encode: Any) -> list[np.ndarray]:
        import numpy as np
        import torch

        if not texts:
            return []
        try:
            with self._lock:
                found = encode(texts, batch_size=self.batch_size, show_progress_bar=False)
        except torch.OutOfMemoryError as error:
            raise RetrievalError(
                f"batch_size={self.batch_size} texts at once do not fit into the memory of {self.device}; lower "
                "batch_size, which is the texts a forward pass, or max_tokens, or free the device"
            ) from error
        vectors = [tokens.float().cpu().numpy() for tokens in found]
        for text, tokens in zip(texts, vectors, strict=True):
            if not len(tokens) or not np.isfinite(tokens).all():
                what = "numbers that are not finite; use dtype=bfloat16 or float32" if len(tokens) else "no vector"
                raise RetrievalError(f"{self.spec.name} in {self.dtype} encodes {text[:80]!r} as {what}")
        return vectors

    def _completed(self, spec: TokenEncoderSpec, checkpoint: Checkpoint) -> TokenEncoderSpec:
        """`spec` with everything filled in that it left to the checkpoint, after checking that the two agree."""
        reader = self._model[0]
        longest = int(reader.document_length or self._model.max_seq_length)
        if spec.max_tokens is not None and spec.max_tokens > self._model.max_seq_length:
            raise RetrievalError(
                f"max_tokens={spec.max_tokens} is more than the {self._model.max_seq_length} tokens that {spec.name} "
                "reads; lower it"
            )
        if spec.max_tokens is not None:
            reader.document_length = longest = spec.max_tokens
        dimension = self._model.get_embedding_dimension()
        if spec.dimension is not None and spec.dimension != dimension:
            raise RetrievalError(
                f"the encoder {spec.name} has the dimension {dimension}, not {spec.dimension}: name the checkpoint "
                "that has it"
            )
        return replace(spec, revision=checkpoint.revision, max_tokens=longest, dimension=dimension)


def check_token_encoder(
    encoder: TokenEncoder, passages: Sequence[Passage], stored: Sequence[np.ndarray], place: Path
) -> float:
    """Encode some passages again and compare with what the index holds; returns the lowest cosine of two vectors.

    stored: (tokens, dimension) of each passage. place: the file that holds them, for the message.

    Raises:
        RetrievalError: for another number of vectors, and for a cosine below `MIN_CHECK_COSINE`.
    """
    import numpy as np

    fresh = encoder.encode_passages([encoder.spec.passage_text(passage) for passage in passages])
    worst = 1.0
    for passage, new, old in zip(passages, fresh, stored, strict=True):
        same = new.shape == old.shape
        cosine = -1.0
        if same:
            norms = np.linalg.norm(new, axis=1) * np.linalg.norm(old.astype(np.float32), axis=1)
            cosine = float(((new * old).sum(axis=1) / np.maximum(norms, 1e-30)).min())
        if not cosine >= MIN_CHECK_COSINE:
            found = (
                f"cosines down to {cosine:.4f}, and {MIN_CHECK_COSINE} is the least" if same else f"{len(new)} vectors"
            )
            raise RetrievalError(
                f"the encoder {encoder.spec.name} (revision {encoder.spec.revision}) does not reproduce the "
                f"{len(old)} vectors of passage {passage.id!r} in {place}: {found}; load the encoder that built the "
                "index, or build it again"
            )
        worst = min(worst, cosine)
    return worst


def _load_model(checkpoint: Checkpoint, device: str, dtype: str):
    try:
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    except ImportError as error:
        raise RetrievalError(f"late interaction needs sentence-transformers 6.2 or newer: {EXTRA}") from error
    kind = torch_dtype(dtype)
    shared: dict[str, Any] = {
        "device": device,
        "trust_remote_code": False,
        "local_files_only": True,
        "model_kwargs": {"use_safetensors": True, "dtype": kind},
    }
    with loading(checkpoint, device):
        if checkpoint.makes_token_vectors:
            return MultiVectorEncoder(str(checkpoint.folder), **shared).to(kind)
        # Left to itself, the library would put a projection of random weights behind it.
        reader = SentenceTransformer(str(checkpoint.folder), **shared)[0]
        if not isinstance(reader, Transformer):
            raise ValueError(f"a {type(reader).__name__} has no token vectors")
        modules = [reader, MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
        model = MultiVectorEncoder(modules=modules, device=device).to(kind)
    logger.warning(
        "%s was trained for one vector a text; its token vectors are compared as they are, without a projection, "
        "markers or query expansion",
        checkpoint.folder,
    )
    return model
