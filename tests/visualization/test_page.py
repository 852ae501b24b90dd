"""Pages and text files from plain records: escaped, complete, and readable without colour."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from rex_rag.answers import exact_match
from rex_rag.types import Segment, SegmentKind, Trajectory
from rex_rag.visualization.page import families, trajectory_page, write_trajectory_page
from rex_rag.visualization.records import trajectory_record
from rex_rag.visualization.text import write_trajectory_text

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
        "cut": None,
        "searches": [],
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
    elements = Page(text).elements
    allowed = (
        "html head meta title style body main script h1 h2 ul li section article div span details summary dl dt dd a"
    )
    tools = "fieldset legend label input button kbd"
    assert {tag for tag, _ in elements} == {*allowed.split(), *tools.split()}
    assert [attributes for tag, attributes in elements if tag == "script"] == [{}]
    names = {name for _, attributes in elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "style", "srcdoc")]
    assert {attributes["href"] for tag, attributes in elements if tag == "a"} == {"#t0"}


def test_the_policy_allows_the_pages_own_script_and_style_alone(records):
    # A title that looks like the end of the style must not move what is hashed.
    text = trajectory_page(records, "</style></script>{{BODY}}<!--")
    policy = next(a["content"] for _, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }
    assert "&lt;/style&gt;&lt;/script&gt;{{BODY}}&lt;!--" in text


def test_control_characters_are_spelled_out_so_that_none_reorders_or_hides_text(records):
    records[0]["segments"][1]["text"] = "abc\u202egnp.exe\u202c \u2067x\u2069 \x00\x1b[2J \u200fשלום"
    text = trajectory_page(records, "t")
    for shown in ("U+202E", "U+202C", "U+2067", "U+2069", "U+0000", "U+001B"):
        assert f'<span class="control">{shown}</span>' in text
    assert not set(text) & set("\u202e\u202c\u2067\u2069\x00\x1b")
    assert "\u200fשלום" in text  # a mark that right-to-left text needs


def test_what_has_no_width_is_spelled_out_since_it_makes_an_answer_wrong(records):
    assert not exact_match("Ma\u200bn", ["Man"])
    records[0]["answer"] = "Ma\u200bn \u00ad\ufeff\u2028 \U000e0041"
    text = trajectory_page(records, "t")
    for shown in ("U+200B", "U+00AD", "U+FEFF", "U+2028", "U+E0041"):
        assert f'<span class="control">{shown}</span>' in text
    records[0]["answer"] = "👩\u200d🔬 می\u200cخواهم"  # joiners that scripts need
    assert records[0]["answer"] in trajectory_page(records, "t")


def test_colours_that_are_figures_are_printed(records):
    printed = trajectory_page(records, "t").split("@media print", 1)[1].split("</style>", 1)[0]
    assert re.search(r"\.token, \.swatch \{ print-color-adjust: exact; \}", printed)


def test_half_a_character_is_shown_and_does_not_keep_the_page_from_being_written(records, tmp_path):
    records[0]["segments"][1]["text"] = records[0]["question"] = "half \ud83d"
    write_trajectory_text(records, tmp_path / "page.txt")
    text = write_trajectory_page(records, tmp_path / "page.html", "half \ud83d").read_text(encoding="utf-8")
    assert text.count('half <span class="control">U+D83D</span>') == 2
    assert "<title>half ?</title>" in text


def test_a_probe_stands_beside_its_original_wherever_they_are_in_the_list(records):
    probe, original = records[1], records[0]
    shuffled = [original, {**probe, "parent": 3}, original, original, {**probe, "parent": 2}, {**probe, "parent": 9}]
    assert families(shuffled) == [[0], [2, 4], [3, 1], [5]]
    text = trajectory_page(shuffled, "t")
    assert [int(number) for number in re.findall(r'<article id="t(\d)"', text)] == [0, 2, 4, 3, 1, 5]
    assert text.count('<section class="family pair">') == 2
    # What the probe has from its original is marked as such, the rest is not.
    third = text[text.index('id="t4"') : text.index('id="t3"')]
    assert re.findall(r'class="segment (\w+)( copied)?"', third) == [
        ("policy", " copied"),
        ("probe", ""),
        ("policy", ""),
    ]


def test_records_may_ask_to_stand_beside_another(records):
    first, second, third = ({**records[0], "beside": 0} for _ in range(3))
    assert families([first, second, third]) == [[0, 1, 2]]


def test_passages_fold_under_their_query(records):
    records[0]["searches"] = [{"query": "the <b> thing", "passages": ["p7", "p9"], "segment": 1}]
    summary = re.findall(r"<summary>(.*?)</summary>", trajectory_page(records, "t"))
    length = len(f"<information>Doc 1(Title: T) {HOSTILE}</information>")
    assert summary == [
        '<span class="label">INFORMATION</span> <span class="query">the &lt;b&gt; thing</span> '
        f'<span class="size">({length} characters, passage ids p7, p9)</span>'
    ]


def test_every_trajectory_carries_its_outcome_and_the_filters_count_them(records):
    outcomes = [(0.0, "x"), (1.0, "x"), (0.0, None), (None, "x")]
    shown = [{**records[0], "reward": reward, "answer": answer} for reward, answer in outcomes] + [
        {**records[1], "parent": None}
    ]
    text = trajectory_page(shown, "t", total=1234)
    assert re.findall(r'data-outcome="([^"]*)"', text) == ["wrong", "right", "unanswered", "", "rescued right"]
    for label in ("all (5)", "wrong answer (1)", "right (2)", "rescued (1)", "no answer (1)"):
        assert f"> {label}</label>" in text
    assert "Shown here: 5 of 1,234 trajectories." in text
    # A filter that would show nothing cannot be chosen.
    assert re.findall(r'value="(\w+)" disabled', trajectory_page(records[:1], "t")) == [
        "right",
        "rescued",
        "unanswered",
    ]


def evaluated(answer: str | None, reward: float, benchmark: str = "nq", **more) -> dict:
    segments = [{"kind": "POLICY", "text": "x"}]
    return {
        "question": "Who?",
        "answer": answer,
        "reward": reward,
        "kind": "original",
        "metric": "exact match",
        "benchmark": benchmark,
        "segments": segments,
        **more,
    }


def test_an_evaluation_is_shown_without_trainings_words():
    shown = [evaluated("x", 1.0), evaluated("y", 0.0), evaluated(None, 0.0)]
    text = trajectory_page(shown, "t").split("</style>")[1].split("<script>")[0]
    assert re.findall(r'<h2>#\d <span class="(\w+)">([^<]*)</span>(.*)</h2>', text) == [
        ("right", "right", ""),
        ("wrong", "wrong", ""),
        ("wrong", "no answer", ""),
    ]
    assert not re.search("reward|rescue|original|probe", text, re.IGNORECASE)
    assert "INFORMATION" not in text and text.count(">POLICY<") == 1 + 3  # the legend has what occurs
    assert "judge" not in text and "Benchmark" not in text
    judged = [evaluated("x", 1.0, judged=True), evaluated("y", 0.0, judged=True)]
    text = trajectory_page(judged, "t")
    assert "> judge disagrees (1)</label>" in text
    assert re.findall(r'<span class="disputed">(.*?)</span></h2>', text) == ["judge disagrees"]


def test_several_benchmarks_can_be_told_apart_and_their_names_are_escaped():
    hostile = '"><script>x</script>\u202e'
    text = trajectory_page([evaluated("x", 1.0), evaluated("x", 1.0), evaluated("x", 0.0, hostile)], "t")
    page = Page(text)
    values = [attributes["value"] for tag, attributes in page.elements if tag == "option"]
    assert values == ["", "nq", hostile]
    found = [attributes["data-benchmark"] for tag, attributes in page.elements if tag == "article"]
    assert found == ["nq", "nq", hostile]
    assert ">nq (2)</option>" in text
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 1


def test_facts_of_the_run_head_the_page_escaped():
    text = trajectory_page([evaluated("x", 1.0)], "t", run_facts=[("model", "<b>{{BODY}}\u202e")])
    assert '<dl class="run"><dt>model</dt><dd>&lt;b&gt;{{BODY}}<span class="control">U+202E</span></dd></dl>' in text


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


def test_the_text_file_sends_a_terminal_no_control_sequences(records, tmp_path):
    records[0]["segments"][1]["text"] = "a\tb \x1b[2J\x1b]0;title\x07 \u202egnp.exe"
    records[0]["question"] = "Who? \x1b[31m"
    text = write_trajectory_text(records, tmp_path / "page.txt").read_text()
    assert not set(text) & set("\x1b\x07\u202e")
    assert "    a\tb ·[2J·]0;title· ·gnp.exe\n" in text
    assert "question: Who? ·[31m\n" in text


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
