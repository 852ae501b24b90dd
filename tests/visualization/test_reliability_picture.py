"""Pictures of token reliability, as image and as HTML, from plain data."""

from __future__ import annotations

import math
import re
import struct
import warnings
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from rex_rag.evaluation.token_reliability import TokenReliability
from rex_rag.types import SegmentKind
from rex_rag.visualization.files import write_figure
from rex_rag.visualization.page import trajectory_page
from rex_rag.visualization.reliability_picture import (
    COLOURS,
    MOST_TOKENS,
    draw_reliability,
    level,
    reliability_html,
    reliability_record,
    reliability_style,
    summary,
    with_shared_scale,
)


def token(text: str, aleatoric: float, epistemic: float, kind: SegmentKind = SegmentKind.POLICY) -> TokenReliability:
    return TokenReliability(text, kind, aleatoric, epistemic, -aleatoric * epistemic)


@pytest.fixture
def picture():
    tokens = [
        token(" owl", 0.5, 0.2),
        token("<b>", 0.6, 0.5),
        token("\n\n", 0.1, 0.1),
        token("Doc", 0.1, 0.1, SegmentKind.INFORMATION),
        token("1", 0.1, 0.1, SegmentKind.INFORMATION),
        token("$x$", math.nan, 1.0),
        token("Wait", 0.2, 0.5, SegmentKind.PROBE),
    ]
    return reliability_record("some/model", tokens, 2)


def test_retrieved_text_is_one_box_unless_asked_for(picture):
    assert [entry["text"] for entry in picture["tokens"]] == [
        " owl",
        "<b>",
        "\n\n",
        "[INFORMATION: 2 tokens]",
        "$x$",
        "Wait",
    ]
    tokens = [token("a", 0.1, 0.1), token("b", 0.1, 0.1, SegmentKind.INFORMATION)]
    assert [entry["text"] for entry in reliability_record("m", tokens, 2, inserted=True)["tokens"]] == ["a", "b"]


def test_the_scale_is_shared_and_runs_from_the_lowest_to_the_highest(picture):
    other = reliability_record("other", [token("x", 0.7, 1.0)], 2)
    first, second = with_shared_scale([picture, other])
    assert first["scale"] == second["scale"]
    scale = first["scale"]
    assert scale["reliability"] == pytest.approx([-0.7, -0.01])
    assert (scale["aleatoric"], scale["epistemic"]) == (0.7, 1.0)
    assert [level(value, scale) for value in (-0.7, -0.355, -0.01, -5.0, 0.0)] == [0, 4, 8, 0, 8]
    assert level(-0.5, {"reliability": [-0.5, -0.5]}) == 8


def test_means_are_over_the_rated_tokens(picture):
    # -0.1, -0.3, -0.01, -0.1 over four tokens; AU 0.5, 0.6, 0.1, 0.2; EU 0.2, 0.5, 0.1, 0.5
    assert summary(picture) == "5 tokens, mean reliability -0.1275, AU 0.350, EU 0.325; 1 without evidence"
    assert summary(reliability_record("m", [], 2)) == "0 tokens"


def test_html_gives_colours_bars_and_figures_and_escapes_the_text(picture):
    text = reliability_html(picture)
    boxes = re.findall(r'<span class="token (\w+)"(?: title="([^"]*)")?>(.*?)(?:<svg|</span>)', text)
    # From -0.3 (0) to -0.01 (8): -0.1 is 0.69 of the way up.
    assert boxes == [
        ("r6", "reliability -0.1000, AU 0.5000, EU 0.2000", " owl"),
        ("r0", "reliability -0.3000, AU 0.6000, EU 0.5000", "&lt;b&gt;"),
        ("r8", "reliability -0.0100, AU 0.1000, EU 0.1000", "⏎⏎"),
        ("inserted", "", "[INFORMATION: 2 tokens]"),
        ("none", "EU 1.0000", "$x$"),
        ("r6", "reliability -0.1000, AU 0.2000, EU 0.5000", "Wait"),
    ]
    owl = text[text.index(" owl<svg") :]
    # AU 0.5 of at most 0.6, EU 0.2 of at most 1.
    assert re.findall(r'class="(au|eu)"[^>]* width="([\d.]+)"', owl)[:2] == [("au", "83.3"), ("eu", "20.0")]
    assert "hatched: no evidence" in text


def test_the_trajectory_page_shows_it_and_knows_its_colours(picture):
    record = {"question": "?", "segments": [], "reliability": picture}
    text = trajectory_page([record], "t")
    assert reliability_html(picture) in text
    for step, colour in enumerate(COLOURS):
        assert re.search(rf"\.r{step} {{ background: {colour};", text)
    assert reliability_style() in text


