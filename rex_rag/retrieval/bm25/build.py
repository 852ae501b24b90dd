"""Build a BM25 index of any size in bounded memory, in the file format of bm25s, with its scores bit for bit.

Three steps, each of which goes on where a killed build stood:

1. count terms shard by shard (`shards`), in several processes;
2. merge the shards' sorted terms into one vocabulary, numbered in code point order, and add up in how many passages
   each term is;
3. write the postings term by term: a block of neighbouring terms is gathered from all shards, scored with bm25s's own
   functions and appended. Terms of a shard are in the same order, so a block is one span of each shard's files.

Memory holds one block, the lengths of all passages and a few numbers a term. Row numbers are int32 and the borders of
lists int64, as in bm25s: up to 2^31 - 1 passages, and postings without such a limit.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.estimate import estimate_bm25
from rex_rag.retrieval.bm25.postings import TERM_MAXIMA_FILE, TERM_OFFSETS_FILE, TERMS_FILE
from rex_rag.retrieval.bm25.retriever import FORMAT, SETTINGS_FILE
from rex_rag.retrieval.bm25.shards import BLOCK_POSTINGS, SHARD_PASSAGES, Shard, count_shards, make_shards
from rex_rag.retrieval.bm25.text import (
    BM25_METHOD,
    BM25Options,
    TermSplitter,
    quiet_bm25s,
    resolve_stopwords,
    tokenizer_versions,
)
from rex_rag.retrieval.passages import PassageSource
from rex_rag.support.durable import remove_partial, sync_folder, write_json, written_whole
from rex_rag.support.progress_bars import progress_bar

if TYPE_CHECKING:
    import numpy as np

__all__ = ["build_bm25", "estimate_bm25"]

# bm25s's names of its files.
DATA_FILE, INDICES_FILE, INDPTR_FILE = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"
VOCABULARY_FILE, PARAMETERS_FILE = "vocab.index.json", "params.index.json"

MAX_PASSAGES = 2**31 - 1
# Passages whose bytes decide whether what lies there was built from the same corpus.
_ROWS_IN_FINGERPRINT = 1_000


def build_bm25(
    passages: PassageSource,
    directory: str | Path,
    options: BM25Options | None = None,
    *,
    work: str | Path | None = None,
    processes: int | None = None,
    shard_passages: int = SHARD_PASSAGES,
    block_postings: int = BLOCK_POSTINGS,
) -> dict[str, Any]:
    """Write the index of `passages` into `directory` and return its settings; `BM25Retriever.load` opens it.

    Args:
        options: how passages are split and scored; the defaults if left out.
        work: a folder for what is thrown away at the end, `directory/work` by default. A build that was killed goes
            on from it, and ends with the same bytes.
        processes: how many split passages into terms, one a core by default. They are spawned, so a program that
            calls this with more than one keeps its own start under `if __name__ == "__main__"`.

    Raises:
        RetrievalError: for an empty corpus, one without any indexable word, more than 2^31 - 1 passages, unknown
            stemmers or stop words.
    """
    options = options or BM25Options()
    directory = Path(directory)
    work = directory / "work" if work is None else Path(work)
    if not len(passages):
        raise RetrievalError("BM25 got 0 passages; a search could never be answered, so give it a corpus")
    if len(passages) > MAX_PASSAGES:
        raise RetrievalError(
            f"{len(passages):,} passages are more than the {MAX_PASSAGES:,} that bm25s's 32-bit row numbers reach; "
            "split the corpus into several indexes"
        )
    plan = _plan(passages, options, shard_passages, block_postings)
    settings_file = directory / SETTINGS_FILE
    if settings_file.exists():
        found = json.loads(settings_file.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in plan["index"]} == plan["index"]:
            shutil.rmtree(work, ignore_errors=True)
            return found
        settings_file.unlink()
    _prepare_work(work, plan)
    directory.mkdir(parents=True, exist_ok=True)

    shards = make_shards(work, len(passages), shard_passages)
    count_shards(passages, shards, options, processes or len(os.sched_getaffinity(0)))
    starts = _merge_terms(shards, directory, work)
    tokens = _write_postings(shards, starts, directory, work, options, block_postings)
    settings = plan["index"] | tokens
    write_json(settings_file, settings)
    shutil.rmtree(work)
    return settings


def _plan(passages: PassageSource, options: BM25Options, shard_passages: int, block_postings: int) -> dict[str, Any]:
    """What decides every byte of the index, and what decides the files in the work folder."""
    TermSplitter(options)
    step = max(1, len(passages) // _ROWS_IN_FINGERPRINT)
    fingerprint = hashlib.sha256()
    for row in range(0, len(passages), step):
        fingerprint.update(passages.json(row) + b"\n")
    index = {
        "format": FORMAT,
        "passages": len(passages),
        "corpus_sample_sha256": fingerprint.hexdigest(),
        "versions": tokenizer_versions(),
        **asdict(options),
        "stopwords": resolve_stopwords(options.stopwords),
    }
    return {"index": index, "shard_passages": shard_passages, "block_postings": block_postings}


def _prepare_work(work: Path, plan: dict[str, Any]) -> None:
    """Keep what a killed build of the same plan left, throw away anything else."""
    state = work / "plan.json"
    try:
        same = json.loads(state.read_text(encoding="utf-8")) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(state, plan)
    remove_partial(work)


def _merge_terms(shards: list[Shard], directory: Path, work: Path) -> list[int]:
    """Write the vocabulary, the borders of the lists and each shard's numbers in the vocabulary.

    Returns where in `numbers.i32` each shard's numbers start, and their end.
    """
    import numpy as np

    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + len(shard.load("indptr")) - 1)
    if not starts[-1]:
        raise RetrievalError(
            f"none of the {sum(shard.rows for shard in shards):,} passages holds an indexable word (letters or "
            "digits, no stop word); check the corpus, or pass stopwords=None"
        )
    state = work / "merged.json"
    if state.exists():
        return starts
    # A memory map, not an array: there are several times as many of these numbers as terms.
    numbers = np.memmap(work / "numbers.i32", np.int32, "w+", shape=(starts[-1],))
    terms = _number_terms(shards, starts, directory, np.asarray(numbers))
    numbers.flush()
    indptr = np.zeros(terms + 1, np.int64)
    for shard, (start, end) in zip(shards, pairwise(starts), strict=True):
        indptr[1:][numbers[start:end]] += np.diff(shard.load("indptr"))
    np.cumsum(indptr, out=indptr)
    with written_whole(directory / INDPTR_FILE) as file:
        np.save(file, indptr, allow_pickle=False)
    write_json(state, terms)
    return starts


def _number_terms(shards: list[Shard], starts: list[int], directory: Path, numbers: np.ndarray) -> int:
    """Write every term once, in order, and its number at each place in `numbers`; return how many there are."""
    places = starts[:-1]
    number, position, last = -1, 0, None
    with (
        written_whole(directory / TERMS_FILE) as text,
        written_whole(directory / TERM_OFFSETS_FILE) as offsets,
        written_whole(directory / VOCABULARY_FILE) as vocabulary,
        progress_bar(starts[-1], "merging terms", unit="terms") as bar,
    ):
        offsets.write(bytes(8))
        for term, shard in heapq.merge(*(_tagged(shard) for shard in shards)):
            if term != last:
                last = term
                number += 1
                position += text.write(term + b"\n")
                offsets.write(position.to_bytes(8, "little"))
                key = json.dumps(term.decode(), ensure_ascii=False)
                vocabulary.write(f"{', ' if number else '{'}{key}: {number}".encode())
                if number % 10_000 == 0:
                    bar.update(sum(places) - sum(starts[:-1]) - bar.n)
            numbers[places[shard]] = number
            places[shard] += 1
        vocabulary.write(b"}")
        bar.update(starts[-1] - bar.n)
    return number + 1


def _tagged(shard: Shard) -> Iterator[tuple[bytes, int]]:
    return ((term, shard.number) for term in shard.terms())


@dataclass(frozen=True)
class _Scoring:
    """Everything that a posting's score depends on besides how often the term occurs."""

    idf: np.ndarray  # (V,) float32
    lengths: np.ndarray  # (N,) int32, in terms
    mean_length: float
    options: BM25Options

    def scores(self, counts: np.ndarray, rows: np.ndarray, idf: np.ndarray) -> np.ndarray:
        """The postings' scores, (P,) float32, by the function and with the types of numbers that bm25s uses."""
        import numpy as np
        from bm25s.scoring import _select_tfc_scorer

        saturation = _select_tfc_scorer(BM25_METHOD)(
            tf_array=counts.astype(np.float32),
            l_d=self.lengths[rows].astype(np.float64),
            l_avg=self.mean_length,
            k1=self.options.k1,
            b=self.options.b,
            delta=0.5,
        )
        return (idf * saturation).astype(np.float32)


