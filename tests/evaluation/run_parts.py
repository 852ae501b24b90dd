"""Finished runs as an evaluation leaves them, with predictions that are spelled out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rex_rag.evaluation.benchmarks import Benchmark
from rex_rag.evaluation.methods import make_method
from rex_rag.evaluation.records import PREDICTIONS_FILE, RUN_FILE, TIMINGS_FILE, Prediction, Question, Sample
from rex_rag.evaluation.run_card import protocol_card
from rex_rag.rollout.script import RolloutBudget

RIGHT, WRONG = "Lisbon", "Oporto"


def sample(answer: str | None, **more: Any) -> Sample:
    values = {"segments": [], "searches": [], "tokens": 10, "invalid_actions": 0, "truncations": {}}
    return Sample(answer=answer, **{**values, **more})


def open_questions(name: str, n: int, text: str = "Question") -> Benchmark:
    """Questions of which every right answer is `RIGHT`, with ids q0, q1, ..."""
    questions = tuple(Question(f"q{number}", f"{text} {number} of {name}?", (RIGHT,)) for number in range(n))
    return Benchmark(name=name, kind="open", questions=questions, source=f"{name}.jsonl", size=n)


def write_run(
    path: Path,
    answers: Mapping[str, Sequence[Any]],
    *,
    method: str = "rex_rag",
    model: str = "me/model-3B",
    budget: RolloutBudget | None = None,
    benchmarks: Mapping[str, Benchmark] | None = None,
    unfinished: Mapping[str, int] | None = None,
    temperature: float = 0.0,
    corpus: str = "a",
) -> Path:
    """Write a run.

    Args:
        answers: set -> for each question 1 (right), 0 (wrong), `None` (unanswered), a `Sample`, or a list of these.
        unfinished: set -> questions in finished chunks, of sets that are under way.
    """
    unfinished = unfinished or {}
    sets = {name: (benchmarks or {}).get(name) or open_questions(name, len(given)) for name, given in answers.items()}
    samples = 1
    for name, given in answers.items():
        predictions = []
        for question, entry in zip(sets[name].questions, given, strict=True):
            attempts = [
                one if isinstance(one, Sample) else sample({1: RIGHT, 0: WRONG, None: None}[one])
                for one in (entry if isinstance(entry, list) else [entry])
            ]
            samples = len(attempts)
            predictions.append(
                Prediction(
                    question.id,
                    question.question,
                    question.golden_answers,
                    tuple(attempts),
                    question.choices,
                    documents=question.documents,
                ).as_row()
            )
        folder = path / name
        folder.mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in predictions]
        if name in unfinished:
            (folder / "chunks").mkdir()
            (folder / "chunks" / "000000.jsonl").write_text("".join(lines[: unfinished[name]]))
        else:
            (folder / PREDICTIONS_FILE).write_text("".join(lines))
            (folder / TIMINGS_FILE).write_text(json.dumps({"seconds": 1.5}) + "\n")
    made = make_method(method)
    card = protocol_card(
        method=made,
        model={"backend": "transformers", "name": model, "revision": None, "weights_sha256": "0"},
        benchmarks=list(sets.values()),
        retriever={"kind": "bm25", "description": "BM25 over c.jsonl", "fingerprint": corpus}
        if made.uses_retriever
        else None,
        budget=budget or RolloutBudget(),
        temperature=temperature,
        samples=samples,
        seed=0,
        chunk_size=64,
    )
    (path / RUN_FILE).write_text(json.dumps(card))
    return path