def contrast(colour: str, other: str) -> float:
    """WCAG 2's contrast of two colours, 1 to 21."""

    def luminance(text: str) -> float:
        shares = (int(text[place : place + 2], 16) / 255 for place in (1, 3, 5))
        red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_on_every_colour_and_colours_grow_lighter_without_hue():
    for rule in reliability_style().splitlines():
        ground, text = re.search(r"background: (#\w{6}); color: (#\w{3});", rule).groups()
        assert contrast(ground, "#" + "".join(2 * digit for digit in text[1:])) >= 4.5, rule
    lightness = [contrast(colour, "#000000") for colour in COLOURS]
    assert all(after > 1.1 * before for before, after in pairwise(lightness))


def test_png_and_svg_are_drawn_with_every_text_as_text(picture, tmp_path):
    other = reliability_record("other", [token("xyz", 0.6, 0.3)] * 5, 2)
    title = "Which $isle$ <is> it?"
    png = draw_reliability([picture, other], tmp_path / "a.png", title).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", png[16:20])[0] > 1400
    svg = draw_reliability([picture, other], tmp_path / "a.svg", title).read_text()
    for shown in ("Which $isle$ &lt;is&gt; it?", "some/model", "other", "&lt;b&gt;", "$x$", "⏎⏎", "Wait", "xyz"):
        assert f">{shown}</text>" in svg, shown
    # Lowest: 0.6 * 0.5; highest: 0.1 * 0.1.
    assert ">reliability -AU·EU from -0.3000 (dark) to -0.0100 (light); k = 2</text>" in svg
    assert svg.count(COLOURS[0]) >= 2  # the legend and the least reliable token
    changed = reliability_record("other", [token("xyz", 0.6, 0.3)] * 4 + [token("xyz", 0.6, 0.45)], 2)
    assert draw_reliability([picture, changed], tmp_path / "b.png", title).read_bytes() != png


def test_long_wide_and_strange_tokens_are_drawn_within_bounds(tmp_path):
    strange = ["a" * 500, "\u202eevil", "\x00\x1b[2J", "", "\ufffd", "\ud83d"]
    tokens = [token(text, 0.1, 0.1) for text in strange + ["w"] * MOST_TOKENS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_reliability([reliability_record("m", tokens, 2)], tmp_path / "a.svg", "q" * 500)
    text = path.read_text()
    assert f">[{len(strange)} more tokens]</text>" in text
    assert text.count(">w</text>") == MOST_TOKENS - len(strange)
    assert "\u202e" not in text and ">·evil</text>" in text


def test_a_question_in_wide_characters_and_a_long_name_stay_on_the_picture(tmp_path):
    question = "日本の首都はどこですか" * 20  # 220 characters, each as wide as two
    picture = reliability_record("m" * 100, [token("a", 0.1, 0.1)], 2)
    text = draw_reliability([picture], tmp_path / "a.svg", question).read_text()
    lines = re.findall(r">([日本の首都はどこですか]+)</text>", text)
    assert "".join(lines) == question
    assert {len(line) for line in lines[:-1]} == {36}
    assert f">{'m' * 71}…</text>" in text
    words = draw_reliability([picture], tmp_path / "b.svg", "Where is it? " * 12).read_text()
    assert re.findall(r">((?:Where|is|it\?| )+)</text>", words) == [
        "Where is it? Where is it? Where is it? Where is it? Where is it? Where",
        "is it? Where is it? Where is it? Where is it? Where is it? Where is it?",
        "Where is it?",
    ]


def test_what_the_font_lacks_is_said_in_one_line_and_of_pixels_alone(tmp_path, caplog):
    # Private use: no font has them, whichever is installed. The second is in the question and in a token.
    lacking = "\ue123 \ue124 \ue124"
    picture = reliability_record("m", [token("\ue124", 0.1, 0.1)], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = draw_reliability([picture], tmp_path / "a.svg", lacking).read_text()
        assert f">{lacking}</text>" in svg and caplog.messages == []
        png = draw_reliability([picture], tmp_path / "a.png", lacking)
    assert caplog.messages == [
        f"{png}: the font has no U+E123 U+E124, drawn as boxes; a name ending in .svg keeps such text, for the "
        "reader's fonts"
    ]
    caplog.clear()
    draw_reliability([picture], tmp_path / "a.png", "".join(map(chr, range(0xE000, 0xE01A))))
    assert " U+E013 and 7 more, drawn as boxes" in caplog.messages[0]
    caplog.clear()
    draw_reliability([reliability_record("m", [token("é", 0.1, 0.1)], 2)], tmp_path / "a.png", "Dvořák?")
    assert caplog.messages == []


def test_other_warnings_of_drawing_still_reach_the_caller(tmp_path):
    class Warned(Figure):
        def savefig(self, *args, **kwargs):
            warnings.warn("something else", RuntimeWarning, stacklevel=1)
            super().savefig(*args, **kwargs)

    with pytest.warns(RuntimeWarning, match="something else"):
        write_figure(Warned(), tmp_path / "a.svg", dpi=50)


def test_nothing_to_draw_and_other_formats_are_refused(picture, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_reliability([], tmp_path / "a.png", "t")
    with pytest.raises(ValueError, match=r"a\.jpg does not say what picture to draw"):
        draw_reliability([picture], tmp_path / "a.jpg", "t")
    assert list(tmp_path.iterdir()) == []
