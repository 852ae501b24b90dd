"""What known encoders want before queries and passages. One table with sources; nothing is guessed from a name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense.checkpoints import Checkpoint, find_checkpoint
from rex_rag.retrieval.dense.encoder import EncoderSpec


@dataclass(frozen=True)
class EncoderFamily:
    """Encoders that are used alike."""

    repositories: str  # a pattern for whole Hub names
    query_prefix: str
    passage_prefix: str
    passage_format: str
    pooling: str
    normalize: bool


FAMILIES = {
    # Wang et al., "Text Embeddings by Weakly-Supervised Contrastive Pre-training", arXiv 2212.03533, and the model
    # cards; passages laid out as Search-R1 and FlashRAG encode Wikipedia with E5.
    "e5": EncoderFamily(
        r"intfloat/(multilingual-e5|e5)-(small|base|large)(-v2|-unsupervised)?",
        "query: ",
        "passage: ",
        "contents",
        "mean",
        True,
    ),
    # Model cards of BAAI/bge-*-en-v1.5: an instruction before queries for retrieval, none before passages.
    "bge-en": EncoderFamily(
        r"BAAI/bge-(small|base|large)-en(-v1\.5)?",
        "Represent this sentence for searching relevant passages: ",
        "",
        "contents",
        "cls",
        True,
    ),
    # Chen et al., arXiv 2402.03216, and the model card: no instruction before queries; its 1_Pooling is CLS. Only its
    # dense vectors are used here, not its lexical weights or token vectors.
    "bge-m3": EncoderFamily(r"BAAI/bge-m3", "", "", "contents", "cls", True),
    # Zhang et al., arXiv 2506.05176, and the model cards: an instruction before queries alone (any task's may stand in
    # the place of this one), no blank behind "Query:"; the vector is that of the last token, an <|endoftext|> that its
    # tokenizer appends, whichever side is padded.
    "qwen3-embedding": EncoderFamily(
        r"Qwen/Qwen3-Embedding-(0\.6B|4B|8B)",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "",
        "contents",
        "lasttoken",
        True,
    ),
    # Li et al., arXiv 2308.03281, and the model cards: no prefix.
    "gte": EncoderFamily(r"thenlper/gte-(small|base|large)", "", "", "contents", "mean", True),
    # Izacard et al., arXiv 2112.09118: inner product of mean vectors that are not normalized; title and text with a
    # blank between, as in its passage retrieval code.
    "contriever": EncoderFamily(r"facebook/m?contriever(-msmarco)?", "", "", "blank", "mean", False),
    # Model cards: sentence encoders without prefixes.
    "minilm": EncoderFamily(
        r"sentence-transformers/(all-MiniLM-L(6|12)-v[12]|multi-qa-MiniLM-L6-cos-v1)", "", "", "contents", "mean", True
    ),
}


def resolve_encoder(
    name_or_path: str, revision: str | None = None, family: str | None = None, **overrides: object
) -> EncoderSpec:
    """The spec of an encoder: from the table for a known Hub name or a `family`, or from `overrides`.

    A local folder says nothing of what it was trained with, so it needs `family`, or both prefixes.

    Args:
        name_or_path: Hub repository or local folder.
        revision: Hub branch, tag or commit; the spec holds the commit. A local folder has none but its own hash.
        family: one of `FAMILIES`, for a copy or a fine-tune of such an encoder.
        overrides: fields of `EncoderSpec` set by hand.

    Raises:
        RetrievalError: for an encoder of which too little is known, and what `checkpoints.find_checkpoint` refuses.
    """
    given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if family is not None and family not in FAMILIES:
        raise RetrievalError(f"there is no encoder family {family!r}; choose one of {', '.join(FAMILIES)}")
    known = FAMILIES[family] if family else _family_of(name_or_path)
    if known is None and not {"query_prefix", "passage_prefix"} <= set(given):
        raise RetrievalError(
            f"it is not known what the encoder {name_or_path!r} wants before queries and passages"
            f"{_hint(name_or_path)}; say --encoder-family ({', '.join(FAMILIES)}), or both prefixes as its model card "
            "gives them: --query-prefix '' --passage-prefix '' for an encoder without"
        )
    checkpoint = find_checkpoint(name_or_path, revision)
    if revision is not None and checkpoint.revision.startswith("sha256:") and checkpoint.revision != revision:
        raise RetrievalError(
            f"the encoder {name_or_path} is a local folder of {checkpoint.revision}, so revision={revision!r} cannot "
            "be taken from it; drop the revision, or name the Hub repository"
        )
    if known is not None:
        _check_prompts(name_or_path, checkpoint, known, given)
        table = {
            name: getattr(known, name) for name in ("query_prefix", "passage_prefix", "passage_format", "pooling")
        }
        given = table | {"normalize": known.normalize} | given
    try:
        return EncoderSpec(name=name_or_path, revision=checkpoint.revision, **given)
    except TypeError as error:
        raise RetrievalError(f"no such setting of an encoder: {error}") from None


def _family_of(name: str) -> EncoderFamily | None:
    return next((family for family in FAMILIES.values() if re.fullmatch(family.repositories, name)), None)


def _hint(name: str) -> str:
    if not Path(name).expanduser().is_dir():
        return ""
    prompts = find_checkpoint(name).prompts
    return f" (its own configuration names the prompts {prompts})" if prompts else ""


def _check_prompts(name: str, checkpoint: Checkpoint, known: EncoderFamily, given: dict[str, object]) -> None:
    """A checkpoint whose own prompts contradict the table is not what the table means, unless a person says so."""
    for side, names in (("query", ("query",)), ("passage", ("document", "passage", "corpus"))):
        own = next((checkpoint.prompts[key] for key in names if key in checkpoint.prompts), None)
        expected = getattr(known, f"{side}_prefix")
        if own is not None and own != expected and f"{side}_prefix" not in given:
            raise RetrievalError(
                f"the encoder {name} names the {side} prompt {own!r} in its own configuration, its family's is "
                f"{expected!r}; decide with --{side}-prefix"
            )
