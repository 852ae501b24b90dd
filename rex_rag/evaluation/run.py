"""Run a method over benchmarks: in fixed chunks, resumable, shared among processes, with the same bytes every time.

Invariants: questions are cut into chunks by their place alone, and a chunk is always run as a whole from seeds of its
own; so what a chunk yields depends neither on who runs it nor on what ran before. A chunk's file is there whole or not
at all, and is never written again. Processes share nothing but the run's directory: locks that the kernel drops when
their holder dies, and files. There is no collective call to hang in.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.evaluation.judge import judge_of, read_judge
from rex_rag.evaluation.methods import Method, Toolbox
from rex_rag.evaluation.methods.prompt_texts import question_text
from rex_rag.evaluation.records import (
    CHUNKS_FOLDER,
    PREDICTIONS_FILE,
    RUN_FILE,
    TIMINGS_FILE,
    Prediction,
    Question,
    Sample,
)
from rex_rag.evaluation.run_card import differences, read_card
from rex_rag.evaluation.scores import BenchmarkScores, macro_scores, read_predictions, read_seconds, score_benchmark
from rex_rag.retrieval.base import Retriever
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.durable import locked, write_json, written_whole
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.progress_bars import progress_bar
from rex_rag.support.wording import counted
from rex_rag.types import Truncation

if TYPE_CHECKING:
    from rex_rag.evaluation.benchmarks import Benchmark
    from rex_rag.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
LOCK_FILE = ".run.lock"
POLL_SECONDS = 0.5
# Writing a card takes no time; a process that holds the lock longer is not writing one.
_CARD_SECONDS = 60.0
# So many of the shortest questions are tried before a run is refused because no prompt fits: passages found for one
# question may be longer than those for another.
_TRIED_QUESTIONS = 64


class RunError(UserError):
    """A run cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which chunks a process runs: those whose number leaves `index` when divided by `count`.

    helps: run what the others have not begun once the own ones are done, and wait for the rest.
    """

    index: int = 0
    count: int = 1
    helps: bool = True

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(
                f"shard {self.index}/{self.count} does not exist; shards of n processes are 0/n to {self.count - 1}/n"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`i/n`, counted from 0: a process that does its part and waits for nobody."""
        index, slash, count = text.partition("/")
        if not (slash and index.strip().isdecimal() and count.strip().isdecimal()):
            raise UserError(f"shard {text!r} is not of the form i/n, for example 0/4")
        return cls(int(index), int(count), helps=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Questions `first` to `first + len(questions)` of a benchmark. `number` counts over the whole run."""

    number: int
    place: int
    benchmark: str
    first: int
    questions: tuple[Question, ...]
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / CHUNKS_FOLDER / f"{self.place:06d}.jsonl"

    @property
    def timing_file(self) -> Path:
        return self.file.with_suffix(".timing.json")

    @property
    def is_done(self) -> bool:
        return (self.folder / PREDICTIONS_FILE).is_file() or self.file.is_file()


@dataclass
class EvaluationRun:
    """One run of a method with a model, into a directory.

    card: as `protocol_card` makes it. samples: attempts at each question. patience: seconds to wait for other
    processes while none of them finishes a chunk.
    """

    output: Path
    card: Mapping[str, Any]
    benchmarks: Sequence[Benchmark]
    method: Method
    model: LanguageModel
    retriever: Retriever | None = None
    budget: RolloutBudget = field(default_factory=RolloutBudget)
    samples: int = 1
    chunk_size: int = 64
    patience: float = 3600.0

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        self.chunks = list(self._cut())
        self._toolbox = Toolbox(
            tokenizer=self.model.tokenizer,
            generator=self.model.generator,
            stream=self.model.stream,
            retriever=self.retriever,
            budget=self.budget,
            chat_template_kwargs=self.model.options.chat_template_kwargs,
        )

    def run(self, shard: Shard | None = None, show_progress: bool = True) -> bool:
        """Run this process's part, then merge what is complete; returns whether the whole run is finished.

        Raises:
            RunError: for a directory that holds another run, for prompts none of which fits, and when other processes
                have come to a standstill.
            RetrievalError, OSError: when a search or an endpoint failed; finished chunks stay.
        """
        shard = shard or Shard()
        if not all(chunk.is_done for chunk in self.chunks):
            self._check_prompts_fit()
        prepare_directory(self.output, self.card)
        for benchmark in self.benchmarks:
            if not (self.output / benchmark.name / PREDICTIONS_FILE).is_file():
                (self.output / benchmark.name / CHUNKS_FOLDER).mkdir(parents=True, exist_ok=True)
        own = [chunk for chunk in self.chunks if chunk.number % shard.count == shard.index]
        others = [chunk for chunk in self.chunks if chunk.number % shard.count != shard.index]
        awaited = self.chunks if shard.helps else own
        shown = awaited if shard.helps else own
        total = sum(len(chunk.questions) for chunk in shown)
        with contextlib.ExitStack() as stack:
            bar = None
            if show_progress:
                done = sum(len(chunk.questions) for chunk in shown if chunk.is_done)
                bar = stack.enter_context(progress_bar(total, "evaluate", "questions", done))
            for chunk in own + (others if shard.helps else []):
                self._run_chunk(chunk)
                _show(bar, shown, chunk.benchmark)
            self._wait(awaited, bar)
        return self._merge_all()

    def _check_prompts_fit(self) -> None:
        """Raise a `RunError` if the model would be asked nothing; it is not asked anything here.

        Otherwise such a run would end soon, as one in which every answer is wrong. Before the directory is made: with
        another max_sequence_length it is another run, which the same directory would refuse.
        """
        questions = sorted(
            (question for chunk in self.chunks for question in chunk.questions),
            key=lambda question: len(question_text(question)),
        )
        toolbox = replace(self._toolbox, generator=lambda stop_strings: _FirstPrompt(), stream=None)
        trajectories = []
        try:
            for tried in (questions[:1], questions[1:_TRIED_QUESTIONS]):
                trajectories += self.method.run(tried, toolbox)
        except _FirstPromptFits:
            return
        limit, shortest = self.budget.max_sequence_length, min(len(one.prompt_ids) for one in trajectories)
        # Some methods put what they found behind a prompt that does fit.
        length = f"{shortest} tokens" if shortest >= limit else f"{shortest} tokens and what was found for it"
        raise RunError(
            f"nothing could be generated: even the prompt of the shortest question takes {length}, and "
            f"max_sequence_length={limit} is for prompt and completion together; raise it (to "
            f"{max(shortest, limit) + self.budget.max_turn_tokens} at least, for a whole turn), or shorten the prompt "
            f"of {self.method.name} (prompt_template)"
        )

    def _cut(self) -> Iterator[Chunk]:
        number = 0
        for benchmark in self.benchmarks:
            for place, first in enumerate(range(0, len(benchmark), self.chunk_size)):
                questions = benchmark.questions[first : first + self.chunk_size]
                folder = self.output / benchmark.name
                yield Chunk(number, place, benchmark.name, first, tuple(questions), folder)
                number += 1

    def _run_chunk(self, chunk: Chunk) -> bool:
        """Run a chunk unless it is done or under way elsewhere; returns whether it was run here."""
        if chunk.is_done:
            return False
        lock = chunk.file.with_suffix(".lock")
        with contextlib.ExitStack() as stack:
            try:
                ours = stack.enter_context(locked(lock))
            except FileNotFoundError:  # another process has just merged this benchmark
                return False
            if not ours or chunk.is_done:
                return False
            self._toolbox.seconds.reset()
            started = time.perf_counter()
            predictions = self._predict(chunk)
            seconds = time.perf_counter() - started
            timing = {
                "chunk": chunk.place,
                "first": chunk.first,
                "questions": len(chunk.questions),
                "seconds": round(seconds, 3),
                "generation": round(self._toolbox.seconds.generation, 3),
                "retrieval": round(self._toolbox.seconds.tools, 3),
            }
            with written_whole(chunk.timing_file) as file:
                file.write(_line(timing))
            with written_whole(chunk.file) as file:
                file.writelines(_line(prediction.as_row()) for prediction in predictions)
            lock.unlink(missing_ok=True)
        return True

    def _predict(self, chunk: Chunk) -> list[Prediction]:
        self.model.start_batch(chunk.benchmark, chunk.place)
        repeated = [question for question in chunk.questions for _ in range(self.samples)]
        trajectories = self.method.run(repeated, self._toolbox)
        if len(trajectories) != len(repeated):
            raise RunError(
                f"the method {self.method.name} made {len(trajectories)} trajectories of {len(repeated)} questions; a "
                "method must make one of each, in the order asked"
            )
        samples = [Sample.of(trajectory) for trajectory in trajectories]
        return [
            Prediction(
                id=question.id,
                question=question.question,
                golden_answers=tuple(question.golden_answers),
                samples=tuple(samples[place * self.samples : (place + 1) * self.samples]),
                choices=question.choices,
                metadata=question.metadata,
                documents=question.documents,
            )
            for place, question in enumerate(chunk.questions)
        ]

    def _wait(self, awaited: Sequence[Chunk], bar) -> None:
        """Until all of them are done; what a dead process has left is taken over."""
        last_change = time.monotonic()
        missing = [chunk for chunk in awaited if not chunk.is_done]
        if missing:
            logger.info("waiting for %d chunks that other processes are running", len(missing))
        while missing:
            before = len(missing)
            for chunk in missing:
                self._run_chunk(chunk)
            _show(bar, awaited, missing[0].benchmark)
            missing = [chunk for chunk in missing if not chunk.is_done]
            if len(missing) < before:
                last_change = time.monotonic()
            elif missing and time.monotonic() - last_change > self.patience:
                names = ", ".join(f"{chunk.benchmark}/{chunk.place}" for chunk in missing[:5])
                raise RunError(
                    f"{len(missing)} chunks ({names}{', …' if len(missing) > 5 else ''}) are held by other processes "
                    f"that have finished none for {self.patience:g} s; look at those processes, or end them and start "
                    "this run again: it goes on where it stands (wait_minutes waits longer)"
                )
            elif missing:
                time.sleep(POLL_SECONDS)

    def _merge_all(self) -> bool:
        """Merge what is complete; returns whether everything is.

        With all chunks there, a set that another process is merging is waited for: else of two that end together each
        might leave a set to the other, and neither would see the run finished.
        """
        deadline = time.monotonic() + self.patience
        while True:
            merged = [self._merge(benchmark) for benchmark in self.benchmarks]
            if all(merged) or not all(chunk.is_done for chunk in self.chunks):
                return all(merged)
            if time.monotonic() > deadline:
                raise RunError(
                    f"another process has been merging the chunks of {self.output} for {self.patience:g} s; end it "
                    "and start this run again: it goes on where it stands"
                )
            time.sleep(POLL_SECONDS)

    def _merge(self, benchmark: Benchmark) -> bool:
        """Put the chunks of a benchmark together if all are there; returns whether its predictions are complete."""
        folder = self.output / benchmark.name
        final = folder / PREDICTIONS_FILE
        if final.is_file() and not (folder / CHUNKS_FOLDER).exists():
            return True
        chunks = [chunk for chunk in self.chunks if chunk.benchmark == benchmark.name]
        if not all(chunk.is_done for chunk in chunks):
            return False
        with locked(folder / ".merge.lock") as ours:
            if not ours:
                return final.is_file()
            if not final.is_file():
                for chunk in chunks:
                    _check_chunk(chunk)
                _join([chunk.timing_file for chunk in chunks], folder / TIMINGS_FILE)
                _join([chunk.file for chunk in chunks], final)
            (folder / ".merge.lock").unlink(missing_ok=True)
            shutil.rmtree(folder / CHUNKS_FOLDER, ignore_errors=True)
        return True


def prepare_directory(output: Path, card: Mapping[str, Any]) -> None:
    """Make a run's directory, or see that the one there is of the same run.

    Raises:
        RunError: for a directory that holds anything else; nothing in it is touched.
    """
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _CARD_SECONDS
    while True:
        with locked(output / LOCK_FILE) as ours:
            if ours:
                try:
                    _write_or_check_card(output, card)
                finally:
                    (output / LOCK_FILE).unlink(missing_ok=True)
                return
        if time.monotonic() > deadline:
            raise RunError(
                f"{output / LOCK_FILE} has been locked for {_CARD_SECONDS:g} s; end the process that holds it"
            )
        time.sleep(POLL_SECONDS / 10)


def check_same_run(output: Path, card: Mapping[str, Any]) -> None:
    """Raise a `RunError` if the card in a run's directory is not this one; it names every field that differs."""
    wrong = differences(read_card(output), json.loads(json.dumps(card)))
    if wrong:
        raise RunError(
            f"{output} holds another run, which is not overwritten; there against here: {'; '.join(wrong)}. Name "
            "another output, or remove that directory"
        )


def is_finished(output: Path, card: Mapping[str, Any]) -> bool:
    """Whether a run's directory holds predictions for all benchmarks of its card."""
    return all((output / name / PREDICTIONS_FILE).is_file() for name in card["benchmark_order"])


def _write_or_check_card(output: Path, card: Mapping[str, Any]) -> None:
    path = output / RUN_FILE
    if path.is_file():
        check_same_run(output, card)
        return
    foreign = sorted(
        entry.name for entry in output.iterdir() if not entry.name.startswith((LOCK_FILE, f".{RUN_FILE}"))
    )
    if foreign:
        raise RunError(
            f"{output} holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''} but no {RUN_FILE}, so it "
            "is no run; name a directory that is new or empty"
        )
    write_json(path, card)


class _FirstPromptFits(Exception):
    """Some prompt leaves room to generate."""


class _FirstPrompt:
    """A generator that says that it was asked, instead of generating."""

    equal_rows = False

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Any]:
        raise _FirstPromptFits


