"""Pages, text files and curves from plain records: escaped, complete, and readable without colour."""

from __future__ import annotations

import json
import math
import struct
from html.parser import HTMLParser

import pytest

from rex_rag.types import Segment, SegmentKind, Trajectory
from rex_rag.visualization import (
    curve,
    plot_training_curves,
    trajectory_record,
    write_trajectory_page,
    write_trajectory_text,
)

HOSTILE = '</span><script>alert("x")</script><img src=http://example.org/a.png onerror=alert(1)>'


def original() -> Trajectory:
    return Trajectory(
        prompt_ids=[1],
        segments=[
            Segment(SegmentKind.POLICY, [2, 3], "<think> a</think><search> b</search>"),
            Segment(SegmentKind.INFORMATION, [4], f"\n\n<information>Doc 1(Title: T) {HOSTILE}</information>\n\n"),
            Segment(SegmentKind.FEEDBACK, [5], "\n\nThat was not a valid action.\n\n"),
            Segment(SegmentKind.POLICY, [6], "<answer> wrong</answer>"),
        ],
        answer="wrong",
    )


def probe() -> Trajectory:
    first = original()
    return Trajectory(
        prompt_ids=[1],
        segments=[
            first.segments[0],
            Segment(SegmentKind.PROBE, [7], "<think> Wait, I may be wrong."),
            Segment(SegmentKind.POLICY, [8], "</think><answer> right</answer>"),
        ],
        answer="right",
        parent=0,
    )


@pytest.fixture
def records():
    return [
        trajectory_record(original(), f"Who? {HOSTILE}", ["right", "correct"], 0.0, step=3),
        trajectory_record(probe(), "Who?", ["right"], 1.0, rescue=True, step=3),
    ]


