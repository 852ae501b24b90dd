"""Build a BM25 index of any size in bounded memory: tantivy's files, and `bm25.json` that tells how they were made.

A build that was killed goes on after the part it committed last, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rex_rag.retrieval.bm25.retriever import FORMAT, SETTINGS_FILE, tokenizer_version
from rex_rag.retrieval.bm25.segments import (
    META_FILE,
    SEGMENT_FILE,
    check_passages,
    check_terms,
    make_index,
    part_borders,
    settled_names,
    write_parts,
)
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter
from rex_rag.retrieval.passages import PassageSource
from rex_rag.support.durable import remove_partial, sync_folder, write_json
from rex_rag.support.progress_bars import progress_bar

# Passages whose bytes decide whether what lies there was built from the same corpus.
_ROWS_IN_FINGERPRINT = 1_000


def build_bm25(
    passages: PassageSource, directory: str | Path, options: BM25Options | None = None, work: str | Path | None = None
) -> dict[str, Any]:
    """Write the index of `passages` into `directory` and return its settings; `BM25Retriever.load` opens it.

    Args:
        options: how passages are split into terms; the defaults if left out.
        work: a folder for what is thrown away at the end, `directory/work` by default. A build that was killed goes
            on from it.

    Raises:
        RetrievalError: for an empty corpus, one without any indexable word, unknown stemmers or stop words.
    """
    options = options or BM25Options()
    directory = Path(directory)
    work = directory / "work" if work is None else Path(work)
    splitter = TermSplitter(options)
    check_passages(passages)
    settings, borders = _plan(passages, options)
    settings_file = directory / SETTINGS_FILE
    if settings_file.exists():
        if json.loads(settings_file.read_text(encoding="utf-8")) == settings:
            shutil.rmtree(work, ignore_errors=True)
            return settings
        settings_file.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    _prepare_work(work, {"index": settings, "borders": borders})

    written = work / "written.json"
    if not written.exists():
        _discard_segments(directory)
        _write_segments(passages, splitter, borders, work / "segments")
        names, meta = settled_names(work / "segments")
        write_json(written, {"names": names, "meta": meta})
    found = json.loads(written.read_text(encoding="utf-8"))
    for name, settled in found["names"].items():
        if (work / "segments" / name).exists():  # not there: moved before this build was killed
            os.replace(work / "segments" / name, directory / settled)
    sync_folder(directory)
    write_json(directory / META_FILE, found["meta"])
    write_json(settings_file, settings)
    shutil.rmtree(work)
    return settings


def _plan(passages: PassageSource, options: BM25Options) -> tuple[dict[str, Any], list[int]]:
    """What decides every byte of the index, and the parts in which it is written."""
    rows = range(0, len(passages), max(1, len(passages) // _ROWS_IN_FINGERPRINT))
    fingerprint, size = hashlib.sha256(), 0
    for row in rows:
        line = passages.json(row) + b"\n"
        fingerprint.update(line)
        size += len(line)
    settings = {
        "format": FORMAT,
        "passages": len(passages),
        "corpus_sample_sha256": fingerprint.hexdigest(),
        "tantivy": tokenizer_version(),
        **asdict(options),
    }
    return json.loads(json.dumps(settings)), part_borders(len(passages), size * len(passages) // len(rows))


def _prepare_work(work: Path, plan: dict[str, Any]) -> None:
    """Keep what a killed build of the same plan left, throw away anything else."""
    state = work / "plan.json"
    try:
        same = json.loads(state.read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(state, plan)
    remove_partial(work)


def _discard_segments(directory: Path) -> None:
    """Remove what an index of other passages or options left."""
    for path in directory.iterdir():
        if SEGMENT_FILE.fullmatch(path.name):
            path.unlink()


def _write_segments(passages: PassageSource, splitter: TermSplitter, borders: list[int], folder: Path) -> None:
    if folder.exists() and not (folder / META_FILE).exists():
        shutil.rmtree(folder)  # killed while tantivy laid the folder out
    folder.mkdir(exist_ok=True)
    index = make_index(splitter.analyzer, folder)
    rows = write_parts(index, passages, borders)
    with progress_bar(len(passages), "indexing", unit="passages", done=next(rows)) as bar:
        for row in rows:
            bar.update(row - bar.n)
    check_terms(index, len(passages))
