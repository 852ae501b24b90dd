"""A corpus as vectors on disk: shards that each appear whole, so that a killed encoding goes on where it stood.

Invariant: a shard's name holds a hash of encoder, number format and texts, so a shard left by another corpus, encoder
or setting is never taken for one of this encoding; the list of shards is written last, when all are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encoder import CHUNK_ROWS, Encoder
from rex_rag.retrieval.passages import PassageSource
from rex_rag.support.durable import remove_partial, write_json, written_whole
from rex_rag.support.progress_bars import progress_bar
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

LIST_FILE = "vectors.json"
# What a kill can lose: seconds on a GPU, minutes on a CPU. A multiple of the encoder's chunks, so that shards of any
# such size hold the same vectors.
DEFAULT_SHARD_ROWS = 8 * CHUNK_ROWS
DTYPES = {"float32": 4, "float16": 2}
CHECK_FILE = "check_vectors.npy"
CHECK_ROWS = 16


class VectorShards:
    """The vectors of a corpus, memory-mapped: iterating yields arrays (rows, dimension), in corpus order.

    Raises:
        RetrievalError: for a directory in which no encoding was finished, and shards of the wrong size.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / LIST_FILE
        if not path.is_file():
            raise RetrievalError(f"{path} is missing: the corpus was not encoded to its end; start the build again")
        content = json.loads(path.read_text(encoding="utf-8"))
        self.dimension: int = content["dimension"]
        self.dtype: str = content["dtype"]
        self._rows: int = content["rows"]
        self._names: list[str] = content["shards"]
        self._lengths = [len(shard) for shard in self]
        found = sum(self._lengths)
        if found != self._rows:
            raise RetrievalError(f"{path} lists {self._rows} vectors, its shards hold {found}; start the build again")

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._shard, self._names)

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the vectors of some rows as (n, dimension) float32, reading the shards that hold them alone."""
        import numpy as np

        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows from {rows.min()} to {rows.max()} of {len(self)} vectors")
        taken = np.empty((len(rows), self.dimension), dtype=np.float32)
        ends = np.cumsum(self._lengths)
        holders = np.searchsorted(ends, rows, side="right")
        for number in np.unique(holders):
            here = np.flatnonzero(holders == number)
            first = ends[number] - self._lengths[number]
            taken[here] = self._shard(self._names[number])[rows[here] - first]
        return taken

    def _shard(self, name: str) -> np.ndarray:
        import numpy as np

        shard = np.load(self.directory / name, mmap_mode="r", allow_pickle=False)
        if shard.ndim != 2 or shard.shape[1] != self.dimension or shard.dtype != self.dtype:
            raise RetrievalError(
                f"{self.directory / name} holds {shard.dtype} of shape {shard.shape}, not {self.dtype} of "
                f"{self.dimension} columns; delete it and start the build again"
            )
        return shard


def encode_corpus(
    passages: PassageSource,
    encoder: Encoder,
    directory: str | Path,
    shard_rows: int = DEFAULT_SHARD_ROWS,
    dtype: str = "float16",
) -> VectorShards:
    """Encode every passage into `directory`, going on behind the shards that a killed encoding finished there.

    Memory: one shard's texts and float32 vectors. The bytes are the same whether interrupted or not and however many
    devices work, as long as devices and batch size are of the same kind.

    Args:
        shard_rows: passages a shard, a multiple of `encoder.CHUNK_ROWS` or less than it.
        dtype: how vectors are stored, float32 or float16.

    Raises:
        RetrievalError: for an empty corpus, and for vectors that do not fit the number format.
    """
    if dtype not in DTYPES:
        raise RetrievalError(f"vectors cannot be stored as {dtype!r}; choose one of {', '.join(DTYPES)}")
    if shard_rows < 1 or (shard_rows > CHUNK_ROWS and shard_rows % CHUNK_ROWS):
        raise RetrievalError(f"shard_rows={shard_rows}; use a multiple of {CHUNK_ROWS}, or fewer rows than that")
    if not len(passages):
        raise RetrievalError("there is no passage to encode; give a corpus that has some")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    identity = encoding_identity(encoder, dtype)
    names = []
    with progress_bar(len(passages), "Encoding", unit="passages") as bar:
        for number, start in enumerate(range(0, len(passages), shard_rows)):
            texts = [
                encoder.spec.passage_text(passages[row])
                for row in range(start, min(start + shard_rows, len(passages)))
            ]
            path = directory / f"{number:06d}-{texts_hash(identity, texts)}.npy"
            names.append(path.name)
            if path.is_file():
                bar.initial += len(texts)  # not part of this run's rate
                bar.update(len(texts))
            else:
                _write_shard(path, encoder.encode_passages(texts, bar.update), dtype)
    remove_partial(directory)
    for leftover in {*directory.glob("*.npy")} - {directory / name for name in names}:
        leftover.unlink()
    rows = {"rows": len(passages), "dimension": encoder.dimension, "dtype": dtype, "shards": names}
    write_json(directory / LIST_FILE, rows)
    return VectorShards(directory)


def write_check_vectors(vectors: VectorShards, directory: str | Path) -> None:
    """Keep some rows' vectors beside the index, for `encoder.check_encoder` when it is loaded."""
    import numpy as np

    with written_whole(Path(directory) / CHECK_FILE) as file:
        np.save(file, vectors.take(check_rows(len(vectors))), allow_pickle=False)


def read_check_vectors(directory: str | Path, passages: PassageSource) -> tuple[list[Passage], np.ndarray]:
    """The passages that `write_check_vectors` chose, and their stored vectors (n, dimension) float32."""
    import numpy as np

    path = Path(directory) / CHECK_FILE
    if not path.is_file():
        raise RetrievalError(f"{path} is missing, so the encoder cannot be checked; build the index again")
    return [passages[row] for row in check_rows(len(passages))], np.load(path, allow_pickle=False)


def check_rows(total: int) -> list[int]:
    """At most `CHECK_ROWS` rows, spread evenly from the first to the last."""
    count = min(CHECK_ROWS, total)
    return [row * (total - 1) // max(1, count - 1) for row in range(count)]


class Encoding(Protocol):
    """What of an encoder its vectors depend on."""

    spec: Any  # a dataclass
    dtype: str
    batch_size: int
    devices: list[str]


def encoding_identity(encoder: Encoding, dtype: str) -> str:
    """All that vectors depend on besides the texts, and how they are stored."""
    # The folder of a checkpoint may move between attempts; its revision says what it holds.
    spec = {key: value for key, value in asdict(encoder.spec).items() if key != "name"}
    kinds = sorted({device.split(":")[0] for device in encoder.devices})
    facts = spec | {"computes_in": encoder.dtype, "batch_size": encoder.batch_size, "devices": kinds}
    return json.dumps([facts, dtype], sort_keys=True)


def texts_hash(identity: str, texts: list[str]) -> str:
    """Sixteen digits over an encoding's identity and the texts of a shard."""
    digest = hashlib.sha256(identity.encode())
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()[:16]


def _write_shard(path: Path, vectors: np.ndarray, dtype: str) -> None:
    import numpy as np

    with np.errstate(over="ignore"):
        stored = vectors.astype(dtype)
    if not np.isfinite(stored).all():
        raise RetrievalError(
            f"vectors as large as {np.abs(vectors).max():.3g} do not fit {dtype}, whose largest number is "
            f"{np.finfo(dtype).max:.3g}; store them as float32"
        )
    with written_whole(path) as file:
        np.save(file, stored, allow_pickle=False)
