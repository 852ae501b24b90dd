"""The published rows: what is printed, and where the printed means do not follow from the cells."""

from __future__ import annotations

import pytest

from rex_rag.evaluation.published import BENCHMARKS, ROWS, SOURCE, label, ordered, published_rows

PAPER = [row for row in ROWS if not row.deviation]


def test_every_row_has_the_seven_sets_in_per_cent_or_its_mean_alone():
    assert len(PAPER) == 16 and len(ROWS) == 25
    for row in ROWS:
        assert tuple(row.em) in (BENCHMARKS, ())
        assert all(0 < value < 100 for value in [*row.em.values(), row.mean])
    assert all(row.em and row.source == SOURCE for row in PAPER), "one table, one protocol"
    assert all("arXiv:" in row.source and row.source != SOURCE for row in ROWS if row.deviation)


def test_both_sizes_hold_the_papers_methods_in_the_same_order():
    small, large = ([row.method for row in published_rows([size])] for size in ("3B", "7B"))
    assert small[:8] == large[:8]
    assert small[0] == "RAG" and small[7] == "REX-RAG"
    assert small[8:] == ["GRPO of Tree-GRPO", "Tree-GRPO", "GiGPO", "IG-Search", "Search-R1++"]
    assert large[8:] == ["GRPO of Tree-GRPO", "Tree-GRPO", "GiGPO", "Search-R1++"]


def test_the_means_over_seven_sets_of_later_rows():
    means = {(row.method, row.size): row.mean for row in ROWS if row.deviation}
    assert means == {
        ("GRPO of Tree-GRPO", "3B"): 38.8,
        ("Tree-GRPO", "3B"): 42.5,  # 297.2 / 7
        ("GiGPO", "3B"): 42.1,
        ("IG-Search", "3B"): 43.0,
        ("Search-R1++", "3B"): 33.1,
        ("GRPO of Tree-GRPO", "7B"): 42.4,
        ("Tree-GRPO", "7B"): 44.0,  # 307.7 / 7
        ("GiGPO", "7B"): 47.2,
        ("Search-R1++", "7B"): 44.2,
    }
    worked_out = [row for row in ROWS if row.deviation and row.em]
    assert [round(row.mean_of_cells, 1) for row in worked_out] == [row.mean for row in worked_out]


def test_the_papers_own_rows():
    small, large = (row for row in ROWS if row.method == "REX-RAG")
    assert list(small.em.values()) == [43.9, 60.4, 44.2, 37.4, 39.7, 14.5, 31.2]
    assert list(large.em.values()) == [45.5, 62.6, 44.3, 42.2, 43.7, 19.7, 44.8]
    assert (small.mean, large.mean) == (38.7, 43.2)
    assert small.mean_of_cells == pytest.approx(271.3 / 7)  # 38.757
    assert small.mean_follows and large.mean_follows


def test_three_printed_means_are_not_those_of_their_cells():
    odd = {(row.method, row.size): round(row.mean_of_cells, 1) for row in ROWS if not row.mean_follows}
    assert odd == {("RAG", "3B"): 25.9, ("IRCoT", "7B"): 22.6, ("Search-R1-base (GRPO)", "7B"): 34.6}


def test_a_size_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows for '14B'; choose from 3B, 7B"):
        published_rows(["7B", "14B"])


def test_sets_stand_in_the_papers_order_and_others_behind():
    assert ordered(["own", "bamboogle", "nq", "own"]) == ["nq", "bamboogle", "own"]
    assert [label(name) for name in ("2wikimultihopqa", "own")] == ["2Wiki", "own"]