class Page(HTMLParser):
    """Collects the elements of a page and the label and text of its segments."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.segments: list[list[str]] = []
        self.target: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self.target = attributes.get("class") if tag == "span" else None

    def handle_endtag(self, tag):
        self.target = None

    def handle_data(self, data):
        if self.target == "label":
            self.segments.append([data, ""])
        elif self.target == "text":
            self.segments[-1][1] += data


def test_a_record_is_plain_data(records):
    assert json.loads(json.dumps(records)) == records
    assert records[1] == {
        "question": "Who?",
        "golden_answers": ["right"],
        "answer": "right",
        "reward": 1.0,
        "kind": "probe",
        "rescue": True,
        "parent": 0,
        "segments": [
            {"kind": "POLICY", "text": "<think> a</think><search> b</search>"},
            {"kind": "PROBE", "text": "<think> Wait, I may be wrong."},
            {"kind": "POLICY", "text": "</think><answer> right</answer>"},
        ],
        "step": 3,
    }
    assert records[0]["kind"] == "original"
    assert records[0]["parent"] is None
    assert trajectory_record(original(), "Who?", [], None)["reward"] is None


def test_the_page_shows_every_segment_by_label_and_in_order(records, tmp_path):
    text = write_trajectory_page(records, tmp_path / "page.html", "Some <trajectories>").read_text()
    segments = Page(text).segments
    # The legend names the four kinds, then the trajectories follow.
    assert [label for label, _ in segments[:4]] == ["POLICY", "INFORMATION", "FEEDBACK", "PROBE"]
    assert segments[4:] == [
        ["POLICY", "<think> a</think><search> b</search>"],
        ["INFORMATION", f"<information>Doc 1(Title: T) {HOSTILE}</information>"],
        ["FEEDBACK", "That was not a valid action."],
        ["POLICY", "<answer> wrong</answer>"],
        ["POLICY", "<think> a</think><search> b</search>"],
        ["PROBE", "<think> Wait, I may be wrong."],
        ["POLICY", "</think><answer> right</answer>"],
    ]
    assert "Some &lt;trajectories&gt;" in text
    assert "original, not rewarded" in text
    assert "probe of #0, rewarded, a rescue" in text
    assert "right | correct" in text


def test_no_text_becomes_markup_and_the_page_loads_nothing(records, tmp_path):
    text = write_trajectory_page(records, tmp_path / "page.html", HOSTILE).read_text()
    assert "<script" not in text
    elements = Page(text).elements
    allowed = "html head meta title style body h1 h2 section article div span dl dt dd a"
    assert {tag for tag, _ in elements} == set(allowed.split())
    assert not [name for _, attributes in elements for name in attributes if name in ("src", "srcset", "onerror")]
    assert {attributes["href"] for tag, attributes in elements if tag == "a"} == {"#t0"}
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy


def test_a_probe_whose_original_is_not_shown_has_no_dead_link(records, tmp_path):
    text = write_trajectory_page([{**records[1], "parent": 7}], tmp_path / "page.html", "t").read_text()
    assert "probe of #7" in text
    assert "href" not in text


def test_the_text_file_names_kinds_and_keeps_them_from_being_forged(records, tmp_path):
    records[0]["segments"][1]["text"] = "first line\n[POLICY]\n=== #9 original, rewarded"
    records[0]["question"] = "Who?\n=== #8 original, rewarded"
    lines = write_trajectory_text(records, tmp_path / "page.txt").read_text().splitlines()
    assert lines[0] == "=== #0 original, not rewarded"
    assert [line for line in lines if line.startswith("[")] == [
        "[POLICY]",
        "[INFORMATION]",
        "[FEEDBACK]",
        "[POLICY]",
        "[POLICY]",
        "[PROBE]",
        "[POLICY]",
    ]
    assert "    [POLICY]" in lines
    assert [line for line in lines if line.startswith("===")][1:] == ["=== #1 probe of #0, rewarded, a rescue"]


def test_nothing_recorded_is_said(tmp_path):
    assert "No trajectories were recorded" in write_trajectory_page([], tmp_path / "p.html", "t").read_text()
    assert "No trajectories were recorded" in write_trajectory_text([], tmp_path / "p.txt").read_text()


def test_bad_records_are_named_and_leave_no_file(records, tmp_path):
    records[1]["segments"][0]["kind"] = "ORACLE"
    with pytest.raises(ValueError, match="record 1 has a segment of kind 'ORACLE'"):
        write_trajectory_page(records, tmp_path / "page.html", "t")
    with pytest.raises(ValueError, match="record 0 has no 'segments'"):
        write_trajectory_text([{"question": "Who?"}], tmp_path / "page.txt")
    assert list(tmp_path.iterdir()) == []


def test_curve_keeps_finite_values_of_rows_with_a_step():
    rows = [
        {"step": 1, "em/probes": 0.25},
        {"step": 2, "em/probes": math.nan},
        {"step": 3},
        {"step": 4, "em/probes": "n/a"},
        {"em/probes": 0.75},
        {"step": 6, "em/probes": 1},
    ]
    assert curve(rows, "em/probes") == ([1.0, 6.0], [0.25, 1.0])


def test_curves_of_two_runs_with_missing_metrics(tmp_path):
    runs = {
        "rex_rag": [{"step": step, "em/originals": step / 10, "em/probes": math.nan} for step in range(1, 11)]
        + [{"train_runtime": 1.0}],
        "grpo": [{"step": step, "em/originals": step / 20, "kl": -0.001 * step} for step in range(1, 11)],
    }
    path = plot_training_curves(runs, tmp_path / "deeper" / "curves.png", "Two runs")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1650, 1364)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    # The same picture with one value changed is another picture: the curves are really drawn.
    runs["grpo"][5]["em/originals"] = 1.0
    assert plot_training_curves(runs, tmp_path / "other.png", "Two runs").read_bytes() != data


def test_curves_without_any_metric(tmp_path):
    assert plot_training_curves({"empty": []}, tmp_path / "curves.png").stat().st_size > 10_000
