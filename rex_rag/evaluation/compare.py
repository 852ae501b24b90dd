"""Two runs over the same questions, paired.

Invariant: every question of one run is paired with the same question of the other; runs that answered other questions
are refused, whatever else is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rex_rag.evaluation.benchmarks import OPEN
from rex_rag.evaluation.bootstrap import RESAMPLES
from rex_rag.evaluation.finished import FinishedRun, unlike_judges, unread_verdicts
from rex_rag.evaluation.paired import Paired, compare_scores
from rex_rag.evaluation.published import label, ordered
from rex_rag.evaluation.run_card import comparable
from rex_rag.evaluation.scores import JUDGE, main_metric, read_predictions
from rex_rag.support.errors import UserError
from rex_rag.support.tables import markdown_table, markdown_text, one_line

MAIN = "main"
METRICS = (MAIN, "f1", "sub_match", JUDGE)
_IDS_SHOWN = 10


@dataclass(frozen=True)
class Comparison:
    """Run B against run A.

    sets: in the order of tables. changed: set -> ids on which A, and on which B, scores more. obstacles: what keeps
    the two from being compared, where that was asked to be shown instead of refused.
    """

    a: FinishedRun
    b: FinishedRun
    metric: str
    sets: dict[str, Paired]
    overall: Paired
    changed: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    obstacles: tuple[str, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """All figures and ids; JSON-able."""
        return {
            "a": _described(self.a),
            "b": _described(self.b),
            "metric": self.metric,
            "sets": {name: asdict(paired) for name, paired in self.sets.items()},
            "overall": asdict(self.overall),
            "changed": {name: {"a_only": list(a), "b_only": list(b)} for name, (a, b) in self.changed.items()},
            "obstacles": list(self.obstacles),
        }


def compare_runs(
    a: FinishedRun,
    b: FinishedRun,
    *,
    metric: str = MAIN,
    benchmarks: Sequence[str] = (),
    mark: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Pair two runs.

    Args:
        metric: `main` (exact match, or accuracy for multiple choice), `f1`, `sub_match` or `judge`.
        benchmarks: the sets to compare; default, all of both runs, which then must be the same.
        mark: say what keeps the runs from being compared instead of refusing them; their questions must be the same.

    Raises:
        ValueError: for runs that are not whole, have other sets or questions, or (without `mark`) other protocols.
    """
    if metric not in METRICS:
        raise UserError(f"there is no metric {metric!r}; choose from {', '.join(METRICS)}")
    names = _shared_sets(a, b, benchmarks)
    for name in names:
        _check_pairs(a, b, name)
    obstacles = comparable(a.card, b.card, names) + (unlike_judges(a, b) if metric == JUDGE else [])
    if obstacles and not mark:
        raise UserError(
            f"{a.path} and {b.path} were made under different protocols: {'; '.join(obstacles)}. Evaluate one of them "
            "again under the other's, or compare them all the same (--mark)"
        )
    scores_a, scores_b = ({name: _values(run, name, metric) for name in names} for run in (a, b))
    sets, overall = compare_scores(scores_a, scores_b, resamples=resamples, seed=seed)
    changed = {}
    for name in names:
        pairs = list(zip(a.scores[name].ids, scores_a[name], scores_b[name], strict=True))
        changed[name] = (
            tuple(id for id, first, second in pairs if first > second),
            tuple(id for id, first, second in pairs if second > first),
        )
    return Comparison(a, b, metric, sets, overall, changed, tuple(obstacles))


def _shared_sets(a: FinishedRun, b: FinishedRun, wanted: Sequence[str]) -> list[str]:
    for run in (a, b):
        lacking = [name for name in wanted if name not in run.benchmarks]
        if lacking:
            raise UserError(f"{run.path} has no {lacking[0]}; its sets are {', '.join(run.benchmarks)}")
    alone = [
        f"{name} (only in {run.path})"
        for run, other in ((a, b), (b, a))
        for name in run.benchmarks
        if name not in other.benchmarks
    ]
    if alone and not wanted:
        raise UserError(
            f"the runs answered different sets: {', '.join(alone)}. Name those to compare (--benchmarks), or evaluate "
            "what is missing"
        )
    names = ordered(wanted or a.benchmarks)
    for run in (a, b):
        missing = [name for name in names if name in run.missing]
        if missing:
            raise UserError(f"{run.path} is not whole: {run.missing_text}; resume it first")
    return names


