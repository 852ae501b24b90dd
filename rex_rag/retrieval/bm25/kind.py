"""The index kind `bm25`: terms of titles and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.bm25.text import BM25Options
from rex_rag.retrieval.index_kind import IndexKind, SearchOptions
from rex_rag.types import Passage

if TYPE_CHECKING:
    from rex_rag.retrieval.bm25.retriever import BM25Retriever
    from rex_rag.retrieval.estimate import Estimate
    from rex_rag.retrieval.index.arguments import IndexArguments
    from rex_rag.retrieval.manifest import Manifest
    from rex_rag.retrieval.passages import PassageStore

FOLDER = "bm25"


class BM25Kind(IndexKind):
    name = "bm25"

    @property
    def _options(self) -> BM25Options:
        return BM25Options(self.arguments.stemmer, self.arguments.stopwords)

    @staticmethod
    def identity(arguments: IndexArguments) -> dict[str, Any]:
        return {"kind": BM25Kind.name, **asdict(BM25Options(arguments.stemmer, arguments.stopwords))}

    def estimate(self, sample: Sequence[Passage], total: int) -> Estimate:
        from rex_rag.retrieval.bm25.estimate import estimate_bm25

        return estimate_bm25(sample, total, self._options)

    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[None, dict[str, Any]]:
        from rex_rag.retrieval.bm25.build import build_bm25

        build_bm25(passages, directory / FOLDER, self._options, work=work / FOLDER)
        return None, self._options.index_parameters

    @staticmethod
    def open(
        directory: Path, manifest: Manifest, passages: PassageStore, options: SearchOptions, name: str
    ) -> BM25Retriever:
        from rex_rag.retrieval.bm25.retriever import BM25Retriever

        return BM25Retriever.load(directory / FOLDER, passages, description=f"BM25 {name}")
