"""Recall, speed and size of every retrieval engine on real questions and passages, as a Markdown table.

    OMP_NUM_THREADS=1 python scripts/benchmark_engines.py --model DIR_OF_MINILM --output DIR

--token-model adds a row of late interaction: MaxSim over the token vectors of a ColBERT, or of MiniLM as they are.

The corpus is hotpotqa_sample within 2wiki_passages (7,113 passages), or hotpotqa_sample alone with --alone (994).
Recall is that of gold titles for the 100 questions of hotpotqa_sample, the question as query. "As exact" is the share
of the ten passages of exact search that the engine finds too, over 1,000 questions of hotpotqa_dev; these also measure
speed, one by one and in batches of 256, as queries a second of CPU time: of ranking, and apart from it of the encoder
that all dense engines share. DIR keeps vectors and indexes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.bm25.build import build_bm25
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.dense.encode_corpus import VectorShards, encode_corpus
from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.faiss_index import FaissIndex, FaissOptions, build_faiss_index
from rex_rag.retrieval.dense.families import resolve_encoder
from rex_rag.retrieval.dense.flat_file import map_flat
from rex_rag.retrieval.dense.qdrant_index import QdrantIndex
from rex_rag.retrieval.dense.retriever import DenseRetriever
from rex_rag.retrieval.dense.torch_index import TorchFlatIndex
from rex_rag.retrieval.dense.vector_index import VectorIndex
from rex_rag.retrieval.late_interaction.maxsim import MaxSimIndex
from rex_rag.retrieval.late_interaction.retriever import LateInteractionRetriever
from rex_rag.retrieval.late_interaction.token_encoder import TokenEncoder, TokenEncoderSpec
from rex_rag.retrieval.late_interaction.token_vectors import encode_tokens, map_token_vectors, write_token_vectors
from rex_rag.retrieval.passages import PassageList

CUTS = (2, 3, 5, 10)
SPEED_QUESTIONS = 1_000
BATCH = 256
SINGLE_QUESTIONS = 200
SHARD_ROWS = 2_048


def read_questions(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def recalls(questions: list[dict], rankings: list[list]) -> list[float]:
    """The mean share of a question's gold titles among its best 2, 3, 5 and 10 passages."""
    found = []
    for question, ranking in zip(questions, rankings, strict=True):
        gold = set(question["metadata"]["supporting_titles"])
        titles = [passage.title for passage in ranking]
        found.append([len(gold & set(titles[:cut])) / len(gold) for cut in CUTS])
    return np.mean(found, axis=0).tolist()


def queries_per_second(work: Callable[[list], object], queries: list, batch: int) -> float:
    """Of one core: by CPU time, so that what else the machine does counts for nothing."""
    work(queries[:batch])
    start = time.process_time()
    for first in range(0, len(queries), batch):
        work(queries[first : first + batch])
    return len(queries) / (time.process_time() - start)