def _check_pairs(a: FinishedRun, b: FinishedRun, name: str) -> None:
    if a.benchmarks[name]["sha256"] == b.benchmarks[name]["sha256"]:
        return
    first, second = a.scores[name].ids, b.scores[name].ids
    only_a, only_b = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    if only_a or only_b:
        counts = [(run.path, ids) for run, ids in ((a, only_a), (b, only_b)) if ids]
        found = ", ".join(f"{len(ids):,} only in {path} (such as {ids[0]})" for path, ids in counts)
    else:
        found = "the ids are the same, but not their order, text or gold answers"
    raise UserError(
        f"{name}: the runs answered different questions, which cannot be paired: {found}. Evaluate both on "
        "the same set"
    )


def _values(run: FinishedRun, name: str, metric: str) -> list[float]:
    scores = run.scores[name]
    wanted = main_metric(scores.kind) if metric == MAIN else metric
    if wanted not in scores.values:
        if wanted == JUDGE and scores.kind == OPEN:
            raise UserError(
                f"the answers to {name} in {run.path} are not {'all ' if run.judge else ''}judged; judge them with "
                "the run's own command and a judge beside it: rex-rag evaluate … --judge_endpoint URL --judge_model "
                "NAME"
            )
        offered = [MAIN, *(one for one in METRICS if one in scores.values)]
        raise UserError(f"{name} has no {wanted}, only {', '.join(offered)} (--metric); leave it out (--benchmarks)")
    return scores.values[wanted].tolist()


def as_markdown(comparison: Comparison, ids_shown: int = _IDS_SHOWN) -> str:
    """The comparison for people: a table, what its columns mean, and the ids to look at."""
    a, b = comparison.a, comparison.b
    lines = [
        f"- {side}: {markdown_text(f'{run.method}, {run.model} ({run.path})')}" for side, run in (("A", a), ("B", b))
    ]
    lines += [f"- Not comparable: {markdown_text(text)}" for text in comparison.obstacles]
    rows = [_line(label(name), paired) for name, paired in comparison.sets.items()]
    if len(rows) > 1:
        rows.append(_line("all", comparison.overall))
    head = ("set", "n", "A", "B", "B − A", "p", "only A", "only B", "both", "neither")
    what = {
        MAIN: "exact match (accuracy for multiple choice)",
        "f1": "F1",
        "sub_match": "sub-match",
        JUDGE: markdown_text(f"judged right by {(a.judge or {}).get('model')}"),
    }[comparison.metric]
    remark = (
        f"Per cent {what}; in brackets the 95 % interval of the paired bootstrap over questions. p: exact two-sided "
        "sign test (McNemar) over the questions that one run alone gets right, or gets more right. all: means over "
        "sets, each counting alike; counts and p over all questions."
    )
    if comparison.metric == JUDGE:
        remark += f" {markdown_text(unread_verdicts([a, b]))}"
    shown = [text for name in comparison.changed for text in _ids(comparison, name, ids_shown)]
    parts = ["\n".join(lines), markdown_table(head, rows).rstrip("\n"), remark, "\n".join(shown)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(name: str, paired: Paired) -> list[str]:
    difference = paired.difference
    return [
        markdown_text(name),
        f"{paired.n:,}",
        f"{100 * paired.mean_a:.1f}",
        f"{100 * paired.mean_b:.1f}",
        f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]",
        f"{paired.p:.3f}" if paired.p >= 0.001 else f"{paired.p:.0e}",
        *(f"{count:,}" for count in (paired.a_only, paired.b_only, paired.both, paired.neither)),
    ]


def _ids(comparison: Comparison, name: str, shown: int) -> Iterator[str]:
    for side, ids in zip(("A", "B"), comparison.changed[name], strict=True):
        if ids and shown:
            more = f" and {len(ids) - shown:,} more" if len(ids) > shown else ""
            listed = ", ".join(markdown_text(id) for id in ids[:shown])
            yield f"- {markdown_text(label(name))}, only {side}: {listed}{more}"


def changed_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Every question on which the runs differ, with both runs' answers; JSON-able, in the order of tables."""
    for name, (a_only, b_only) in comparison.changed.items():
        better = {**dict.fromkeys(a_only, "a"), **dict.fromkeys(b_only, "b")}
        first, second = (read_predictions(run.path / name) for run in (comparison.a, comparison.b))
        for one, other in zip(first, second, strict=True):
            if one.id in better:
                yield {
                    "benchmark": name,
                    "id": one.id,
                    "better": better[one.id],
                    "question": one.question,
                    "golden_answers": list(one.golden_answers),
                    "a": [sample.answer for sample in one.samples],
                    "b": [sample.answer for sample in other.samples],
                }


def _described(run: FinishedRun) -> dict[str, str]:
    return {"run": str(Path(run.path)), "method": run.method, "model": one_line(run.model), "protocol": run.protocol}
