"""What a BM25 build will take, from a sample of the corpus that is split, counted and written for real."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rex_rag.retrieval.bm25.postings import ROWS_PER_RANGE
from rex_rag.retrieval.bm25.shards import BLOCK_POSTINGS, SHARD_PASSAGES, SHARDS_AHEAD, Shard, write_shard
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter
from rex_rag.retrieval.index.estimate import Estimate
from rex_rag.retrieval.passages import passage_json
from rex_rag.support.wording import counted
from rex_rag.types import Passage

# Measured on one core (numpy 2.3): merging shards' terms in Python, and gathering and scoring postings.
_TERMS_MERGED_PER_SECOND = 500_000
_POSTINGS_WRITTEN_PER_SECOND = 10_000_000
# A growing vocabulary follows V = K n^exponent (Heaps); English text has 0.4 to 0.6, small samples show more.
_LARGEST_VOCABULARY_EXPONENT = 0.65
# Bytes of memory a passage takes while its shard is counted, besides its text: three copies of that (as JSON, parsed,
# in lower case) and, for each term, 8 in Python lists and up to four 8-byte numbers while pairs are sorted.
_TEXT_COPIES, _BYTES_PER_TOKEN = 3, 48
# While a block is written: its two arrays, and 8-byte numbers of the widest shard's span.
_BYTES_PER_BLOCK_POSTING, _BYTES_PER_SPAN_POSTING = 8, 56
# Numbers a term in the files: list border 8, highest score 4, place in terms.txt 8, and the two spellings' frames.
_BYTES_PER_TERM = 8 + 4 + 8 + 1 + 14


def estimate_bm25(
    sample: Sequence[Passage],
    total: int,
    options: BM25Options | None = None,
    processes: int | None = None,
) -> Estimate:
    """Estimate building and searching an index of `total` passages that are like the sample, taken from all over it.

    processes: one a core by default. Counting terms is taken to get faster with each, the other steps run on one core.
    """
    cores = len(os.sched_getaffinity(0))
    processes = processes or cores
    splitter = TermSplitter(options or BM25Options())
    lines = [passage_json(passage) for passage in sample]
    _count(lines[:50], splitter)  # imports and first calls are no part of the rate
    half, _ = _count(lines[: len(lines) // 2], splitter) if len(lines) > 1 else (None, 0.0)
    whole, seconds = _count(lines, splitter)

    exponent = math.log2(whole.terms / half.terms) if half and half.terms else _LARGEST_VOCABULARY_EXPONENT
    exponent = min(exponent, _LARGEST_VOCABULARY_EXPONENT)

    def vocabulary(passages: int) -> float:
        return whole.terms * (passages / len(sample)) ** exponent

    postings, tokens = whole.postings / len(sample), whole.tokens / len(sample)
    text = sum(map(len, lines)) / len(sample)
    terms, shard = vocabulary(total), min(total, SHARD_PASSAGES)
    shards = math.ceil(total / SHARD_PASSAGES)
    merged = shards * vocabulary(shard)
    working = min(processes, shards)
    counting = shard * (
        # A shard on its way to a process is there twice: as it was read, and packed for the pipe.
        working * (_TEXT_COPIES * text + _BYTES_PER_TOKEN * tokens) + (2 * (working + SHARDS_AHEAD) + 1) * text
    )
    block = min(total * postings, BLOCK_POSTINGS)
    writing = block * _BYTES_PER_BLOCK_POSTING + min(block, shard * postings) * _BYTES_PER_SPAN_POSTING
    lasting = 4 * total + 4 * merged + 40 * terms
    word = whole.term_bytes / max(whole.terms, 1)
    final = total * postings * 8 + terms * (_BYTES_PER_TERM + 2 * word)
    work = total * (postings * 5 + 4) + merged * (word + 13)
    steps = (
        total * seconds / len(sample) / min(working, cores),
        merged / _TERMS_MERGED_PER_SECOND + total * postings / _POSTINGS_WRITTEN_PER_SECOND,
    )
    return Estimate(
        peak_ram=int(max(counting, writing + lasting)),
        serving_ram=4 * min(total, ROWS_PER_RANGE) * cores,
        work_disk=int(work),
        final_disk=int(final),
        seconds=sum(steps),
        notes=(
            f"BM25: {tokens:.0f} terms a passage, {postings:.0f} of them different, in a sample of {len(sample):,}; "
            f"{terms:,.0f} terms in all if the vocabulary grows by the power {exponent:.2f} of the corpus",
            f"BM25: memory for {counted(working, 'process', 'processes')}; the index is read through the system's "
            "file cache: searching is fast while free memory holds it",
        ),
    )


class _Counted:
    def __init__(self, shard: Shard) -> None:
        self.terms = len(shard.load("indptr")) - 1
        self.postings = int(shard.load("indptr")[-1])
        self.tokens = int(shard.load("lengths").sum())
        self.term_bytes = shard.path("terms.txt").stat().st_size


def _count(lines: list[bytes], splitter: TermSplitter) -> tuple[_Counted, float]:
    with tempfile.TemporaryDirectory() as folder:
        shard = Shard(Path(folder), 0, 0, len(lines))
        started = time.perf_counter()
        write_shard(shard, b"\n".join(lines), splitter)
        return _Counted(shard), time.perf_counter() - started
