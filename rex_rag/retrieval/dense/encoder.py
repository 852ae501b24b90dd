"""Text encoders through sentence-transformers: what exactly turns queries and passages into vectors, and doing it.

Invariant: an `EncoderSpec` taken from an `Encoder` determines its vectors up to rounding: weights by their revision,
prefixes, passage layout, pooling, normalisation and length. An index stores it and is only
searched with an equal one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.data.corpus import join_contents
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.checkpoints import Checkpoint, loading, pinned_checkpoint
from rex_rag.support.wording import counted
from rex_rag.types import Passage

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    import numpy as np

logger = logging.getLogger(__name__)

EXTRA = 'pip install "rex-rag[retrieval]"'
# Batches are cut from chunks of this many texts, so that a text's batch (and with it the last bit of its vector)
# depends neither on the number of workers nor on where a build was interrupted.
CHUNK_ROWS = 1024
DEFAULT_BATCH_SIZE = 64
# Rounding in half precision and other batch mates move a vector by far less; another prefix, pooling or checkpoint by
# more: MiniLM with "query: " before its passages has cosines of 0.85 to 0.98 with its own.
MIN_CHECK_COSINE = 0.999
# What is encoded is text and perhaps a title. "contents" is how Search-R1 and FlashRAG feed E5 (title in quotes on the
# first line); Contriever was trained on title, blank, text.
PASSAGE_FORMATS: dict[str, Callable[[Passage], str]] = {
    "contents": join_contents,
    "lines": lambda passage: f"{passage.title}\n{passage.text}",
    "blank": lambda passage: f"{passage.title} {passage.text}",
}
_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder in all that its vectors depend on. Plain data: `dataclasses.asdict` and back by `EncoderSpec(**row)`.

    Fields that are `None` are left to the checkpoint; `Encoder.spec` has all of them filled in.

    Raises:
        RetrievalError: for an unknown passage format, and for numbers below 1.
    """

    name: str  # Hub repository, or local folder; in a manifest the folder's name without its path
    revision: str | None = None  # Hub commit, or "sha256:..." over a local folder's weights and configuration
    query_prefix: str = ""
    passage_prefix: str = ""
    passage_format: str = "contents"
    pooling: str | None = None  # sentence-transformers' name of it: "mean", "cls", "lasttoken"; "" for models without
    normalize: bool | None = None  # vectors of length 1
    max_tokens: int | None = None
    dimension: int | None = None

    def __post_init__(self) -> None:
        check_passage_format(self.passage_format)
        for name in ("max_tokens", "dimension"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RetrievalError(f"the encoder's {name} is {value!r}; it must be an integer of at least 1")

    def passage_text(self, passage: Passage) -> str:
        """What of a passage is encoded, without the prefix; a passage without a title is its text alone."""
        return text_of_passage(passage, self.passage_format)


def check_passage_format(name: str) -> None:
    """Raise `RetrievalError` for a layout that is not one of `PASSAGE_FORMATS`."""
    if name not in PASSAGE_FORMATS:
        raise RetrievalError(f"there is no passage format {name!r}; choose one of {', '.join(PASSAGE_FORMATS)}")


def text_of_passage(passage: Passage, layout: str) -> str:
    """What of a passage is encoded, in one of `PASSAGE_FORMATS`; one without a title is its text alone."""
    return PASSAGE_FORMATS[layout](passage) if passage.title.strip() else passage.text


class Encoder:
    """Encodes texts with the checkpoint that `spec` names. Safe to share between threads; `close()` ends its workers.

    Prefixes are applied here alone: the prompts that a checkpoint's own configuration may hold are switched off.

    Args:
        spec: what to load; where it is filled in, the checkpoint must agree.
        devices: torch devices; by default all GPUs, or the CPU. Queries are encoded on the first, in this process;
            passages on all, one worker process each where there are several ("cpu" may be named more than once).
        batch_size: texts a forward pass, >= 1.
        dtype: torch dtype by name; by default float16 on GPUs and float32 elsewhere.
        location: folder that holds the checkpoint where `spec.name` does not lead to it on this machine.

    Raises:
        RetrievalError: for a checkpoint that is absent, unsafe to load, or not what `spec` says.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        devices: Sequence[str] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        dtype: str | None = None,
        location: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise RetrievalError(f"batch_size={batch_size} encodes nothing; use 1 or more")
        checkpoint = pinned_checkpoint(spec.name, spec.revision, location)
        self.devices = [str(device) for device in devices] if devices else _all_devices()
        self.batch_size = batch_size
        self.dtype = dtype or ("float16" if self.devices[0].startswith("cuda") else "float32")
        self.folder = checkpoint.folder
        self._model = _load_model(checkpoint, spec, self.devices[0], self.dtype)
        self.spec = _completed(spec, checkpoint, self._model)
        # Fast tokenizers keep padding and truncation as state and refuse to be borrowed twice.
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    @property
    def dimension(self) -> int:
        assert self.spec.dimension is not None  # filled in from the checkpoint
        return self.spec.dimension

    @property
    def weight_bytes(self) -> int:
        """What the weights take on each device."""
        return sum(weight.numel() * weight.element_size() for weight in self._model.parameters())

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, dimension) float32 for n queries without prefix.

        Raises:
            RetrievalError: for vectors that are not finite, and when a batch does not fit into the device's memory.
        """
        return self._encode(list(texts), self.spec.query_prefix)

    def encode_passages(self, texts: Sequence[str], advance: Callable[[int], Any] = lambda count: None) -> np.ndarray:
        """Return (n, dimension) float32 for n texts made by `EncoderSpec.passage_text`.

        `advance` is called with the number of texts done since its last call.

        Raises:
            RetrievalError: for vectors that are not finite, a batch that does not fit into the device's memory, and
                when a worker process dies.
        """
        import numpy as np

        chunks = [list(texts[start : start + CHUNK_ROWS]) for start in range(0, len(texts), CHUNK_ROWS)]
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        try:
            if len(self.devices) == 1:
                results = (self._encode(chunk, self.spec.passage_prefix) for chunk in chunks)
            else:
                results = self._workers().map(_encode_in_worker, chunks)
            for number, result in enumerate(results):
                vectors[number * CHUNK_ROWS : number * CHUNK_ROWS + len(result)] = result
                advance(len(result))
        except BrokenProcessPool as error:
            self.close()
            raise RetrievalError(
                f"one of {len(self.devices)} encoding processes ({', '.join(self.devices)}) died, for want of memory "
                "or for what it wrote before this; lower batch_size or name fewer devices, and start again"
            ) from error
        return vectors

    def measure_rate(self, texts: Sequence[str], seconds: float = 5.0) -> float:
        """Passages a second on all devices, from encoding texts on the first until they or the seconds run out."""
        batches = [list(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)]
        self._encode(batches[0], self.spec.passage_prefix)
        done, start = 0, time.perf_counter()
        for batch in batches:
            self._encode(batch, self.spec.passage_prefix)
            done += len(batch)
            if time.perf_counter() - start > seconds:
                break
        # Processes on one CPU share its cores, which one of them uses already.
        devices = 1 if self.devices[0] == "cpu" else len(set(self.devices))
        return devices * done / (time.perf_counter() - start)

    def close(self) -> None:
        """End the worker processes; the encoder goes on to work, new ones are started when needed."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, texts: list[str], prefix: str) -> np.ndarray:
        import numpy as np

        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        import torch

        try:
            with self._lock:
                # An explicit prompt, even an empty one, replaces whatever the checkpoint would prepend.
                vectors = self._model.encode(
                    texts,
                    prompt=prefix,
                    batch_size=self.batch_size,
                    normalize_embeddings=self.spec.normalize,
                    show_progress_bar=False,
                    convert_to_tensor=True,
                )
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().splitlines()[0]
            raise RetrievalError(
                f"batch_size={self.batch_size} texts at once do not fit into the memory of {self.devices[0]} beside "
                f"what is there ({reason}); lower batch_size, which is the texts a forward pass, or max_tokens, or "
                "free the device"
            ) from error
        vectors = vectors.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise RetrievalError(
                f"{self.spec.name} in {self.dtype} encodes {texts[row][:80]!r} as numbers that are not finite; use "
                "dtype=bfloat16 or float32"
            )
        return vectors

    def _workers(self):
        # sentence-transformers has a pool of its own, but its workers outlive a parent that is killed, and keep their
        # GPU memory; these notice, and a worker that dies is an error here at once.
        if self._pool is None:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            context = multiprocessing.get_context("spawn")
            waiting = context.Queue()
            for device in self.devices:
                waiting.put(device)
            settings = {"spec": self.spec, "batch_size": self.batch_size, "dtype": self.dtype}
            self._pool = ProcessPoolExecutor(
                len(self.devices),
                mp_context=context,
                initializer=_start_worker,
                initargs=(waiting, settings | {"location": self.folder}, len(self.devices)),
            )
        return self._pool


def check_encoder(encoder: Encoder, passages: Sequence[Passage], stored_vectors: np.ndarray) -> float:
    """Encode some passages again and compare with what the index holds; returns the lowest cosine.

    stored_vectors: (n, dimension), row i for `passages[i]`.

    Raises:
        RetrievalError: for a cosine below `MIN_CHECK_COSINE`: another encoder, another prefix, another corpus.
    """
    import numpy as np

    stored = np.asarray(stored_vectors, dtype=np.float32)
    if stored.shape != (len(passages), encoder.dimension):
        raise RetrievalError(
            f"the index stores vectors of shape {stored.shape} for {counted(len(passages), 'passage')}, the encoder "
            f"{encoder.spec.name} makes {encoder.dimension} dimensions: they do not belong together"
        )
    fresh = encoder.encode_passages([encoder.spec.passage_text(passage) for passage in passages])
    norms = np.linalg.norm(fresh, axis=1) * np.linalg.norm(stored, axis=1)
    cosines = (fresh * stored).sum(axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)
    worst = int(np.argmin(cosines))
    if not cosines[worst] >= MIN_CHECK_COSINE:
        raise RetrievalError(
            f"the encoder {encoder.spec.name} (revision {encoder.spec.revision}, passage prefix "
            f"{encoder.spec.passage_prefix!r}) does not reproduce the vectors of this index: {len(passages)} stored "
            f"passages encoded again have cosines down to {cosines[worst]:.4f} with what is stored (passage "
            f"{passages[worst].id!r}), and {MIN_CHECK_COSINE} is the least; load the encoder that built the index, or "
            "build it again"
        )
    return float(cosines[worst])


def _all_devices() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _load_model(checkpoint: Checkpoint, spec: EncoderSpec, device: str, dtype: str):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise RetrievalError(f"dense retrieval needs sentence-transformers: {EXTRA}") from error
    kind = torch_dtype(dtype)
    if checkpoint.makes_token_vectors:
        raise RetrievalError(
            f"the encoder {checkpoint.folder} makes a vector a token, not one a text; build with kind late_interaction"
        )
    with loading(checkpoint, device):
        model = SentenceTransformer(
            str(checkpoint.folder),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": kind},
        )
    if not checkpoint.has_modules:
        model = _with_pooling(model, spec, device)
    return model.to(kind)


def torch_dtype(name: str):
    """The number format that an encoder computes in.

    Raises:
        RetrievalError: for one that none computes in.
    """
    import torch

    found = getattr(torch, name, None)
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise RetrievalError(f"dtype={name!r} is none of float32, float16, bfloat16")
    return found


def _with_pooling(model, spec: EncoderSpec, device: str):
    """A checkpoint without sentence-transformers' own files says nothing of its pooling, so `spec` must."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    if spec.pooling is None or spec.normalize is None:
        raise RetrievalError(
            f"{spec.name} is a plain transformers checkpoint, which does not say how its token vectors are pooled; "
            "give pooling (mean, cls or lasttoken) and normalize (true or false), as its model card says"
        )
    transformer = model[0]
    pooling = Pooling(transformer.get_embedding_dimension(), spec.pooling)
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def _completed(spec: EncoderSpec, checkpoint: Checkpoint, model) -> EncoderSpec:
    """`spec` with everything filled in that it left to the checkpoint, after checking that the two agree."""
    import math

    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    poolings = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    pooling = "+".join(poolings[0]) if poolings and not isinstance(poolings[0], str) else "".join(poolings[:1])
    normalizes = any(isinstance(module, Normalize) for module in model)
    dimension = model.get_embedding_dimension()
    longest = model.max_seq_length
    longest = None if longest is None or math.isinf(longest) else int(longest)
    found = {"pooling": pooling, "dimension": dimension}
    for name, value in found.items():
        asked = getattr(spec, name)
        if asked is not None and asked != value:
            raise RetrievalError(
                f"the encoder {spec.name} has the {name} {value!r}, not {asked!r}: leave {name} out, or name the "
                "checkpoint that has it"
            )
    if spec.normalize is False and normalizes:
        raise RetrievalError(
            f"the encoder {spec.name} normalizes its vectors in a layer of its own, so normalize=false cannot be had; "
            "leave it out"
        )
    if spec.max_tokens is not None:
        if longest is not None and spec.max_tokens > longest and not _can_read(model, spec.max_tokens):
            raise RetrievalError(
                f"max_tokens={spec.max_tokens} is more than the {longest} tokens that {spec.name} reads; lower it"
            )
        if longest is not None:
            model.max_seq_length = longest = spec.max_tokens
    normalize = normalizes if spec.normalize is None else spec.normalize
    return replace(spec, revision=checkpoint.revision, normalize=normalize, max_tokens=longest, **found)


def _can_read(model, tokens: int) -> bool:
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    return tokens <= getattr(config, "max_position_embeddings", 0)


_worker: Encoder | None = None


def _start_worker(waiting, settings: dict[str, Any], workers: int) -> None:
    import multiprocessing
    import os
    import signal

    # Ctrl-C reaches every process of a terminal: the parent reports it, a worker just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    def follow_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    device = waiting.get()
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    global _worker
    _worker = Encoder(devices=[device], **settings)


def _encode_in_worker(texts: list[str]) -> np.ndarray:
    assert _worker is not None  # `_start_worker` made it
    return _worker._encode(texts, _worker.spec.passage_prefix)


def spec_from_dict(row: dict[str, Any]) -> EncoderSpec:
    """The inverse of `dataclasses.asdict`.

    Raises:
        RetrievalError: for fields that are missing or unknown.
    """
    known = {field.name for field in fields(EncoderSpec)}
    if not isinstance(row, dict) or set(row) != known:
        found = sorted(row) if isinstance(row, dict) else row
        raise RetrievalError(f"an encoder is described by {sorted(known)}, found {found}; build the index again")
    return EncoderSpec(**row)
