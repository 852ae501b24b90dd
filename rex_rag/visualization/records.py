"""Trajectory records: the plain data that pages and text files show, and where it is read from.

A record is a dictionary that JSON can hold (`trajectory_record` names the keys). Training leaves its trajectories in
completion tables, evaluation in predictions (`rex_rag.visualization.predictions`); `read_records` takes either, or a
folder with both.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.evaluation.records import PREDICTIONS_FILE
from rex_rag.support.errors import UserError
from rex_rag.types import SegmentKind, Trajectory
from rex_rag.visualization.predictions import JudgeReader, prediction_files, read_predictions

if TYPE_CHECKING:
    import pyarrow

_PARQUET_END = b"PAR1"
OUTCOMES = ("wrong", "right", "rescued", "unanswered", "disputed")


def trajectory_record(
    trajectory: Trajectory,
    question: str,
    golden_answers: Sequence[str],
    reward: float | None,
    *,
    rescue: bool = False,
    step: int | None = None,
) -> dict[str, Any]:
    """A trajectory as a record of plain data that can be stored as JSON and shown by this package.

    Args:
        trajectory: an original, or a probe (it has a `PROBE` segment).
        question: the question it answers.
        golden_answers: the accepted answers.
        reward: its reward, `None` where it has none.
        rescue: whether it is a correct probe of a question all of whose originals were wrong.
        step: the training step it was sampled in.

    Beside these keys, a page understands `benchmark`, `id`, `sample`, `model` and `notes` (short texts), `searches`
    (`{"query", "passages"}` of each), `beside` (index of the record to stand next to) and `reliability` (a model's
    name and its tokens, see `rex_rag.visualization.reliability_picture`).
    With a `metric`, the name of what `reward` is, a
    record is an evaluation's: it is right or wrong, and may have `choices` (letter -> text), the `letter` that was
    read from the answer, and `judged` (whether a judge found the answer correct).
    """
    return {
        "question": question,
        "golden_answers": list(golden_answers),
        "answer": trajectory.answer,
        "reward": None if reward is None else float(reward),
        "kind": "probe" if trajectory.is_probe else "original",
        "rescue": bool(rescue),
        "parent": trajectory.parent,
        "cut": trajectory.cut,
        "searches": trajectory.search_rows(),
        "segments": trajectory.segment_texts(),
        "step": step,
    }


def read_records(
    path: str | os.PathLike,
    step: int | None = None,
    benchmark: str | None = None,
    limit: int | None = None,
    read_judge: JudgeReader | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Trajectory records of a training run, an evaluation run, or a folder that holds both.

    Args:
        path: a file or a folder, as `read_completion_tables` and `read_predictions` take them.
        step: only completion tables, and of them only this training step.
        benchmark: only predictions, and of them only this benchmark.
        limit: at most so many, an equal share of each benchmark, the first ones; all by default.
        read_judge: as `read_predictions` takes it.

    Returns:
        The records, and how many there are without the limit.

    Raises:
        FileNotFoundError: where there is neither.
        ValueError: for files of another form, a step or benchmark that is not there, or both asked for at once.
    """
    path = Path(path)
    if step is not None and benchmark is not None:
        raise UserError(f"step {step} belongs to training, benchmark {benchmark!r} to evaluation; give one of them")
    tables = [] if benchmark is not None else completion_files(path)
    predictions = [] if step is not None else prediction_files(path)
    if not tables and not predictions:
        raise FileNotFoundError(
            f"there are neither completion tables nor {PREDICTIONS_FILE} at {path}; name a completions_*.parquet "
            "(training writes them with log_completions: true, the first after logging_steps steps), a "
            f"{PREDICTIONS_FILE} of an evaluation, or the directory of a run (an evaluation shows once its first "
            "chunk is finished). --step looks for the former alone, --benchmark for the latter"
        )
    records = read_completion_tables(path, step, limit) if tables else []
    total = sum(steps[step] if step is not None else steps.total() for steps in map(_steps, tables))
    kept: Counter = Counter()
    for record in read_predictions(path, benchmark, read_judge) if predictions else ():
        total += 1
        kept[record["benchmark"]] += 1
        # A run may hold more than memory does: what the limit can never show is not kept.
        if limit is None or kept[record["benchmark"]] <= limit:
            records.append(record)
    return (records if limit is None else first_of_each(records, limit)), total