def _write_postings(
    shards: list[Shard], starts: list[int], directory: Path, work: Path, options: BM25Options, block_postings: int
) -> dict[str, Any]:
    import numpy as np

    indptr = np.load(directory / INDPTR_FILE, allow_pickle=False)
    numbers = np.asarray(np.memmap(work / "numbers.i32", np.int32, "r"))
    lengths = np.empty(shards[-1].first + shards[-1].rows, np.int32)
    for shard in shards:  # one at a time: each map holds a file open
        lengths[shard.first : shard.first + shard.rows] = shard.load("lengths")
    terms, postings = len(indptr) - 1, int(indptr[-1])
    files = {
        DATA_FILE: _ArrayFile(directory / DATA_FILE, np.dtype("<f4"), postings),
        INDICES_FILE: _ArrayFile(directory / INDICES_FILE, np.dtype("<i4"), postings),
        TERM_MAXIMA_FILE: _ArrayFile(directory / TERM_MAXIMA_FILE, np.dtype("<f4"), terms),
    }
    state = work / "written.json"
    done = json.loads(state.read_text()) if state.exists() else 0
    if not done:
        for file in files.values():
            file.create()
    scoring = _Scoring(_idf(np.diff(indptr), len(lengths)), lengths, lengths.mean(dtype=np.float64), options)
    with progress_bar(postings, "writing postings", unit="postings", done=int(indptr[done])) as bar:
        while done < terms:
            end = max(done + 1, int(np.searchsorted(indptr, indptr[done] + block_postings, "right")) - 1)
            rows, scores = _gather_block(shards, starts, numbers, indptr[done : end + 1], done, scoring)
            files[DATA_FILE].write(int(indptr[done]), scores)
            files[INDICES_FILE].write(int(indptr[done]), rows)
            files[TERM_MAXIMA_FILE].write(done, np.maximum.reduceat(scores, indptr[done:end] - indptr[done]))
            bar.update(len(rows))
            done = end
            write_json(state, done)
    for file in files.values():
        file.finish()
    index = quiet_bm25s().BM25(k1=options.k1, b=options.b, method=BM25_METHOD)
    names = ("k1", "b", "delta", "method", "idf_method", "dtype", "int_dtype")
    parameters = {name: getattr(index, name) for name in names}
    parameters |= {"num_docs": len(lengths), "version": tokenizer_versions()["bm25s"], "backend": index.backend}
    write_json(directory / PARAMETERS_FILE, parameters)
    return {"terms": terms, "postings": postings, "tokens": int(lengths.sum(dtype=np.int64))}