def score_run(output: str | Path, card: Mapping[str, Any] | None = None) -> dict[str, BenchmarkScores]:
    """Benchmark -> scores of a finished run, in the order of its card. `results.json` is written beside them.

    Questions for which nothing was generated, since their prompts were too long, count as wrong; a warning names their
    number.

    Raises:
        ScoreError: for predictions that are missing or broken.
    """
    output = Path(output)
    card = read_card(output) if card is None else card
    scores = {}
    for name in card["benchmark_order"]:
        predictions = read_predictions(output / name)
        _warn_of_long_prompts(name, predictions, card["budget"]["max_sequence_length"])
        judge = read_judge(output, name, predictions)
        scores[name] = score_benchmark(predictions, seconds=read_seconds(output / name), judge=judge)
    results: dict[str, Any] = {
        "benchmarks": {name: one.as_row() for name, one in scores.items()},
        "judge": judge_of(output),
    }
    if len(scores) > 1:
        results["macro"] = macro_scores(list(scores.values())).as_row()
    # Parts of a run that end together all score it.
    write_json(output / RESULTS_FILE, results, alone=False)
    return scores


def _warn_of_long_prompts(name: str, predictions: Sequence[Prediction], limit: int) -> None:
    long = sum(
        all(sample.tokens == 0 and str(Truncation.SEQUENCE) in sample.truncations for sample in one.samples)
        for one in predictions
    )
    if long:
        logger.warning(
            "%s: %d of %s longer than max_sequence_length=%d: nothing was generated for %s, which counts as wrong; "
            "raise max_sequence_length in another output",
            *(name, long, f"{counted(len(predictions), 'prompt')} {'is' if long == 1 else 'are'}", limit),
            "it" if long == 1 else "them",
        )


def _check_chunk(chunk: Chunk) -> None:
    found = [row.get("id") for _, row in iter_json_objects(chunk.file, RunError)]
    if found != [question.id for question in chunk.questions]:
        raise RunError(f"{chunk.file} answers other questions than it should; remove it and start the run again")


def _join(parts: Sequence[Path], whole: Path) -> None:
    with written_whole(whole) as file:
        for part in parts:
            file.write(part.read_bytes())


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def _show(bar, chunks: Sequence[Chunk], benchmark: str) -> None:
    if bar is not None:
        bar.set_description(f"evaluate {benchmark}", refresh=False)
        bar.update(sum(len(chunk.questions) for chunk in chunks if chunk.is_done) - bar.n)
