"""Trajectories as one static HTML page: no network, everything escaped, readable with and without its script.

The page's policy lets a browser run the one script and apply the one style sheet that stand in page.html, each by its
SHA-256; whatever a question or passage smuggles in is neither run nor loaded, even if escaping it had failed.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rex_rag.types import SegmentKind
from rex_rag.visualization.escape import escape, escape_visibly, without_invisible
from rex_rag.visualization.files import write_text
from rex_rag.visualization.records import (
    OUTCOMES,
    checked_segments,
    copied_segments,
    facts,
    headline,
    outcomes,
    passage_ids,
    searches_behind,
)
from rex_rag.visualization.reliability_picture import reliability_html, reliability_style

KIND_MEANING = {
    SegmentKind.POLICY: "written by the model",
    SegmentKind.INFORMATION: "retrieved text, inserted",
    SegmentKind.FEEDBACK: "correction after an invalid action, inserted",
    SegmentKind.PROBE: "exploration prompt, inserted",
}
_FILTER_LABEL = {
    "wrong": "wrong answer",
    "right": "right",
    "rescued": "rescued",
    "unanswered": "no answer",
    "disputed": "judge disagrees",
}
_TRAINING = "/training"  # no benchmark's name, which is a folder's


def write_trajectory_page(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    title: str,
    total: int | None = None,
    run_facts: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write trajectory records (`rex_rag.visualization.records`) as one self-contained HTML page; return its path.

    A record's number on the page is its index; `parent` of a probe is the index of its original among the records.
    The two stand side by side, wherever they are in the list.

    Args:
        records: what to show.
        path: the page.
        title: above all.
        total: how many there were to choose from, if more than are shown.
        run_facts: what is to be said of the evaluation they come from, as (name, text).

    Raises:
        ValueError: for a record without segments list or with an unknown segment kind, by its index.
    """
    return write_text(path, trajectory_page(list(records), title, total, run_facts))


