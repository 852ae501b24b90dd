"""What a BM25 build will take, from a sample of the corpus that is indexed for real."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rex_rag.retrieval.bm25.segments import PART_BYTES, make_index, part_borders, write_parts
from rex_rag.retrieval.bm25.text import BM25Options, TermSplitter
from rex_rag.retrieval.estimate import Estimate
from rex_rag.retrieval.passages import PassageList, passage_json
from rex_rag.types import Passage

# A growing vocabulary follows V = K n^exponent (Heaps); English text has 0.4 to 0.6, small samples show more.
_LARGEST_VOCABULARY_EXPONENT = 0.65
# Measured on a million passages, as a share of the time that indexing takes: merging eight parts into one.
_MERGE_SHARE = 0.3
_TIMED_COPIES = 8


def estimate_bm25(sample: Sequence[Passage], total: int, options: BM25Options | None = None) -> Estimate:
    """Estimate building and searching an index of `total` passages that are like the sample, from all over it."""
    splitter = TermSplitter(options or BM25Options())
    half, _ = _index(sample[: max(1, len(sample) // 2)], splitter)
    whole, _ = _index(sample, splitter)
    # Several times over: starting a writer takes as long as writing hundreds of passages.
    _, seconds = _index([*sample] * _TIMED_COPIES, splitter)
    growth = total / len(sample)
    exponent = math.log2(whole["term"] / half["term"]) if len(sample) > 1 else _LARGEST_VOCABULARY_EXPONENT
    vocabulary = whole["term"] * growth ** min(max(exponent, 0.0), _LARGEST_VOCABULARY_EXPONENT)
    final = int(sum(size for kind, size in whole.items() if kind != "term") * growth + vocabulary)
    text = sum(len(passage_json(passage)) for passage in sample) / len(sample)
    rounds = math.log(len(part_borders(total, int(text * total))), 8)
    return Estimate(
        peak_ram=int(min(text * total, PART_BYTES)) + 16 * total,
        serving_ram=0,
        # The parts, until the segment that they are merged into is written.
        work_disk=final if rounds else 0,
        final_disk=final,
        seconds=seconds / _TIMED_COPIES * growth * (1 + _MERGE_SHARE * rounds),
        notes=(
            "BM25: one core builds it; the index is read through the system's file cache: searching is fast while "
            "free memory holds it",
        ),
    )


def _index(sample: Sequence[Passage], splitter: TermSplitter) -> tuple[dict[str, int], float]:
    """Bytes by kind of file, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for _ in write_parts(make_index(splitter.analyzer, Path(folder)), PassageList(sample), [len(sample)]):
            pass
        seconds = time.perf_counter() - started
        return {path.suffix[1:]: path.stat().st_size for path in Path(folder).glob("*.*")}, seconds
