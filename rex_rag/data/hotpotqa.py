"""A small corpus with questions, cut from HotpotQA, whose questions bring their passages along."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rex_rag.data.corpus import row_of_passage
from rex_rag.types import Passage


def cut_sample(rows: Iterable[dict[str, Any]], questions: int, contexts: int) -> tuple[bytes, bytes, bytes]:
    """Cut rows in FlashRAG's layout, with HotpotQA's contexts under `metadata`, into a sample's files.

    Args:
        rows: `{"id", "question", "golden_answers", "metadata": {"context": {"title", "sentences"}, …}}`; a row
            without passages is left out.
        questions: how many the sample asks.
        contexts: of how many rows the passages make the corpus; the first are those of the sample's questions.

    Returns:
        Contents of three JSON lines files: the sample's questions; the corpus; the questions that are left, to train
        a starting point on.
    """
    asked: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    passages: dict[tuple[str, str], None] = {}
    for row in rows:
        metadata = row.get("metadata") or {}
        context = metadata.get("context") or {}
        found = [
            (title, "".join(sentences).strip())
            for title, sentences in zip(context.get("title") or (), context.get("sentences") or (), strict=True)
        ]
        found = [(title, text) for title, text in found if text]
        if not found:
            continue
        if len(asked) + len(others) < contexts:
            passages.update(dict.fromkeys(found))
        supporting = list(dict.fromkeys((metadata.get("supporting_facts") or {}).get("title") or ()))
        kept = {name: metadata[name] for name in ("type", "level") if name in metadata}
        question = {name: row[name] for name in ("id", "question", "golden_answers")}
        question["metadata"] = {**kept, "supporting_titles": supporting}
        (asked if len(asked) < questions else others).append(question)
    corpus = [row_of_passage(Passage(str(number), title, text)) for number, (title, text) in enumerate(passages)]
    return _lines(asked), _lines(corpus), _lines(others)


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
