"""Training curves: what is read, how runs are named, and that the picture shows them."""

from __future__ import annotations

import json
import math
import struct
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

from rex_rag.visualization import curves
from rex_rag.visualization.curves import curve, labelled_runs, plot_training_curves, read_log_history, running_mean


def rows(count: int, **metrics: float) -> list[dict]:
    return [{"step": step, **{name: value * step for name, value in metrics.items()}} for step in range(1, count + 1)]


def drawn_axes(runs: dict[str, list[dict]], every_panel: bool = False) -> list[Axes]:
    """The panels of a picture, as matplotlib holds them before they are saved."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "write_figure", lambda figure, path, dpi: figures.append(figure))
        plot_training_curves(runs, "curves.png", every_panel=every_panel)
    return figures[0].axes


def write_state(folder, history) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": len(history), "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_curve_keeps_finite_values_of_rows_with_a_step():
    log = [
        {"step": 1, "em/probes": 0.25},
        {"step": 2, "em/probes": math.nan},
        {"step": 3},
        {"step": 4, "em/probes": "n/a"},
        {"em/probes": 0.75},
        {"step": 6, "em/probes": 1},
    ]
    assert curve(log, "em/probes") == ([1.0, 6.0], [0.25, 1.0])


def test_steps_that_a_resumed_run_logs_again_count_once():
    log = [{"step": step, "kl": 0.1} for step in (1, 2, 3)] + [{"step": step, "kl": 0.2} for step in (2, 3, 4)]
    assert curve(log, "kl") == ([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.2, 0.2])


def test_a_running_mean_takes_what_there_is_at_the_ends():
    steps = [1.0, 2.0, 3.0, 4.0]
    assert running_mean(steps, [1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11 / 3, 4.5]
    assert running_mean(steps, [1.0, 2.0, 6.0, 3.0], 2) == [1.5, 4.0, 4.5, 3.0]
    assert running_mean(steps[:2], [1.0, 2.0], 1) == [1.0, 2.0]


def test_a_running_mean_is_over_steps_however_many_of_them_have_a_value():
    assert running_mean([10.0, 20.0, 21.0, 30.0], [1.0, 2.0, 6.0, 3.0], 4) == [1.0, 4.0, 4.0, 3.0]
    # Rows of seven evaluation sets are not seven steps, and their few values stay as they are.
    sets = [{"step": step, f"eval_{name}_em/originals": step / 1000} for step in (100, 200) for name in "abcdefg"]
    axes = drawn_axes({"ours": [*rows(200, kl=1), *sets], "theirs": rows(10, kl=1)})
    assert axes[0].figure.legends[0].get_title().get_text() == "running means over 8 steps, single steps behind"
    [panel] = [each for each in axes if each.get_title() == "Does it learn?"]
    assert [line.get_ydata().tolist() for line in panel.get_lines()] == [[0.1, 0.2]] * 14  # values and their means


def test_curves_of_two_runs_with_missing_metrics(tmp_path):
    runs = {
        "rex_rag": [{"step": step, "em/originals": step / 10, "em/probes": math.nan} for step in range(1, 11)]
        + [{"train_runtime": 1.0}],
        "grpo $x$": [{"step": step, "em/originals": step / 20, "kl": -0.001 * step} for step in range(1, 11)],
    }
    path = plot_training_curves(runs, tmp_path / "deeper" / "curves.png", "Two runs")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1650, 682)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    # The same picture with one value changed is another picture: the curves are really drawn.
    runs["grpo $x$"][5]["em/originals"] = 1.0
    assert plot_training_curves(runs, tmp_path / "other.png", "Two runs").read_bytes() != data


def test_an_svg_names_runs_metrics_and_what_was_not_logged_as_text(tmp_path):
    runs = {"ours": rows(100, **{"em/originals": 0.01}), "theirs, $unpaired": rows(40, kl=0.1)}
    text = plot_training_curves(runs, tmp_path / "c.svg", "Cost: $1 & <more>").read_text()
    for shown in ("ours", "theirs, $unpaired", "training, sampled", "signal/trained", "Cost: $1 &amp; &lt;more&gt;"):
        assert f">{shown}</text>" in text, shown
    # The longest run has 100 steps: means over 100 // 25 of them.
    assert ">running means over 4 steps, single steps behind</text>" in text
    assert plot_training_curves(runs, tmp_path / "d.svg", "Cost: $1 & <more>").read_text() == text


def test_evaluation_sets_stand_beside_the_training_questions_where_there_are_any(tmp_path):
    log = [*rows(3, kl=1), {"step": 3, "eval_nq_em/originals": 0.2}, {"step": 3, "eval_hotpotqa_em/originals": 0.1}]
    text = plot_training_curves({"ours": log, "theirs": rows(3, kl=2)}, tmp_path / "c.svg").read_text()
    for shown in ("nq", "hotpotqa"):
        assert f">{shown}</text>" in text, shown
    learns, *_ = drawn_axes({"ours": [{"step": 1, "eval_em/originals": 0.25, "em/originals": 0.5}]})
    labels = {line.get_label(): line.get_ydata().tolist() for line in learns.get_lines()}
    assert labels == {"training, sampled": [0.5], "evaluation questions": [0.25]}


def test_six_panels_ask_a_question_each_and_a_flag_draws_the_rest():
    log = {"ours": rows(3, kl=1)}
    asked, everything = drawn_axes(log), drawn_axes(log, every_panel=True)
    assert len(asked) == 6 and all(axes.get_title().endswith("?") for axes in asked)
    titles = [axes.get_title() for axes in everything]
    assert titles[:6] == [axes.get_title() for axes in asked] and len(set(titles)) == len(titles) > 12


def test_ten_runs_look_different_each():
    axes = drawn_axes({f"run {number}": rows(3, kl=0.1) for number in range(10)})
    [legend] = axes[0].figure.legends
    looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    assert len(looks) == len(set(looks)) == 10
    # Each line is drawn as the legend says.
    [panel] = [each for each in axes if each.get_title() == "Is it healthy?"]
    assert [(line.get_color(), line.get_marker()) for line in panel.get_lines()] == looks


def test_names_that_no_svg_can_hold_are_drawn_without_what_it_cannot(tmp_path):
    # As a folder whose name is not UTF-8 comes from the command line.
    runs = {"a\udcff": rows(3, kl=1), "b\x1b\u202e": rows(3, kl=2)}
    text = plot_training_curves(runs, tmp_path / "c.svg", "\x00 of\ntwo").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    for shown in ("a·", "b··", "· of⏎two"):
        assert f">{shown}</text>" in text, shown


def test_one_run_is_drawn_as_logged(tmp_path):
    text = plot_training_curves({"one": rows(100, kl=0.1)}, tmp_path / "c.svg").read_text()
    assert "running means" not in text


def test_curves_without_any_metric(tmp_path):
    assert plot_training_curves({"empty": []}, tmp_path / "curves.png").stat().st_size > 10_000


def test_another_format_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"curves\.pdf does not say what picture to draw; end its name in \.png or"):
        plot_training_curves({}, tmp_path / "curves.pdf")
    assert list(tmp_path.iterdir()) == []


def test_history_comes_from_the_run_or_its_newest_checkpoint_whichever_has_come_further(tmp_path):
    write_state(tmp_path / "run" / "checkpoint-9", rows(9, kl=1))
    write_state(tmp_path / "run" / "checkpoint-10", rows(10, kl=1))
    assert len(read_log_history(tmp_path / "run")) == 10  # by number: as text, 9 would come last
    write_state(tmp_path / "run", rows(11, kl=1))
    assert len(read_log_history(tmp_path / "run")) == 11
    write_state(tmp_path / "run" / "checkpoint-12", rows(12, kl=1))  # a finished run is trained on
    assert len(read_log_history(tmp_path / "run")) == 12
    assert len(read_log_history(tmp_path / "run" / "checkpoint-9" / "trainer_state.json")) == 9


def test_what_is_no_history_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither log\.jsonl nor trainer_state\.json in"):
        read_log_history(tmp_path)
    file = tmp_path / "trainer_state.json"
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "no list `log_history`"),
        ('{"log_history": [1]}', "no list"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_log_history(tmp_path)


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    a, b, odd = tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "lr=3"
    for folder in (a, b, odd):
        folder.mkdir(parents=True)
    assert labelled_runs([str(a)]) == {"out": a}
    assert labelled_runs([str(a), str(b)]) == {"a/out": a, "b/out": b}
    assert labelled_runs([f"first={a}", str(b)]) == {"first": a, "out": b}
    assert labelled_runs([str(odd)]) == {"lr=3": odd}
    with pytest.raises(ValueError, match="two runs are called 'x'"):
        labelled_runs([f"x={a}", f"x={b}"])
    with pytest.raises(ValueError, match="two runs are called"):
        labelled_runs([str(a), str(a)])


def test_a_spike_does_not_hide_the_other_lines():
    log = [{"step": step, "kl": 0.02, "kl/policy": 0.01, "kl/probe": 0.5} for step in range(1, 51)]
    log[25] |= {"kl": 40.0, "kl/probe": 1076.0}
    drawn = drawn_axes({"ours": log}, every_panel=True)
    [kl] = [axes for axes in drawn if axes.get_title() == "KL by kind of token"]
    heights = [kl.transData.transform((0, value))[1] for value in (0.0, 0.01, 0.5, 1076.0)]
    shares = [(height - heights[0]) / (heights[-1] - heights[0]) for height in heights]
    assert shares[1] > 0.1 and shares[2] > 0.4  # on a linear scale 0.00001 and 0.0005
    [healthy] = [axes for axes in drawn if axes.get_title() == "Is it healthy?"]
    assert healthy.get_yscale() == "symlog"
    [calm] = [axes for axes in drawn_axes({"ours": rows(50, kl=0.02)}) if axes.get_title() == "Is it healthy?"]
    assert calm.get_yscale() == "linear"


def test_lines_of_unlike_height_keep_a_linear_scale_where_only_a_spike_would_hide_them():
    def cost(spike: float) -> Axes:
        log = [{"step": step, "step_time": 5.0, "seconds/retrieval": 0.01} for step in range(1, 51)]
        log[25]["step_time"] = spike
        [panel] = [axes for axes in drawn_axes({"ours": log}) if axes.get_title() == "What does it cost?"]
        return panel

    assert cost(5.0).get_yscale() == "linear"
    stalled = cost(600.0)
    low, usual, high = (stalled.transData.transform((0, value))[1] for value in (0.0, 5.0, 600.0))
    assert stalled.get_yscale() == "symlog" and (usual - low) / (high - low) > 0.4
