"""The kinds of index, and how an index directory is opened.

To add one, write an `IndexKind` and put it into `KINDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rex_rag.data.corpus import corpus_files
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.kind import BM25Kind
from rex_rag.retrieval.dense.kind import DenseKind
from rex_rag.retrieval.held import HASHED_AT_OPENING_BYTES, HeldFiles
from rex_rag.retrieval.index.passage_writer import scan_corpus
from rex_rag.retrieval.index_kind import IndexKind, SearchOptions
from rex_rag.retrieval.indexed import IndexedRetriever
from rex_rag.retrieval.late_interaction.kind import LateInteractionKind
from rex_rag.retrieval.manifest import Manifest
from rex_rag.retrieval.passages import PassageStore
from rex_rag.support.wording import counted

KINDS: dict[str, type[IndexKind]] = {kind.name: kind for kind in (BM25Kind, DenseKind, LateInteractionKind)}


def open_index(
    directory: Path, options: SearchOptions | None = None, corpus: Sequence[str | Path] = ()
) -> IndexedRetriever:
    """Open an index directory for searching, once manifest, files and encoder have been checked.

    `HASHED_AT_OPENING_BYTES` of its files are hashed, the rest compared by size; that is hashed where the name of the
    index goes on a card (`held.HeldFiles.verify`). All are held from here on.

    corpus: files that the index must have been built from; none: whatever it was built from.

    Raises:
        RetrievalError: for a directory that is no index or damaged, another corpus or encoder, and options that the
            index does not take.
    """
    options = options or SearchOptions()
    manifest = Manifest.read(directory)
    kind = KINDS.get(manifest.kind)
    if kind is None:
        raise RetrievalError(
            f"{directory} is an index of kind {manifest.kind!r}, and this version has {', '.join(KINDS)}; use the "
            "version that built it"
        )
    if corpus:
        manifest.check_corpus([asdict(file) for file in scan_corpus(corpus_files(corpus))], directory)
    held = HeldFiles(directory, manifest)
    held.verify(HASHED_AT_OPENING_BYTES)
    with held.explained():
        passages = PassageStore(directory)
    if len(passages) != manifest.passages:
        raise RetrievalError(
            f"{directory} holds {counted(len(passages), 'passage')}, its manifest says {manifest.passages:,}; "
            "build it again"
        )
    for option in fields(options):
        value = getattr(options, option.name)
        if value != option.default and option.name not in ("devices", *kind.options(manifest)):
            raise RetrievalError(
                f"{directory} is a {manifest.index['type']} index, which does not take "
                f"retriever_{option.name}={value!r}; leave it out"
            )
    name = f"over {counted(len(passages), 'passage')} (index {directory.resolve().name}, {manifest.fingerprint})"
    with held.explained():
        retriever = kind.open(directory, manifest, passages, options, name)
    held.check_places()
    retriever.held = held
    return retriever
