"""The dense kinds of benchmark_retrieval.py: a real sentence-transformers encoder that is fast on a CPU, and FAISS.

The encoder is a mean of word vectors, drawn from a seed and longer for rarer words, as such models learn to weight
them: it reads a million passages in minutes, where a transformer would take a day on two cores. It costs next to
nothing beside the search, so what is measured is the index. Its recall says nothing of real text:
benchmark_engines.py measures that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rex_rag.retrieval.dense.encode_corpus import encode_corpus
from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.estimate import estimate_dense
from rex_rag.retrieval.dense.faiss_index import KINDS, FaissIndex, FaissOptions, build_faiss_index
from rex_rag.retrieval.dense.families import resolve_encoder
from rex_rag.retrieval.dense.retriever import DenseRetriever
from rex_rag.retrieval.dense.torch_index import TorchFlatIndex
from rex_rag.retrieval.passages import PassageStore

DIMENSION = 384
VOCABULARY = 30_000
INDEX_FILE = "index.faiss"
ENCODER = "word_encoder"


def word_encoder(folder: Path, words: list[str], seed: int) -> Encoder:
    """Save a mean-of-word-vectors encoder over `words`, frequent ones first, unless it is there; and load it."""
    if not (folder / "modules.json").exists():
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        ids = {"[UNK]": 0} | {word: number for number, word in enumerate(words, start=1)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        vectors = np.random.default_rng(seed).standard_normal((len(ids), DIMENSION), dtype=np.float32)
        vectors *= np.log1p(np.arange(len(ids), dtype=np.float32))[:, None]
        model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, vectors), Normalize()], device="cpu")
        model.save_pretrained(str(folder))
    spec = resolve_encoder(str(folder), query_prefix="", passage_prefix="")
    return Encoder(spec, devices=["cpu"], batch_size=256)


class DenseKind:
    """One FAISS index, over vectors that all dense kinds of a folder share."""

    def __init__(self, index: str, words: Mapping[int, str], engine: str = "faiss") -> None:
        self.options = FaissOptions(index)
        self.words = words
        self.engine = engine

    def build(self, passages: PassageStore, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
        if self.engine == "torch":
            return {}
        known = list(dict.fromkeys(self.words[rank] for rank in range(1, VOCABULARY)))
        encoder = word_encoder(directory.parent / ENCODER, known, arguments.seed)
        step = max(1, len(passages) // arguments.sample)
        sample = [passages[row] for row in range(0, len(passages), step)]
        estimate = estimate_dense(sample, len(passages), encoder, self.options)
        started = time.perf_counter()
        # Encoded once for all kinds, in half precision: a float32 index is then filled with rounded numbers, which
        # changes neither its size nor its speed.
        vectors = encode_corpus(passages, encoder, directory.parent / "vectors-float16", dtype="float16")
        encoded = time.perf_counter()
        directory.mkdir(exist_ok=True)
        build_faiss_index(vectors, directory / INDEX_FILE, self.options)
        return {
            "estimate": asdict(estimate),
            "encode_seconds": round(encoded - started, 1),
            "index_seconds": round(time.perf_counter() - encoded, 1),
        }

    def open(self, passages: PassageStore, directory: Path) -> DenseRetriever:
        path = directory / INDEX_FILE
        if self.engine == "torch":
            # The file that the FAISS kind built.
            index = TorchFlatIndex.load(directory.parent / f"dense-{self.options.kind}" / INDEX_FILE, devices=["cpu"])
        else:
            index = FaissIndex(path, self.options)
        return DenseRetriever(word_encoder(directory.parent / ENCODER, [], 0), index, passages)


def dense_kinds(words: Mapping[int, str]) -> dict[str, DenseKind]:
    """The kinds by name; words: rank (from 1, the most frequent) to word."""
    kinds = {f"dense-{index}": DenseKind(index, words) for index in KINDS}
    return kinds | {"torch-flat-fp16": DenseKind("flat-fp16", words, engine="torch")}