def trajectory_page(
    records: Sequence[Mapping[str, Any]],
    title: str,
    total: int | None = None,
    run_facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The page of `write_trajectory_page` as a string."""
    body = "".join(_family_html(family, records) for family in families(records))
    if total is not None and total > len(records):
        body = f"<p>Shown here: {len(records):,} of {total:,} trajectories.</p>\n{body}"
    template = files("rex_rag.visualization").joinpath("page.html").read_text(encoding="utf-8")
    template = template.replace("{{RELIABILITY_STYLE}}", reliability_style())
    # One pass over the template alone: no text that is filled in is searched for places to fill.
    parts = {
        "POLICY": escape(_policy(template)),
        "TITLE": escape(title),
        "RUN": _run_html(run_facts, records),
        "LEGEND": _legend(records),
        "FILTERS": _filters(records),
        "BENCHMARKS": _benchmark_filter(records),
        "BODY": body or "<p>No trajectories were recorded.</p>",
    }
    pieces = template.split("{{")
    page = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        page += [parts[name], rest]
    return "".join(page)


def families(records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of the records that stand side by side: an original with its probes, and whoever asks to be `beside`."""
    grouped: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        anchor = record.get("parent") if record.get("kind") == "probe" else record.get("beside")
        first = anchor if isinstance(anchor, int) and 0 <= anchor < len(records) else index
        grouped.setdefault(first, []).append(index)
    # An original may stand behind its probe in the list; it leads all the same.
    return [sorted(grouped[first], key=lambda index: (index != first, index)) for first in sorted(grouped)]


def _policy(template: str) -> str:
    return (
        f"default-src 'none'; script-src '{_hash_of(template, 'script')}'; style-src '{_hash_of(template, 'style')}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _hash_of(template: str, element: str) -> str:
    content = template.split(f"<{element}>", 1)[1].split(f"</{element}>", 1)[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")


def _legend(records: Sequence[Mapping[str, Any]]) -> str:
    """The kinds of text that occur."""
    kinds = {kind for index, record in enumerate(records) for kind, _ in checked_segments(index, record)}
    entries = "".join(
        f'<li class="{kind.name.lower()}"><span class="label">{kind.name}</span> {escape(meaning)}</li>'
        for kind, meaning in KIND_MEANING.items()
        if kind in kinds
    )
    return f'<ul class="key" aria-label="Kinds of text">{entries}</ul>' if entries else ""


def _filters(records: Sequence[Mapping[str, Any]]) -> str:
    found = [outcomes(record) for record in records]
    choices = [("all", "all", len(records))]
    choices += [(name, _FILTER_LABEL[name], sum(name in each for each in found)) for name in OUTCOMES]
    never = set()
    if records and all(record.get("metric") for record in records):
        never.add("rescued")
    if all(record.get("judged") is None for record in records):
        never.add("disputed")
    return "".join(
        f'<label><input type="radio" name="show" value="{name}"{" checked" if name == "all" else ""}'
        f"{'' if number or name == 'all' else ' disabled'}> {label} ({number})</label>"
        for name, label, number in choices
        if name not in never
    )


def _benchmark_filter(records: Sequence[Mapping[str, Any]]) -> str:
    """A control to choose a benchmark, where there are several or training as well."""
    counts = Counter(map(_benchmark_of, records))
    if len(counts) < 2:
        return ""
    options = "".join(
        f'<option value="{escape(name)}">{escape(without_invisible(name.removeprefix("/")))} ({number})</option>'
        for name, number in counts.items()
    )
    return f'<label>Benchmark <select id="benchmark"><option value="">all</option>{options}</select></label>'


def _benchmark_of(record: Mapping[str, Any]) -> str:
    return str(record.get("benchmark") or _TRAINING)


def _run_html(run_facts: Sequence[tuple[str, str]], records: Sequence[Mapping[str, Any]]) -> str:
    if not run_facts:
        return ""
    is_mixed = any(not record.get("metric") for record in records)
    return f'{"<p>The evaluation:</p>" if is_mixed else ""}<dl class="run">{_facts_html(run_facts)}</dl>'


def _facts_html(facts: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape_visibly(name)}</dt><dd>{escape_visibly(text)}</dd>" for name, text in facts)


def _family_html(family: Sequence[int], records: Sequence[Mapping[str, Any]]) -> str:
    articles = "".join(_record_html(index, records[index], len(records)) for index in family)
    return f'<section class="family{" pair" if len(family) > 1 else ""}">\n{articles}</section>\n'


def _record_html(index: int, record: Mapping[str, Any], count: int) -> str:
    segments = checked_segments(index, record)
    copied = len(copied_segments(record))
    searches = searches_behind(record)
    body = ""
    for place, (kind, text) in enumerate(segments):
        if kind is SegmentKind.INFORMATION:
            body += _passages_html(text, searches.get(place, []), place < copied)
        else:
            body += _segment_html(kind, text, place < copied)
    found = outcomes(record)
    known = _facts_html(facts(record))
    parent = record.get("parent")
    if isinstance(parent, int) and 0 <= parent < count:
        known += f'<dt>original</dt><dd><a href="#t{parent}">#{parent}</a>; pale: copied from it</dd>'
    badges = "".join(
        f' <span class="{name}">{_FILTER_LABEL[name]}</span>'
        for name in ("rescued", "unanswered", "disputed")
        if name in found and _FILTER_LABEL[name] != headline(record)
    )
    verdict = "unscored" if record.get("reward") is None else "right" if "right" in found else "wrong"
    picture = record.get("reliability")
    return (
        f'<article id="t{index}" tabindex="-1" data-outcome="{" ".join(sorted(found))}" '
        f'data-benchmark="{escape(_benchmark_of(record))}">'
        f'<h2>#{index} <span class="{verdict}">{escape(headline(record))}</span>'
        f"{badges}</h2>\n<dl>{known}</dl>\n{body}"
        f"{reliability_html(picture) if picture else ''}</article>\n"
    )


def _segment_html(kind: SegmentKind, text: str, copied: bool) -> str:
    name = kind.name
    return (
        f'<div class="segment {name.lower()}{" copied" if copied else ""}"><span class="label">{name}</span>'
        f'<span class="text">{escape_visibly(text.strip())}</span></div>\n'
    )


def _passages_html(text: str, searches: Sequence[Mapping[str, Any]], copied: bool) -> str:
    text = text.strip()
    queries = [f"{one.get('tool', '')} {one['query']}".strip() for one in searches]
    asked = "".join(f' <span class="query">{escape_visibly(query)}</span>' for query in queries)
    found = [str(passage) for one in searches for passage in one.get("passages") or []]
    ids = f", {escape_visibly(passage_ids(found))}" if found else ""
    return (
        f'<details class="segment information{" copied" if copied else ""}" open><summary>'
        f'<span class="label">INFORMATION</span>{asked} <span class="size">({len(text):,} characters{ids})</span>'
        f'</summary><span class="text">{escape_visibly(text)}</span></details>\n'
    )