def _gather_block(
    shards: list[Shard], starts: list[int], numbers: np.ndarray, indptr: np.ndarray, first: int, scoring: _Scoring
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, scores) of the terms from `first`, whose lists have the borders `indptr`, from all shards."""
    import numpy as np

    heads = indptr[:-1] - indptr[0]
    all_rows, all_scores = np.empty(indptr[-1] - indptr[0], np.int32), np.empty(indptr[-1] - indptr[0], np.float32)
    for shard, (start, end) in zip(shards, pairwise(starts), strict=True):
        low, high = np.searchsorted(numbers[start:end], (first, first + len(heads)))
        if low == high:
            continue
        terms = numbers[start + low : start + high]
        borders = shard.load("indptr")[low : high + 1]
        span = slice(int(borders[0]), int(borders[-1]))
        rows = shard.load("rows")[span] + np.int32(shard.first)
        sizes = np.diff(borders)
        # Shards come in the order of their rows, so each appends to the lists.
        places = np.repeat(heads[terms - first] - (borders[:-1] - borders[0]), sizes) + np.arange(len(rows))
        heads[terms - first] += sizes
        all_rows[places] = rows
        all_scores[places] = scoring.scores(shard.load("counts")[span], rows, np.repeat(scoring.idf[terms], sizes))
    return all_rows, all_scores


def _idf(frequencies: np.ndarray, passages: int) -> np.ndarray:
    """bm25s's weight of each term, (V,) float32, from the number of passages it is in."""
    import numpy as np
    from bm25s.scoring import _select_idf_scorer

    score = _select_idf_scorer(BM25_METHOD)
    different, of_each = np.unique(frequencies, return_inverse=True)
    return np.array([score(int(frequency), N=passages) for frequency in different], np.float32)[of_each]


class _ArrayFile:
    """A .npy file written piece by piece beside its name, which it takes at the end."""

    def __init__(self, path: Path, dtype: np.dtype, size: int) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._dtype, self._size = dtype, size
        self._header = 0

    def create(self) -> None:
        import numpy as np

        with self._part.open("wb") as file:
            description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._size,)}
            np.lib.format.write_array_header_1_0(file, description)
            file.truncate(file.tell() + self._size * self._dtype.itemsize)

    def write(self, position: int, values: np.ndarray) -> None:
        """Write values from a position on; they are on disk when this returns."""
        if values.dtype != self._dtype:
            raise TypeError(f"{self._path.name} holds {self._dtype}, got {values.dtype}")
        header = self._part.stat().st_size - self._size * self._dtype.itemsize
        with self._part.open("r+b") as file:
            file.seek(header + position * self._dtype.itemsize)
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        # Not there: an earlier run renamed it and was killed after that.
        if self._part.exists():
            os.replace(self._part, self._path)
            sync_folder(self._path.parent)
