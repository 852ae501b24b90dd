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
# Rows searched together: their sums take 4 MiB, about what a core's caches hold.
ROWS_PER_RANGE = 1 << 20
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


@dataclass
class _List:
    """A term's postings within a range of rows; rows are kept as in the index, `first` is where the range starts."""

    rows: np.ndarray
    scores: np.ndarray
    bound: float  # the most it can add to a passage
    times: int  # how often the query has the term
    first: int

    def weighted(self) -> np.ndarray:
        import numpy as np

        return self.scores if self.times == 1 else self.scores * np.float32(self.times)

    def look_up(self, candidates: np.ndarray) -> np.ndarray:
        """The scores of candidate rows, once, 0 for those without the term."""
        import numpy as np

        if not len(self.rows):
            return np.zeros(len(candidates), np.float32)
        places = np.searchsorted(self.rows, candidates)
        places[places == len(self.rows)] = 0
        return np.where(self.rows[places] == candidates, self.scores[places], np.float32(0))

    def gather(self, candidates: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """As `look_up`, times how often the query has the term, the cheaper way of two; `sums` stays zero."""
        import numpy as np

        if len(candidates) * POSTINGS_PER_LOOKUP < len(self.rows):
            return self.look_up(candidates) * np.float32(self.times)
        places = self.rows.astype(np.intp) - self.first
        sums[places] = self.weighted()
        gathered = sums.take(candidates - self.first)
        sums[places] = 0
        return gathered


class PostingsSearcher:
    """Finds the best rows of queries. Safe between threads: each search borrows an array of its own to add up in.

    Rows are searched range by range: what is added up then stays in the processor's cache and takes little memory, and
    what the first range found tells from the start which lists can matter in the next.
    """

    def __init__(self, postings: Postings) -> None:
        self.postings = postings
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def search(self, terms: Sequence[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, rows), float32 and int64 of shape (min(top_k, rows),), best first, equal scores by row.

        A term that occurs several times counts as often. Rows without any of the terms follow with 0 in row order.
        """
        import numpy as np

        postings = self.postings
        count = min(top_k, postings.rows)
        best, rows = np.empty(0, np.float32), np.empty(0, postings.indices.dtype)
        repeats = Counter(terms)
        # The term that can add most first: rare ones, whose lists are short.
        order = sorted(repeats, key=lambda term: (-float(postings.maxima[term]) * repeats[term], term))
        with self._borrowed() as sums:
            for first in range(0, postings.rows if terms else 0, ROWS_PER_RANGE):
                lists = {term: self._list(term, repeats[term], first) for term in order}
                candidates = _candidates(
                    list(lists.values()), count, float(best[-1]) if len(best) == count else 0, sums
                )
                # Added up in the order of the query, as bm25s does it.
                scores = np.zeros(len(candidates), np.float32)
                found = {term: lists[term].look_up(candidates) for term in order} if len(candidates) else {}
                for term in terms if len(candidates) else ():
                    scores += found[term]
                # A score too small for a float32 is 0 like that of a row without any of the terms.
                best, rows = np.append(best, scores[scores > 0]), np.append(rows, candidates[scores > 0])
                ranking = np.lexsort((rows, -best))[:count]
                best, rows = best[ranking], rows[ranking]
        rows = rows.astype(np.int64)
        if len(rows) < count:
            others = np.setdiff1d(np.arange(min(postings.rows, count + len(rows))), rows)[: count - len(rows)]
            best, rows = np.append(best, np.zeros(len(others), np.float32)), np.append(rows, others)
        return best, rows

    def _list(self, term: int, times: int, first: int) -> _List:
        import numpy as np

        rows, scores = self.postings.of_term(term)
        if self.postings.rows > ROWS_PER_RANGE:
            # Of the type of the rows: another would have the whole list converted.
            borders = np.array((first, min(first + ROWS_PER_RANGE, self.postings.rows)), np.int64)
            low, high = np.searchsorted(rows, borders.astype(rows.dtype))
            rows, scores = rows[low:high], scores[low:high]
        return _List(rows, scores, float(self.postings.maxima[term]) * times, times, first)

    @contextmanager
    def _borrowed(self) -> Iterator[np.ndarray]:
        import numpy as np

        with self._lock:
            sums = self._free.pop() if self._free else None
        if sums is None:
            sums = np.zeros(min(self.postings.rows, ROWS_PER_RANGE), np.float32)
        yield sums
        # Not after an error: what it left in the array would be added to the next search.
        with self._lock:
            self._free.append(sums)


def _candidates(lists: list[_List], count: int, threshold: float, sums: np.ndarray) -> np.ndarray:
    """Rows of a range among which are all that belong to the best `count`, given that as many reach `threshold`.

    lists: in descending order of their bounds; sums: zeros for every row of the range, zeros again at the end.
    """
    import numpy as np

    left = sum(part.bound for part in lists)
    # Sums in another order round differently: by less than this, so near misses stay in.
    slack = left * (sum(part.times for part in lists) + 2) * 2.0**-22
    reached: list[np.ndarray] = []
    added = 0
    while added < len(lists) and left >= threshold - slack:
        part = lists[added]
        added += 1
        left -= part.bound
        if not len(part.rows):
            continue
        places = part.rows.astype(np.intp)
        places -= part.first
        before = sums.take(places)
        # Every posting's score is above 0, so a sum of 0 tells a row that no list has reached yet.
        reached.append(places[before == 0] if reached else places)
        before += part.weighted()
        sums[places] = before
        threshold = max(threshold, _lower_bound(before, count))
    if not reached:
        return np.empty(0, lists[0].rows.dtype)
    cut = threshold - max(left, 0.0) - slack
    places = np.concatenate([part[sums.take(part) >= cut] if cut > 0 else part for part in reached])
    partial = sums.take(places)
    for part in reached:
        sums[part] = 0
    candidates = (places + lists[0].first).astype(lists[0].rows.dtype)
    for part in lists[added:]:
        if not len(candidates):
            break
        partial += part.gather(candidates, sums)
        left -= part.bound
        threshold = max(threshold, _kth_best(partial, count))
        keep = partial >= threshold - max(left, 0.0) - slack
        candidates, partial = candidates[keep], partial[keep]
    return candidates[partial >= max(threshold, _kth_best(partial, count)) - slack]


def _kth_best(values: np.ndarray, count: int) -> float:
    """The `count`-th highest of the values, 0 where there are not as many."""
    import numpy as np

    if len(values) < count:
        return 0.0
    return float(np.partition(values, len(values) - count)[len(values) - count])


def _lower_bound(values: np.ndarray, count: int) -> float:
    """A number that at least `count` of the values reach, 0 where there are not as many."""
    parts = count * PARTS_PER_RESULT
    if len(values) > 4 * parts:
        values = values[: len(values) // parts * parts].reshape(parts, -1).max(axis=1)
    return _kth_best(values, count)
