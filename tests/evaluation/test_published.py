"""The published rows: what is printed, and where the printed means do not follow from the cells."""

from __future__ import annotations

import pytest

from rex_rag.evaluation.published import BENCHMARKS, ROWS, label, ordered, published_rows


def test_every_row_has_the_seven_sets_in_per_cent():
    assert len(ROWS) == 16
    for row in ROWS:
        assert tuple(row.em) == BENCHMARKS
        assert all(0 < value < 100 for value in row.em.values())


def test_both_sizes_hold_the_same_methods_in_the_same_order():
    small = [row.method for row in published_rows(["3B"])]
    assert small == [row.method for row in published_rows(["7B"])]
    assert small[0] == "RAG" and small[-1] == "REX-RAG" and len(small) == 8


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
