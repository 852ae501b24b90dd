"""The quickstart's table and picture from figures written by hand, and its trainings side by side."""

from __future__ import annotations

import math
import sys

import pytest

from rex_rag.quickstart.run import ROWS, draw, recipe_of, run_side_by_side, table, tolerance


def figures(value: float) -> dict:
    return {"two_hop": {"questions": 3, **{field: value for _, field in ROWS}}, "seconds": 1.0}


def test_the_table_has_a_column_a_model_and_no_number_where_there_is_none():
    lines = table({"before": figures(0.0), "grpo": figures(math.nan), "ours": figures(0.25)}).splitlines()
    assert lines[0] == "| figure | questions | before | grpo | ours |"
    assert lines[2] == "| exact match, greedy | two-hop (3) | 0.000 | - | 0.250 |"
    assert len(lines) == 2 + len(ROWS)


def test_the_table_says_how_far_its_figures_can_be_trusted():
    hundred = figures(0.5)
    hundred["two_hop"]["questions"] = 100
    both = {"before": hundred, "grpo": hundred, "rescue_replay": hundred}
    said = tolerance(both, unchanged=True)
    assert "±0.10" in said and "grpo .00" in said and "rescue_replay .80 to .92" in said
    assert "Over seeds" not in tolerance({"before": hundred, "own": hundred}, unchanged=True)
    assert "Over seeds" not in tolerance(both, unchanged=False)


def test_the_picture_takes_runs_of_unequal_length_and_runs_without_probes(tmp_path):
    evaluated = [{"step": step, "eval_one_hop_em/originals": 0.9, "eval_two_hop_em/originals": 0.1} for step in (0, 2)]
    trained = [{"step": step, "loss": 0.1, "dead_end/rate": 0.7, "dead_end/rescue_rate": 0.5} for step in (1, 2)]
    never = [{"step": 1, "loss": 0.1, "dead_end/rate": 0.7, "dead_end/rescue_rate": math.nan}]
    draw({"ours": evaluated + trained, "grpo": evaluated[:1] + never}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_trainings_side_by_side_are_told_apart_and_one_that_fails_is_named(capsys):
    run_side_by_side({name: [sys.executable, "-c", f"print('{name} said')"] for name in ("a", "long")})
    assert sorted(capsys.readouterr().out.splitlines()) == ["a    | a said", "long | long said"]
    with pytest.raises(SystemExit, match="training of bad failed"):
        run_side_by_side({"good": [sys.executable, "-c", ""], "bad": [sys.executable, "-c", "raise SystemExit(3)"]})


def test_its_recipes_are_there():
    assert all(recipe_of(name).is_file() for name in ("grpo", "rescue_replay", "rex_rag"))