def dense_indexes(vectors: VectorShards, folder: Path) -> Iterator[tuple[str, VectorIndex, int]]:
    """Name, index and bytes of every engine over vectors."""
    flat, halves = FaissOptions("flat"), FaissOptions("flat-fp16")
    variants = {
        "FAISS flat": flat,
        "FAISS flat-fp16": halves,
        "FAISS ivf": FaissOptions("ivf"),
        "FAISS ivf, half the probes": FaissOptions("ivf", nprobe=FaissOptions("ivf").probes(len(vectors)) // 2 or 1),
        "FAISS hnsw": FaissOptions("hnsw"),
    }
    for name, options in variants.items():
        path = folder / f"{name.replace(' ', '_').replace(',', '')}.faiss"
        build_faiss_index(vectors, path, options)
        yield name, FaissIndex(path, options), path.stat().st_size
    for options in (flat, halves):
        path = folder / f"FAISS_{options.kind}.faiss"
        yield f"torch {options.kind}", TorchFlatIndex.load(path, devices=["cpu"]), path.stat().st_size
    codes = map_flat(folder / "FAISS_flat-fp16.faiss")
    index = QdrantIndex.embedded([(0, codes)], *codes.shape, {"benchmark": "engines"})
    # Its embedded mode holds float32 in memory, filled from the file in half precision.
    yield "Qdrant, embedded", index, codes.size * 4


def late_interaction(passages: PassageList, model: str, folder: Path) -> tuple[LateInteractionRetriever, int]:
    """The engine over all passages, and the bytes of its two files."""
    encoder = TokenEncoder(TokenEncoderSpec(model), "cpu")
    write_token_vectors(encode_tokens(passages, encoder, folder / "shards"), folder)
    vectors, offsets = map_token_vectors(folder, len(passages), encoder.dimension)
    index = MaxSimIndex(vectors, offsets)
    return LateInteractionRetriever(encoder, index, passages, index.description), vectors.nbytes + offsets.nbytes


class Table:
    """Measures one engine after the other and prints a row for each."""

    def __init__(self, passages: int, labelled: list[dict], asked: list[str]) -> None:
        self.passages = passages
        self.labelled = labelled
        self.asked = asked
        self.exact: list[list[int]] | None = None
        print("| engine | R@2 | R@3 | R@5 | R@10 | as exact | queries/s, 1 | queries/s, 256 | bytes/passage |")
        print("|---|---|---|---|---|---|---|---|---|")

    def bm25(self, retriever: BM25Retriever, size: int) -> None:
        """Splitting into terms counts as search."""
        self._row("BM25", retriever, lambda batch: retriever.rank(retriever.encode(batch), CUTS[-1]), self.asked, size)

    def dense(self, name: str, retriever: DenseRetriever, vectors: np.ndarray, size: int) -> None:
        """vectors: those of the questions; encoding them is measured apart, it is the same for all."""
        rows = retriever.rank(vectors, CUTS[-1])[1].tolist()
        self.exact = self.exact or rows
        hits = [len(set(ours) & set(theirs)) for ours, theirs in zip(rows, self.exact, strict=True)]
        same = f"{np.mean(hits) / CUTS[-1]:.3f}"
        self._row(name, retriever, lambda batch: retriever.rank(batch, CUTS[-1]), vectors, size, same)

    def late_interaction(self, retriever: LateInteractionRetriever, size: int) -> None:
        """On fewer questions than the others, since each scans all tokens."""
        encoded = retriever.encode(self.asked[:BATCH])
        self._row("late interaction", retriever, lambda batch: retriever.rank(batch, CUTS[-1]), encoded, size)

    def _row(self, name: str, retriever, work: Callable, queries: Sequence, size: int, same: str = "") -> None:
        measured = recalls(self.labelled, retriever.search([row["question"] for row in self.labelled], CUTS[-1]))
        cells = [name, *(f"{value:.3f}" for value in measured), same]
        cells += [f"{queries_per_second(work, queries[:SINGLE_QUESTIONS], 1):,.0f}"]
        cells += [f"{queries_per_second(work, queries, BATCH):,.0f}", f"{size / self.passages:,.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an encoder, for example a folder with all-MiniLM-L6-v2")
    parser.add_argument("--encoder-family", default="minilm")
    parser.add_argument("--token-model", help="a checkpoint for the row of late interaction")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, required=True, help="folder for vectors and indexes")
    parser.add_argument("--alone", action="store_true", help="hotpotqa_sample's own 994 passages")
    arguments = parser.parse_args()
    files = [arguments.data / "hotpotqa_sample" / "corpus.jsonl"]
    if not arguments.alone:
        files.append(arguments.data / "2wiki_passages" / "corpus.jsonl")
    passages = PassageList(read_corpus(files))
    labelled = read_questions(arguments.data / "hotpotqa_sample" / "qa.jsonl")
    asked = [row["question"] for row in read_questions(arguments.data / "hotpotqa_dev" / "qa.jsonl")[:SPEED_QUESTIONS]]
    folder = arguments.output / ("alone" if arguments.alone else "all")
    encoder = Encoder(resolve_encoder(arguments.model, family=arguments.encoder_family), ["cpu"])
    started = time.perf_counter()
    vectors = encode_corpus(passages, encoder, folder / "vectors", shard_rows=SHARD_ROWS, dtype="float32")
    took = time.perf_counter() - started
    print(f"{len(passages):,} passages, {encoder.dimension} dimensions")
    print(f"encoding the passages (nothing where they lay encoded): {took:,.0f} s")
    encoded = encoder.encode_queries(asked)
    single = queries_per_second(encoder.encode_queries, asked[:SINGLE_QUESTIONS], 1)
    batched = queries_per_second(encoder.encode_queries, asked[: 2 * BATCH], BATCH)
    print(f"encoding a question: {single:,.0f} a second one by one, {batched:,.0f} in batches of {BATCH}\n")
    table = Table(len(passages), labelled, asked)
    build_bm25(passages, folder / "bm25")
    table.bm25(BM25Retriever.load(folder / "bm25", passages), folder_bytes(folder / "bm25"))
    for name, index, size in dense_indexes(vectors, folder):
        table.dense(name, DenseRetriever(encoder, index, passages), encoded, size)
    if arguments.token_model:
        table.late_interaction(*late_interaction(passages, arguments.token_model, folder / "tokens"))


if __name__ == "__main__":
    main()
