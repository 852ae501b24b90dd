"""Exact match as published for the paper's methods, to stand beside a run's own figures.

Nothing here was produced by this package: prompts, decoding and the version of the corpus are the authors'. Values are
per cent, kept as they are printed, means included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rex_rag.support.errors import UserError

SOURCE = "arXiv:2508.08149v2, table 1"
SETTING = "Qwen2.5 of the size named, E5-base-v2 over the December 2018 Wikipedia, top 3"

# Names of the sets in FlashRAG, in the order of the paper's table.
BENCHMARKS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
LABELS = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "popqa": "PopQA",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}
SIZES = ("3B", "7B")

# Means of rounded cells may differ from the rounded mean by this much, in points of per cent.
ROUNDING = 0.1


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of the paper's main table: exact match in per cent, and the mean that is printed beside it."""

    method: str
    size: str
    em: dict[str, float]
    mean: float

    @property
    def mean_of_cells(self) -> float:
        return sum(self.em.values()) / len(self.em)

    @property
    def mean_follows(self) -> bool:
        """Whether the printed mean is that of the printed cells, up to rounding."""
        return abs(self.mean - self.mean_of_cells) < ROUNDING


def _row(method: str, size: str, cells: tuple[float, ...], mean: float) -> PublishedRow:
    return PublishedRow(method, size, dict(zip(BENCHMARKS, cells, strict=True)), mean)


ROWS = (
    _row("RAG", "3B", (34.8, 54.4, 38.7, 25.5, 22.6, 4.7, 0.8), 27.0),
    _row("IRCoT", "3B", (11.1, 31.2, 20.0, 16.4, 17.1, 6.7, 24.0), 18.1),
    _row("Search-o1", "3B", (23.8, 47.2, 26.2, 22.1, 21.8, 5.4, 32.0), 25.5),
    _row("R1-base", "3B", (22.6, 45.5, 17.3, 20.1, 26.8, 5.5, 22.4), 22.9),
    _row("R1-instruct", "3B", (21.0, 44.9, 17.1, 20.8, 27.5, 6.0, 19.2), 22.4),
    _row("Search-R1-base (GRPO)", "3B", (42.1, 58.3, 41.3, 29.7, 27.4, 6.6, 12.8), 31.2),
    _row("Search-R1-instruct (GRPO)", "3B", (39.7, 56.6, 39.1, 33.1, 31.0, 12.4, 23.2), 33.6),
    _row("REX-RAG", "3B", (43.9, 60.4, 44.2, 37.4, 39.7, 14.5, 31.2), 38.7),
    _row("RAG", "7B", (34.9, 58.5, 39.2, 29.9, 23.5, 5.8, 20.8), 30.4),
    _row("IRCoT", "7B", (22.4, 47.8, 30.1, 13.3, 14.9, 7.2, 22.4), 23.9),
    _row("Search-o1", "7B", (15.1, 44.3, 13.1, 18.7, 17.6, 5.8, 29.6), 20.6),
    _row("R1-base", "7B", (29.7, 53.9, 20.2, 24.2, 27.3, 8.3, 29.6), 27.6),
    _row("R1-instruct", "7B", (27.0, 53.7, 19.9, 23.7, 29.2, 7.2, 29.3), 27.1),
    _row("Search-R1-base (GRPO)", "7B", (39.5, 56.0, 38.8, 32.6, 27.0, 12.5, 36.0), 35.0),
    _row("Search-R1-instruct (GRPO)", "7B", (42.9, 62.3, 42.7, 38.6, 34.6, 16.2, 40.0), 39.6),
    _row("REX-RAG", "7B", (45.5, 62.6, 44.3, 42.2, 43.7, 19.7, 44.8), 43.2),
)


def published_rows(sizes: Iterable[str] = SIZES) -> list[PublishedRow]:
    """The rows of the model sizes asked for, `"3B"` or `"7B"`, in the paper's order.

    Raises:
        ValueError: for a size the paper has no row of.
    """
    wanted = set(sizes)
    unknown = sorted(wanted - set(SIZES))
    if unknown:
        raise UserError(f"the paper has no rows for {', '.join(map(repr, unknown))}; choose from {', '.join(SIZES)}")
    return [row for row in ROWS if row.size in wanted]


def label(benchmark: str) -> str:
    """A set's name as tables print it; names that the paper does not have stay as they are."""
    return LABELS.get(benchmark, benchmark)


def ordered(benchmarks: Iterable[str]) -> list[str]:
    """Sets without repetition, the paper's in its order, then all others in the order given."""
    given = list(dict.fromkeys(benchmarks))
    return [name for name in BENCHMARKS if name in given] + [name for name in given if name not in BENCHMARKS]
