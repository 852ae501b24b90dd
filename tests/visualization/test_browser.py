"""The trajectory page in a real Chromium: nothing in a text runs, and filters, search and folding do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rex_rag.visualization.page import trajectory_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")

TITLE = "Trajectories"
HOSTILE = (
    "</span></details></article></main></title></style></script>"
    "<script>document.title = 'ran: script'</script>"
    '<img src="missing.png" onerror="document.title = \'ran: image\'">'
    "<svg onload=\"document.title = 'ran: svg'\"></svg>"
    "<iframe srcdoc=\"&lt;script&gt;parent.document.title = 'ran: frame'&lt;/script&gt;\"></iframe>"
    '<meta http-equiv=refresh content="0; url=data:text/html,<title>ran: refresh</title>">'
    "<input autofocus onfocus=\"document.title = 'ran: focus'\"> javascript:document.title='ran: link' "
    "<information>Doc 1(Title: T)</information><answer> forged </answer><search> forged </search> "
    "\u202egnp.exe\u202c \u2066hidden\u2069 \x00 &amp;lt; {{BODY}} <!-- ]]>"
)


def record(answer: str | None, reward: float, text: str = HOSTILE, **more) -> dict:
    segments = [
        {"kind": "POLICY", "text": f"<search> {text} </search>"},
        {"kind": "INFORMATION", "text": f"<information>Doc 1(Title: {text}) {text}</information>"},
        {"kind": "FEEDBACK", "text": text},
        {"kind": "POLICY", "text": text},
    ]
    return {
        "question": text,
        "golden_answers": [text],
        "answer": answer,
        "reward": reward,
        "kind": "original",
        "segments": segments,
        "notes": {text: text},
        "benchmark": text,
        "searches": [{"query": text, "passages": [text]}],
        **more,
    }


def hostile_records() -> list[dict]:
    token = {"text": HOSTILE, "kind": "POLICY", "aleatoric": 0.5, "epistemic": 0.1, "reliability": -0.05}
    probe = {"kind": "probe", "rescue": True, "parent": 0}
    wrong = record(HOSTILE, 0.0, reliability={"model": HOSTILE, "k": 2, "tokens": [token]})
    return [
        wrong,
        record(HOSTILE, 1.0, **probe),
        record(None, 0.0, text="an owl in the oak"),
        record("x", 0.0, text="a fox"),
    ]


def browse(page: Path, fragment: str = "") -> str:
    """The page's document after its script has run, as HTML."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), profile, f"{page.as_uri()}{fragment}"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode("utf-8", errors="replace")


def write(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8", errors="replace")
    return page


def title_of(document: str) -> str:
    return re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]


def shown(document: str) -> list[int]:
    """The trajectories that the filters leave on the page."""
    families = re.findall(r'<section class="family[^"]*"( hidden="")?>(.*?)</section>', document, re.DOTALL)
    return [int(number) for hidden, body in families if not hidden for number in re.findall(r'id="t(\d+)"', body)]


def test_nothing_in_a_text_runs(tmp_path: Path):
    document = browse(write(tmp_path, trajectory_page(hostile_records(), TITLE)))
    assert title_of(document) == TITLE
    # The page is whole, and its own script did run.
    assert shown(document) == [0, 1, 2, 3]
    assert ">4 of 4</span>" in document
    assert not re.search(r"<(img|iframe|svg onload|input autofocus)", document)


@pytest.mark.parametrize("protected", [True, False])
def test_were_escaping_to_fail_the_policy_would_still_hold(tmp_path: Path, protected: bool):
    text = trajectory_page(hostile_records()[2:], TITLE)
    raw = HOSTILE.replace("<meta", "<hr").replace("</main>", "")
    text = text.replace("</h2>", f"</h2>{raw}", 1)
    if not protected:
        # Without the policy the same text does run: what the other tests look for can be seen.
        text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
    assert title_of(browse(write(tmp_path, text))).startswith("ran: ") is not protected


@pytest.mark.parametrize(
    ("fragment", "left", "count"),
    [
        ("#show=rescued", [0, 1], "1 of 4"),  # beside the original it left
        ("#show=wrong", [0, 1, 3], "2 of 4"),
        ("#find=OWL+in", [2], "1 of 4"),
        ("#show=wrong&find=owl", [], "0 of 4"),
        ("#show=unanswered&find=owl", [2], "1 of 4"),
        ("#show=nonsense", [0, 1, 2, 3], "4 of 4"),
    ],
)
def test_filters_and_search(tmp_path: Path, fragment: str, left: list[int], count: str):
    document = browse(write(tmp_path, trajectory_page(hostile_records(), TITLE)), fragment)
    assert shown(document) == left
    assert f">{count}</span>" in document


@pytest.mark.parametrize(
    ("fragment", "left", "all_wrong_right"),
    [
        ("", [0, 1, 2, 3], [4, 3, 1]),
        ("#benchmark=nq", [1], [1, 1, 0]),
        ("#benchmark=a+%22b%22+%26+c", [2, 3], [2, 1, 1]),
        ("#benchmark=%2Ftraining", [0], [1, 1, 0]),
        ("#benchmark=a+%22b%22+%26+c&show=right", [3], [2, 1, 1]),
        ("#benchmark=nonsense", [0, 1, 2, 3], [4, 3, 1]),
    ],
)
def test_a_benchmark_is_chosen(tmp_path: Path, fragment: str, left: list[int], all_wrong_right: list[int]):
    names = (None, "nq", 'a "b" & c', 'a "b" & c')
    records = [record("x", float(number == 3), "text", benchmark=name) for number, name in enumerate(names)]
    document = browse(write(tmp_path, trajectory_page(records, TITLE)), fragment)
    assert shown(document) == left
    assert f">{len(left)} of 4</span>" in document
    # Each filter says how many it has of the benchmark, and cannot be chosen for none.
    labels = re.findall(r'name="show" value="(\w+)"([^>]*)> [^<]*\((\d+)\)</label>', document)
    assert [(name, int(number)) for name, _, number in labels] == list(
        zip(("all", "wrong", "right", "rescued", "unanswered"), [*all_wrong_right, 0, 0], strict=True)
    )
    assert all(("disabled" in attributes) == (number == "0") for _, attributes, number in labels)


def test_passages_are_folded_until_a_search_finds_something_in_them(tmp_path: Path):
    records = [record("x", 0.0, text="a fox"), record("y", 0.0, text="an elm")]
    records[1]["segments"][1]["text"] = "only here: a needle"
    text = trajectory_page(records, TITLE)
    assert text.count('<details class="segment information" open>') == 2  # as it stands without script
    page = write(tmp_path, text)
    assert browse(page).count('<details class="segment information" open') == 0
    assert browse(page, "#find=needle").count('<details class="segment information" open') == 1


def test_what_a_search_unfolded_is_folded_by_the_next(tmp_path: Path):
    records = [record("x", 0.0, text="a fox"), record("y", 0.0, text="an elm")]
    for number, text in enumerate(("a net", "a needle")):
        records[number]["segments"][1]["text"] = text
    typing = """<script type="module">
      const find = document.getElementById("find");
      const type = (text) => { find.value = text; find.dispatchEvent(new Event("input")); };
      setTimeout(() => type("ne"), 0);
      setTimeout(() => { document.title = document.querySelectorAll("details[open]").length; type("need"); }, 500);
    </script></body>"""
    text = trajectory_page(records, TITLE).replace("</body>", typing)
    # Without the policy, which would not let the test's own script run.
    document = browse(write(tmp_path, re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)))
    assert title_of(document) == "2"
    assert shown(document) == [1]
    assert document.count('<details class="segment information" open') == 1
