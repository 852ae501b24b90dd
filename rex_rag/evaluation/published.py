"""Exact match as published, of the paper's methods and of later ones, to stand beside a run's own figures.

Nothing here was produced by this package: prompts, decoding and the version of the corpus are the authors'. Values are
per cent, kept as they are printed, means included. Rows with an empty `deviation` come from one table and one
protocol; what is known of the others' protocols, and what is not, stands in theirs.
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
# 125 questions: one of them moves its cell by 0.8 points and the mean over seven sets by 0.11.
SMALL_SET = "bamboogle"
SIZES = ("3B", "7B")

# Means of rounded cells may differ from the rounded mean by this much, in points of per cent.
ROUNDING = 0.1


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One published row: exact match in per cent, and the mean over the seven sets.

    em: empty where only the mean could be had. source: where it is printed. deviation: how its protocol differs from
    the paper's (`SETTING`, one model trained on NQ and HotpotQA for all sets), or what of it is not known; empty for
    the paper's own rows.
    """

    method: str
    size: str
    em: dict[str, float]
    mean: float
    source: str = SOURCE
    deviation: str = ""

    @property
    def mean_of_cells(self) -> float:
        return sum(self.em.values()) / len(self.em)

    @property
    def mean_follows(self) -> bool:
        """Whether the printed mean is that of the printed cells, up to rounding; so it is where there are none."""
        return not self.em or abs(self.mean - self.mean_of_cells) < ROUNDING


def _row(
    method: str, size: str, cells: tuple[float, ...], mean: float, source: str = SOURCE, deviation: str = ""
) -> PublishedRow:
    em = dict(zip(BENCHMARKS, cells, strict=True)) if cells else {}
    return PublishedRow(method, size, em, mean, source, deviation)


# Printed means are of three and of four sets, so the mean over seven is worked out from the cells.
_TREE = (
    "arXiv:2509.21240, README of github.com/AMAP-ML/Tree-GRPO",
    "two models, one trained on NQ for the first three sets, one on HotpotQA for the other four",
)
_GIGPO = ("arXiv:2505.10978", "Qwen2.5-Instruct, E5, at most 4 searches; cells not at hand")
_IG = ("arXiv:2604.15148, abstract", "cells, passages a search and training questions not at hand")
_PLUS = (
    "arXiv:2602.19526, abstract",
    "another prompt, and a reward of F1 with penalties; its own Search-R1 has 28.9 (3B) and 40.3 (7B); cells not at "
    "hand",
)
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
    _row("GRPO of Tree-GRPO", "3B", (44.4, 58.0, 42.0, 39.0, 36.3, 15.2, 36.8), 38.8, *_TREE),
    _row("Tree-GRPO", "3B", (46.8, 59.7, 43.6, 42.4, 43.7, 17.8, 43.2), 42.5, *_TREE),
    _row("GiGPO", "3B", (), 42.1, *_GIGPO),
    _row("IG-Search", "3B", (), 43.0, *_IG),
    _row("Search-R1++", "3B", (), 33.1, *_PLUS),
    _row("GRPO of Tree-GRPO", "7B", (45.8, 61.5, 44.3, 42.5, 40.7, 19.1, 43.2), 42.4, *_TREE),
    _row("Tree-GRPO", "7B", (48.1, 63.3, 45.2, 44.6, 42.3, 20.2, 44.0), 44.0, *_TREE),
    _row("GiGPO", "7B", (), 47.2, *_GIGPO),
    _row("Search-R1++", "7B", (), 44.2, *_PLUS),
)


def published_rows(sizes: Iterable[str] = SIZES) -> list[PublishedRow]:
    """The rows of the model sizes asked for, `"3B"` or `"7B"`: the paper's in its order, then the later ones.

    Raises:
        ValueError: for a size that no row has.
    """
    wanted = set(sizes)
    unknown = sorted(wanted - set(SIZES))
    if unknown:
        raise UserError(f"there are no rows for {', '.join(map(repr, unknown))}; choose from {', '.join(SIZES)}")
    return [row for row in ROWS if row.size in wanted]


def label(benchmark: str) -> str:
    """A set's name as tables print it; names that the paper does not have stay as they are."""
    return LABELS.get(benchmark, benchmark)


def ordered(benchmarks: Iterable[str]) -> list[str]:
    """Sets without repetition, the paper's in its order, then all others in the order given."""
    given = list(dict.fromkeys(benchmarks))
    return [name for name in BENCHMARKS if name in given] + [name for name in given if name not in BENCHMARKS]
