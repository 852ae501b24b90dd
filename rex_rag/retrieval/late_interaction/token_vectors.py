"""The token vectors of a corpus in two files: all of them one after the other, and where each passage's begin.

`tokens.f16` holds float16 of length `dimension` a vector, in corpus order; `token_offsets.u64` the place, counted in
vectors, at which each passage begins, and the end of the last. Both are memory-mapped: opening takes no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.encode_corpus import encoding_identity, texts_hash
from rex_rag.retrieval.late_interaction.token_encoder import TokenEncoder
from rex_rag.retrieval.passages import PassageSource
from rex_rag.support.durable import remove_partial, written_whole
from rex_rag.support.progress_bars import progress_bar

if TYPE_CHECKING:
    import numpy as np

TOKENS_FILE = "tokens.f16"
OFFSETS_FILE = "token_offsets.u64"
# What a kill can lose; each is also cut into the same batches whenever it is encoded.
SHARD_ROWS = 256


def encode_tokens(
    passages: PassageSource, encoder: TokenEncoder, work: Path, shard_rows: int = SHARD_ROWS
) -> list[Path]:
    """Encode every passage into shards in `work`, going on behind those that a killed encoding finished there.

    A shard's name holds a hash of encoder and texts, so that one of another corpus, encoder or setting is never taken
    for one of this encoding. Memory: one shard's texts and float32 vectors.
    """
    import numpy as np

    identity = encoding_identity(encoder, "float16")
    paths = []
    with progress_bar(len(passages), "Encoding", unit="passages") as bar:
        for number, start in enumerate(range(0, len(passages), shard_rows)):
            rows = range(start, min(start + shard_rows, len(passages)))
            texts = [encoder.spec.passage_text(passages[row]) for row in rows]
            path = work / f"{number:06d}-{texts_hash(identity, texts)}.npz"
            paths.append(path)
            if not path.is_file():
                vectors = encoder.encode_passages(texts)
                lengths = np.array([len(tokens) for tokens in vectors], dtype=np.int64)
                with written_whole(path) as file:
                    np.savez(file, lengths=lengths, vectors=np.concatenate(vectors).astype(np.float16))
            bar.update(len(texts))
    remove_partial(work)
    return paths


def write_token_vectors(shards: Sequence[Path], directory: Path) -> int:
    """Put shards together into the two files; returns the number of vectors. Memory: one shard."""
    import numpy as np

    lengths = []
    with written_whole(directory / TOKENS_FILE) as file:
        for path in shards:
            with np.load(path, allow_pickle=False) as shard:
                file.write(shard["vectors"].astype("<f2", copy=False).tobytes())
                lengths.append(shard["lengths"])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype("<u8")
    with written_whole(directory / OFFSETS_FILE) as file:
        file.write(offsets.tobytes())
    return int(offsets[-1])


def map_token_vectors(directory: Path, rows: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (tokens, dimension) float16, memory-mapped, and the offsets (rows + 1,) int64.

    Raises:
        RetrievalError: for files that do not fit each other, or the number of passages.
    """
    import numpy as np

    tokens, places = directory / TOKENS_FILE, directory / OFFSETS_FILE
    offsets = np.fromfile(places, dtype="<u8").astype(np.int64)
    if len(offsets) != rows + 1 or offsets[0] != 0 or (np.diff(offsets) < 1).any():
        raise RetrievalError(
            f"{places} holds no rising offsets of {rows:,} passages: it is damaged; copy the index again or build it "
            "again"
        )
    size, vectors = tokens.stat().st_size, int(offsets[-1])
    if size != vectors * dimension * 2:
        raise RetrievalError(
            f"{tokens} has {size:,} bytes, and {places} says {vectors:,} vectors of {dimension} x float16: one of the "
            "two is damaged; copy the index again or build it again"
        )
    # Copy on write: torch warns of arrays that it could not write to, though nothing ever does.
    return np.memmap(tokens, dtype="<f2", mode="c", shape=(vectors, dimension)), offsets
