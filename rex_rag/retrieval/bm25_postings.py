"""The inverted index as arrays, in memory or memory-mapped, and exact top-k search in it.

The arrays are bm25s's (a sparse matrix of passages x terms in compressed columns, scores computed ahead of time), and
so are the scores, bit for bit: what a passage scores is the float32 sum over the query's terms in their order. What
differs is how the best are found. bm25s adds up every passage of the corpus; here lists are read in descending order
of the most a term can add, and once the lists left cannot lift a new passage among the best k, only those passages
that still can get there are looked up in them (MaxScore: Turtle and Flood, "Query evaluation: strategies and
optimizations", 1995).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import RetrievalError

if TYPE_CHECKING:
    import numpy as np

TERMS_FILE = "terms.txt"
TERM_OFFSETS_FILE = "terms.u64"
TERM_MAXIMA_FILE = "term_maxima.npy"

# A look-up by binary search costs about as much as adding this many neighbouring postings (measured with numpy 2.3).
POSTINGS_PER_LOOKUP = 32
# The k-th best of a list is bounded from below by the k-th best of this many maxima of its parts.
PARTS_PER_RESULT = 64


class MappedVocabulary:
    """Terms in code point order, one a line, memory-mapped; a term's number is its line. Safe between threads."""

    def __init__(self, directory: Path) -> None:
        import numpy as np

        self._offsets = np.asarray(np.memmap(directory / TERM_OFFSETS_FILE, dtype="<u8", mode="r"))
        with (directory / TERMS_FILE).open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if int(self._offsets[-1]) != len(self._text):
            raise RetrievalError(
                f"{directory / TERMS_FILE} has {len(self._text):,} bytes, but {TERM_OFFSETS_FILE} ends at "
                f"{int(self._offsets[-1]):,}: the two do not belong together; build the index again"
            )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def get(self, term: str) -> int | None:
        """The number of a term, `None` for one that the corpus does not have."""
        wanted = term.encode()
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._line(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self._line(low) == wanted else None

    def _line(self, number: int) -> bytes:
        return self._text[int(self._offsets[number]) : int(self._offsets[number + 1]) - 1]


@dataclass(frozen=True)
class Postings:
    """Scores of terms in passages: term t is in rows `indices[indptr[t]:indptr[t + 1]]`, ascending, `data` alike."""

    data: np.ndarray  # (P,) float32, > 0
    indices: np.ndarray  # (P,) int32
    indptr: np.ndarray  # (V + 1,) int64
    maxima: np.ndarray  # (V,) float32: the highest score of each term
    rows: int

    @classmethod
    def of(cls, scores: dict) -> Postings:
        """The arrays of a bm25s index held in memory."""
        import numpy as np

        starts = scores["indptr"][:-1]
        maxima = np.maximum.reduceat(scores["data"], starts).astype(np.float32)
        return cls(scores["data"], scores["indices"], scores["indptr"], maxima, scores["num_docs"])

    def of_term(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scores) of a term."""
        span = slice(int(self.indptr[term]), int(self.indptr[term + 1]))
        return self.indices[span], self.data[span]


class PostingsSearcher:
    """Finds the best rows of queries. Safe between threads: each search borrows an array of its own to add up in."""

    def __init__(self, postings: Postings) -> None:
        self.postings = postings
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()
        # More searches at once than cores would not be faster, but each takes 4 bytes a passage.
        self._turns = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))

    def search(self, terms: Sequence[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), float32 and int64 of shape (min(top_k, rows),), best first, equal scores by row.

        A term that occurs several times counts as often. Rows without any of the terms follow with 0 in row order.
        """
        import numpy as np

        count = min(top_k, self.postings.rows)
        candidates = self._candidates(terms, count) if terms else np.empty(0, self.postings.indices.dtype)
        scores = self._scores(terms, candidates)
        # A score too small for a float32 is 0 like that of a row without any of the terms.
        candidates, scores = candidates[scores > 0], scores[scores > 0]
        order = np.lexsort((candidates, -scores))[:count]
        best, rows = scores[order], candidates[order].astype(np.int64)
        if len(rows) < count:
            others = np.setdiff1d(np.arange(min(self.postings.rows, count + len(rows))), rows)[: count - len(rows)]
            best, rows = np.append(best, np.zeros(len(others), np.float32)), np.append(rows, others)
        return best, rows

    def _scores(self, terms: Sequence[int], candidates: np.ndarray) -> np.ndarray:
        """The scores of a few rows, added up in the order of the terms, as bm25s does it."""
        import numpy as np

        scores = np.zeros(len(candidates), np.float32)
        found = {term: self._look_up(term, candidates) for term in set(terms)}
        for term in terms:
            scores += found[term]
        return scores

    def _look_up(self, term: int, candidates: np.ndarray) -> np.ndarray:
        import numpy as np

        rows, data = self.postings.of_term(term)
        places = np.searchsorted(rows, candidates)
        places[places == len(rows)] = 0
        return np.where(rows[places] == candidates, data[places], np.float32(0))

    def _candidates(self, terms: Sequence[int], count: int) -> np.ndarray:
        """Rows among which the best `count` are for certain; every row that matches, where these are fewer."""
        import numpy as np

        repeats = Counter(terms)
        bounds = {term: float(self.postings.maxima[term]) * times for term, times in repeats.items()}
        queue = sorted(repeats, key=lambda term: (-bounds[term], term))
        # Sums in another order round differently: by less than this, so near misses stay in.
        slack = sum(bounds.values()) * (len(terms) + 2) * 2.0**-22
        left = sum(bounds.values())
        threshold = 0.0
        with self._borrowed() as sums:
            reached: list[np.ndarray] = []
            while queue and left >= threshold - slack:
                term = queue.pop(0)
                left -= bounds[term]
                rows, values = self.postings.of_term(term)
                rows = rows.astype(np.intp)
                before = sums.take(rows)
                # Every posting's score is above 0, so a sum of 0 tells a row that no list has reached yet.
                reached.append(rows[before == 0] if reached else rows)
                before += values if repeats[term] == 1 else values * np.float32(repeats[term])
                sums[rows] = before
                threshold = max(threshold, _lower_bound(before, count))
            cut = threshold - max(left, 0.0) - slack
            candidates = np.concatenate([rows[sums.take(rows) >= cut] if cut > 0 else rows for rows in reached])
            partial = sums.take(candidates)
            for rows in reached:
                sums[rows] = 0
            candidates = candidates.astype(self.postings.indices.dtype)
            for term in queue:
                partial += self._gather(term, candidates, sums) * np.float32(repeats[term])
                left -= bounds[term]
                if len(partial) > count:
                    threshold = max(threshold, float(np.partition(partial, len(partial) - count)[-count]))
                keep = partial >= threshold - max(left, 0.0) - slack
                candidates, partial = candidates[keep], partial[keep]
        if len(partial) > count:
            threshold = float(np.partition(partial, len(partial) - count)[-count])
            candidates = candidates[partial >= threshold - slack]
        return candidates

    def _gather(self, term: int, candidates: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """The scores of a term in candidate rows, the cheaper way of two; `sums` is zero before and after."""
        rows, values = self.postings.of_term(term)
        if len(candidates) * POSTINGS_PER_LOOKUP < len(rows):
            return self._look_up(term, candidates)
        sums[rows] = values
        gathered = sums.take(candidates)
        sums[rows] = 0
        return gathered

    @contextmanager
    def _borrowed(self) -> Iterator[np.ndarray]:
        import numpy as np

        with self._turns:
            with self._lock:
                sums = self._free.pop() if self._free else None
            if sums is None:
                sums = np.zeros(self.postings.rows, np.float32)
            yield sums
            # Not after an error: what it left in the array would be added to the next search.
            with self._lock:
                self._free.append(sums)


def _lower_bound(values: np.ndarray, count: int) -> float:
    """A number that at least `count` of the values reach, 0 where there are not as many."""
    import numpy as np

    if len(values) < count:
        return 0.0
    parts = count * PARTS_PER_RESULT
    if len(values) > 4 * parts:
        values = values[: len(values) // parts * parts].reshape(parts, -1).max(axis=1)
    return float(np.partition(values, len(values) - count)[len(values) - count])