def read_completion_tables(
    path: str | os.PathLike, step: int | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Trajectory records from the completion tables that training writes with `log_completions`.

    Args:
        path: one table (parquet), a folder of them, or a run's output directory.
        step: only rows of this training step; all by default.
        limit: as many whole tables as hold so many of the rows, all by default: training writes one a step, and all
            of them may be more than memory holds.

    Returns:
        The records in the order of steps and rows: a question's originals, then its probes. `reward` is exact match;
        `parent` of a probe is the index of the original that it was cut from, where that is in the table.

    Raises:
        FileNotFoundError: where there is no table.
        ValueError: for a table that was not written by this package's trainer, or none with the step.
    """
    files = completion_files(Path(path))
    if not files:
        raise FileNotFoundError(
            f"there are no completion tables at {path}; name a completions_*.parquet or a run's output directory. "
            "Training writes them with log_completions: true"
        )
    if step is not None:
        found = {file: _steps(file) for file in files}
        files = [file for file in files if step in found[file]]
        if not files:
            steps = {each for counted in found.values() for each in counted}
            known = f"{min(steps)} to {max(steps)}" if steps else "none"
            raise UserError(f"{path} has no completions of step {step}; it has those of steps {known}")
    rows: list[dict[str, Any]] = []
    for file in files:
        if limit is not None and len(rows) >= limit:
            break
        rows += [row for row in _completion_rows(file) if step is None or row["step"] == step]
    reached = {(row["step"], row["question"]) for row in rows if not row["is_probe"] and row["exact_match_reward"]}
    places = {(row["step"], row["rollout"]): place for place, row in enumerate(rows)}
    return [
        {
            "question": row["question"],
            "golden_answers": row["golden_answers"],
            "answer": row["predicted_answer"],
            "reward": row["exact_match_reward"],
            "kind": "probe" if row["is_probe"] else "original",
            "rescue": bool(
                row["is_probe"] and row["exact_match_reward"] and (row["step"], row["question"]) not in reached
            ),
            "parent": places.get((row["step"], row["parent"])),
            "cut": row["cut"],
            "searches": json.loads(row["tool_uses"]),
            "segments": json.loads(row["segments"]),
            "step": row["step"],
        }
        for row in rows
    ]


def completion_files(path: Path) -> list[Path]:
    """The completion tables at a path: itself, those in it, or those in its `completions`; none is no error."""
    if path.is_file():
        return [] if path.suffix == ".jsonl" else [path]
    for folder in (path / "completions", path):
        if files := sorted(folder.glob("completions_*.parquet")):
            return files if _is_whole(files[-1]) else files[:-1]
    return []


def _is_whole(file: Path) -> bool:
    """Whether a table has its end; the newest of a run under way may still be being written."""
    with file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - len(_PARQUET_END), 0))
        return opened.read() == _PARQUET_END


def _completion_rows(file: Path) -> list[dict[str, Any]]:
    columns = ["step", "question", "golden_answers", "predicted_answer", "is_probe", "exact_match_reward", "segments"]
    columns += ["rollout", "parent", "cut", "tool_uses"]
    return _columns(file, columns).to_pylist()


def _steps(file: Path) -> Counter[int]:
    """How many rows a completion table has of each step."""
    return Counter(_columns(file, ["step"])["step"].to_pylist())


def _columns(file: Path, columns: list[str]) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table: it would take `step=1` in a folder's name for a column.
        with pyarrow.parquet.ParquetFile(file) as table:
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if not missing:
                return table.read(columns=columns)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a parquet file ({error}); name a completion table") from None
    raise UserError(
        f"{file} has no column {', '.join(missing)}; only tables written by this package's trainer can be shown"
    )


def copied_segments(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The segments of a probe that it has from its original: those before the first exploration prompt."""
    segments = list(record["segments"])
    kinds = [segment.get("kind") for segment in segments]
    return segments[: kinds.index(SegmentKind.PROBE.name)] if SegmentKind.PROBE.name in kinds else []


def first_of_each(records: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` records, an equal share of each benchmark, in the given order; `parent` follows its record."""
    position: dict[int, int] = {}
    for _, members in groupby(range(len(records)), key=lambda index: records[index].get("benchmark")):
        position.update((index, place) for place, index in enumerate(members))
    chosen = sorted(sorted(position, key=lambda index: (position[index], index))[:limit])
    moved: dict[int | None, int] = {index: place for place, index in enumerate(chosen)}
    return [records[index] | {"parent": moved.get(records[index].get("parent"))} for index in chosen]


def outcomes(record: Mapping[str, Any]) -> set[str]:
    """Which of `OUTCOMES` a record falls under; an answer without a reward is none of them.

    Disputed is what a judge and the metric disagree on.
    """
    reward, answer = record.get("reward"), record.get("answer")
    is_right = reward is not None and reward > 0
    disputed = {"disputed"} if record.get("judged") not in (None, is_right) else set()
    if is_right:
        return {"right", "rescued"} if record.get("rescue") else {"right"} | disputed
    if answer is None or not answer.strip():
        return {"unanswered"}
    return set() if reward is None else {"wrong"} | disputed


def headline(record: Mapping[str, Any]) -> str:
    """A record in a few words: how it ended and, of training, whether it is an original or a probe."""
    if record.get("metric"):
        found = outcomes(record)
        return "right" if "right" in found else "no answer" if "unanswered" in found else "wrong"
    if record.get("kind") != "probe":
        kind = "original"
    elif record.get("parent") is None:
        kind = "probe"
    else:
        kind = f"probe of #{record['parent']}"
    reward = record.get("reward")
    outcome = "not scored" if reward is None else "rewarded" if reward > 0 else "not rewarded"
    return f"{kind}, {outcome}" + (", a rescue" if record.get("rescue") else "")


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a record besides its segments, as (name, text) in the order to show it."""
    answer, reward, choices = (record.get(name) for name in ("answer", "reward", "choices"))
    gold = " | ".join(map(str, record.get("golden_answers", ())))
    known = [("question", str(record.get("question", "")))]
    if choices:
        known.append(("choices", "\n".join(f"{letter}) {text}" for letter, text in choices.items())))
    known += [("gold", gold or "(none)"), ("answer", "(none)" if answer is None else str(answer))]
    if choices and answer is not None:
        known.append(("letter read", record.get("letter") or "(none: the answer does not name one choice)"))
    known.append((record.get("metric") or "reward", "(none)" if reward is None else f"{reward:g}"))
    if record.get("judged") is not None:
        known.append(("judge", "correct" if record["judged"] else "incorrect"))
    for name in ("step", "model", "benchmark", "id", "sample"):
        if record.get(name) is not None:
            known.append((name, str(record[name])))
    searches = record.get("searches") or []
    if len(searches) > sum(map(len, searches_behind(record).values())):
        lines = (f"{number}. {search_text(search)}" for number, search in enumerate(searches, start=1))
        known.append(("searches", "\n".join(lines)))
    return known + [(str(name), str(value)) for name, value in (record.get("notes") or {}).items()]


def search_text(search: Mapping[str, Any]) -> str:
    """A recorded search in words: its query, and which passages came back."""
    return f"{search.get('query', '')} ({passage_ids(search.get('passages') or [])})"


def passage_ids(ids: Sequence[str]) -> str:
    """Which passages a search found, best first."""
    return f"passage ids {', '.join(map(str, ids))}" if ids else "no passages"


def checked_segments(index: int, record: Mapping[str, Any]) -> list[tuple[SegmentKind, str]]:
    """A record's segments as (kind, text).

    Raises:
        ValueError: for a record without segments list or with an unknown segment kind, by its index.
    """
    if "segments" not in record:
        raise UserError(f"trajectory record {index} has no 'segments'; make records with trajectory_record()")
    segments = []
    for segment in record["segments"]:
        name = segment.get("kind")
        if name not in SegmentKind.__members__:
            raise UserError(
                f"trajectory record {index} has a segment of kind {name!r}; it must be one of "
                f"{', '.join(SegmentKind.__members__)}"
            )
        segments.append((SegmentKind[name], str(segment.get("text", ""))))
    return segments


def searches_behind(record: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The calls whose results a segment shows, by its place: `{"query", "passages"}` of each.

    IRCoT shows nothing of a search that found nothing new, Search-o1 what a second reading made of the passages: such
    calls stand behind no segment.
    """
    shown: dict[int, list[dict[str, Any]]] = {}
    kinds = [segment.get("kind") for segment in record.get("segments", ())]
    for search in record.get("searches") or []:
        place = search.get("segment")
        if isinstance(place, int) and place < len(kinds) and kinds[place] == SegmentKind.INFORMATION.name:
            shown.setdefault(place, []).append(search)
    return shown
