"""Records of an evaluation, finished or under way, and what the head of their page says of the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rex_rag.answers import exact_match
from rex_rag.evaluation.choices import choice_letter
from rex_rag.evaluation.records import (
    CHUNKS_FOLDER,
    PREDICTIONS_FILE,
    RUN_FILE,
    Prediction,
    finished_chunks,
    questions_in_chunks,
)
from rex_rag.evaluation.run_card import read_card
from rex_rag.evaluation.scores import Judge
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.wording import counted

UNFINISHED = "not finished"  # the name under which `run_facts` says what is missing

# `rex_rag.evaluation.judge.read_judge` and `judge_of`: given and not imported, for with them comes what asks a judge.
JudgeReader = Callable[[str | Path, str, Sequence[Prediction]], Judge | None]
JudgeNamer = Callable[[str | Path], dict[str, Any] | None]


def read_predictions(
    path: str | os.PathLike, benchmark: str | None = None, read_judge: JudgeReader | None = None
) -> Iterable[dict[str, Any]]:
    """Trajectory records of an evaluation run, one for each sample of each question, in the order of the files.

    Args:
        path: a `predictions.jsonl`, or a run's directory with one in each benchmark's folder; of a benchmark under
            way, its finished chunks.
        benchmark: only the folder of this name; all, by name, by default.
        read_judge: `rex_rag.evaluation.judge.read_judge`, for the verdicts of a judge.

    Yields:
        Records whose `reward` is their `metric`: exact match, or for multiple choice the accuracy of the letter.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a line that is not a prediction, by file and line; for broken verdicts of a judge.
    """
    path = Path(path)
    files = prediction_files(path)
    if not files:
        raise FileNotFoundError(f"there is no {PREDICTIONS_FILE} at {path}; name one, or an evaluation's directory")
    if benchmark is not None:
        chosen = [file for file in files if _folder_of(file).name == benchmark]
        if not chosen:
            known = ", ".join(dict.fromkeys(_folder_of(file).name for file in files))
            raise UserError(f"{path} has no benchmark {benchmark!r}; it has {known}")
        files = chosen
    for file in files:
        folder = _folder_of(file)
        # Of no prediction in particular: verdicts may be there for a part of them.
        judge = read_judge(folder.parent, folder.name, ()) if read_judge else None
        for number, row in iter_json_objects(file, ValueError):
            try:
                prediction = Prediction.from_row(row)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}, line {number}: not a prediction ({type(error).__name__}: {error}); name a file that an "
                    "evaluation of this package wrote"
                ) from None
            yield from _prediction_records(prediction, folder.name, judge)


def prediction_files(path: Path) -> list[Path]:
    """The prediction files at a path: itself, those in it, or those in its folders; none is no error."""
    if path.is_file():
        return [path] if path.suffix == ".jsonl" else []
    return _files_of_benchmark(path) or [
        file for folder in sorted(path.glob("*")) for file in _files_of_benchmark(folder)
    ]


def _files_of_benchmark(folder: Path) -> list[Path]:
    whole = folder / PREDICTIONS_FILE
    return [whole] if whole.is_file() else finished_chunks(folder)


def _folder_of(file: Path) -> Path:
    """The benchmark's folder that a prediction file belongs to, by its whole path."""
    folder = Path(os.path.abspath(file)).parent
    return folder.parent if folder.name == CHUNKS_FOLDER else folder


def _prediction_records(prediction: Prediction, benchmark: str, judge: Judge | None) -> Iterable[dict[str, Any]]:
    for number, sample in enumerate(prediction.samples, start=1):
        notes = {"tokens written": sample.tokens, "invalid actions": sample.invalid_actions}
        notes |= {f"cut ({cause})": count for cause, count in sample.truncations.items()}
        record = {
            "question": prediction.question,
            "golden_answers": list(prediction.golden_answers),
            "answer": sample.answer,
            "kind": "original",
            "rescue": False,
            "parent": None,
            "segments": sample.segments,
            "step": None,
            "benchmark": benchmark,
            "id": prediction.id,
            "sample": f"{number} of {len(prediction.samples)}" if len(prediction.samples) > 1 else None,
            "searches": sample.searches,
            "notes": {name: str(value) for name, value in notes.items() if value},
        }
        if prediction.choices is None:
            is_right = exact_match(sample.answer, prediction.golden_answers)
            scored: dict[str, Any] = {"metric": "exact match", "judged": _judged(judge, prediction, sample.answer)}
        else:
            letter = choice_letter(sample.answer, prediction.choices)
            is_right = letter in prediction.golden_answers
            scored = {"metric": "accuracy", "choices": dict(prediction.choices), "letter": letter}
        yield record | {"reward": float(is_right)} | scored


def _judged(judge: Judge | None, prediction: Prediction, answer: str | None) -> bool | None:
    """Whether a judge found an answer correct; `None` where there is no verdict."""
    if judge is None or answer is None or not answer.strip():
        return None
    try:
        return judge(prediction, answer) > 0
    except KeyError:  # the judging was broken off before this one
        return None


def run_facts(
    path: str | os.PathLike, benchmark: str | None = None, judge_of: JudgeNamer | None = None
) -> list[tuple[str, str]]:
    """What the run card says of an evaluation run, as (name, text); nothing where there is no card.

    Args:
        path, benchmark: as `read_predictions` takes them, or a folder of which nothing is known yet. What is not
            finished of the benchmarks asked for is the last of the facts, under `UNFINISHED`.
        judge_of: `rex_rag.evaluation.judge.judge_of`, for the name of a judge.

    Raises:
        ValueError: for a card or a judge's description that is broken or of another format.
    """
    path = Path(os.path.abspath(path))
    run = path if (path / RUN_FILE).is_file() else None
    if run is None and (files := prediction_files(path)):
        run, benchmark = _folder_of(files[0]).parent, benchmark or _folder_of(files[0]).name
    if run is None or not (run / RUN_FILE).is_file():
        return []
    card = read_card(run)
    try:
        facts = _card_facts(card)
        sets = {name: int(card["benchmarks"][name]["questions"]) for name in card["benchmark_order"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run / RUN_FILE} is not a card of this version ({type(error).__name__}: {error}); evaluate into a "
            f"new directory, or view a copy of {PREDICTIONS_FILE} in another folder"
        ) from error
    if judge_of and (judge := judge_of(run)):
        facts.append(("judge", str(judge["model"])))
    unfinished = [
        f"{name} {questions_in_chunks(run / name):,} of {counted(questions, 'question')}"
        for name, questions in sets.items()
        if benchmark in (None, name) and not (run / name / PREDICTIONS_FILE).is_file()
    ]
    return facts + ([(UNFINISHED, f"so far only: {', '.join(unfinished)}")] if unfinished else [])


def _card_facts(card: dict[str, Any]) -> list[tuple[str, str]]:
    method, model, decoding, retriever = (card[name] for name in ("method", "model", "decoding", "retriever"))
    revision = f", revision {model['revision']}" if model.get("revision") else ""
    if decoding["temperature"]:
        written = f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}, seed {decoding['seed']}"
    else:
        written = "greedy"
    if decoding["samples"] > 1:
        written += f"; {decoding['samples']} samples a question"
    searched = "none"
    if retriever is not None and method["uses_retriever"]:
        searched = f"{retriever['description']}; {counted(card['budget']['top_k'], 'passage')} a search"
    return [
        ("method", str(method["title"])),
        ("model", f"{model['name']}{revision}"),
        ("decoding", written),
        ("retriever", searched),
    ]
