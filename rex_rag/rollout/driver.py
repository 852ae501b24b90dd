"""The driver: runs many scripts together, in one of two schedules behind one interface.

Lock-step: all scripts that wait for the model go into one call, then all that wait for tools. It is for engines whose
calls are collective (ZeRO-3 and FSDP generation, served or tensor-parallel vLLM): every process makes the same number
of generate calls, and one with nothing left to do joins with a dummy row.

Streaming: for an engine of this process alone. A trajectory goes on as soon as its own result is there; calls of many
trajectories that come within a few milliseconds are put together, and run while the engine generates for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING

from rex_rag.rollout.books import Books, RolloutSeconds
from rex_rag.rollout.script import Call, Generate, RolloutBudget, Running, Script
from rex_rag.support.stages import STAGES
from rex_rag.types import ToolUse, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generation, Generator, Stream
    from rex_rag.tools.base import Tool, ToolResult

# Calls that come within this time are asked together; a trajectory waits no longer for others.
BATCH_SECONDS = 0.004
# Batches of a tool that may run at once, where it says that they may.
CONCURRENT_BATCHES = 8


class Driver:
    """Runs scripts to their end.

    Args:
        generator: stop strings -> the backend that ends a row after any of them, for lock-step.
        tools: what scripts may call, by name.
        stream: the engine to stream through; lock-step by default.
        marks: as for `Books`.
        seconds: where the time goes is added up here.
        max_over_ranks: the maximum of an integer over all processes; the identity for one process.
        stop_sets: every set of stop strings that scripts ask for, in an order that all processes share.
        context_length: tokens, prompt and limit together, that an engine serving all processes takes of a row;
            `max_sequence_length` by default. The larger it is, the fewer rows near their end need a call of their own.
    """

    def __init__(
        self,
        generator: Callable[[tuple[str, ...]], Generator],
        tools: Mapping[str, Tool],
        tokenizer: PreTrainedTokenizerBase,
        budget: RolloutBudget,
        *,
        stop_sets: Sequence[tuple[str, ...]],
        stream: Stream | None = None,
        marks: Sequence[str] = (),
        seconds: RolloutSeconds | None = None,
        max_over_ranks: Callable[[int], int] = lambda count: count,
        context_length: int | None = None,
    ) -> None:
        self.tools = tools
        self.books = Books(tokenizer, budget, marks)
        self.seconds = RolloutSeconds() if seconds is None else seconds
        self.generate_calls = 0
        self.generator = generator
        self._stream = stream
        self._stop_sets = sorted(set(stop_sets))
        self._max_over_ranks = max_over_ranks
        self._context_length = context_length or budget.max_sequence_length
        # A row that only keeps a collective call company; what it says is thrown away.
        self._dummy = tokenizer("?", add_special_tokens=False)["input_ids"][:1]

    def run(
        self, scripts: Sequence[tuple[Script, Trajectory]], stop_sets: Sequence[tuple[str, ...]] | None = None
    ) -> None:
        """Run scripts to their end, in place. A collective: every process must call it, with however many it has.

        Args:
            stop_sets: those of these scripts, where they are not the driver's.

        Raises:
            RetrievalError: when a call could not be answered.
        """
        started = time.perf_counter()
        if self._stream is None:
            for _ in self.rounds(scripts, stop_sets):
                pass
        else:
            _Streaming(self, self._stream, _started(scripts)).run()
        self.seconds.total += time.perf_counter() - started

    def end_without_room(self, running: Sequence[Running]) -> None:
        """End scripts whose sequence has no token left to generate."""
        for one in running:
            if isinstance(one.wants, Generate) and self.books.room(one.wants) <= 0:
                one.trajectory.truncations[Truncation.SEQUENCE] += 1
                one.end()

    # Lock-step

    def rounds(
        self, scripts: Sequence[tuple[Script, Trajectory]], stop_sets: Sequence[tuple[str, ...]] | None = None
    ) -> Iterator[None]:
        """Run scripts to their end in lock-step, with a pause after each round of calls, and of generation."""
        running = _started(scripts)
        sets = self._stop_sets if stop_sets is None else sorted(set(stop_sets))
        while True:
            # All calls first, so that as many scripts as possible wait for the model together.
            while calling := [one for one in running if isinstance(one.wants, Call)]:
                self._call(calling)
                yield
            self.end_without_room(running)
            waiting = [one for one in running if one.wants is not None]
            if self._max_over_ranks(len(waiting)) == 0:
                return
            groups = [(stop, [one for one in waiting if one.generate.stop == stop]) for stop in sets]
            for stop, group in groups:
                if rows := self._max_over_ranks(len(group)):
                    self._generate(self.generator(stop), group, rows)
            yield

    def _generate(self, generator: Generator, running: list[Running], rows: int) -> None:
        """Sample one turn of every row, cut to each row's own limit."""
        prompts = [one.generate.prompt_ids for one in running]
        limits = [self.books.limit(one.generate) for one in running]
        output: dict[int, Generation] = {}
        started = time.perf_counter()
        for asked, limit, count in self._calls(generator, prompts, limits, rows):
            dummies = [self._dummy] * (count - len(asked))
            with STAGES.inside("generation"):
                answers = generator.generate([prompts[row] for row in asked] + dummies, max_new_tokens=limit)
            output.update(zip(asked, answers, strict=False))
            self.generate_calls += 1
        self.seconds.generation += time.perf_counter() - started
        self.books.enter(running, [output[row] for row in range(len(running))])

    def _calls(
        self, generator: Generator, prompts: list[list[int]], limits: list[int], rows: int
    ) -> Iterator[tuple[list[int], int, int]]:
        """Split a turn into generate calls, equally many on every process: (indices of rows, token limit, rows sent).

        An engine of this process alone ends each row where its context does, so one call with the largest limit does.
        An engine that serves all processes takes one limit for all rows, and refuses a call in which a single row
        could outgrow its context: rows of little room wait for a call with a limit that they can take. A row is in
        one call a turn, so it is sampled as if it were alone.
        """
        if not generator.equal_rows:
            yield list(range(len(prompts))), max(limits, default=1), max(1, len(prompts))
            return
        waiting = list(range(len(prompts)))
        while rows:
            limit = self._max_over_ranks(max((limits[row] for row in waiting), default=1))
            asked = [row for row in waiting if len(prompts[row]) + limit <= self._context_length]
            yield asked, limit, self._max_over_ranks(len(asked))
            waiting = [row for row in waiting if row not in asked]
            rows = self._max_over_ranks(len(waiting))

    # Tools

    def _call(self, running: list[Running]) -> None:
        started = time.perf_counter()
        with STAGES.inside("tools"):
            results = {name: self.tools[name].run(arguments) for name, arguments in batches(running).items()}
        self.seconds.tools += time.perf_counter() - started
        hand_out(running, results)


def _started(scripts: Sequence[tuple[Script, Trajectory]]) -> list[Running]:
    return [Running(script, trajectory, row) for row, (script, trajectory) in enumerate(scripts)]


def batches(running: Sequence[Running]) -> dict[str, list]:
    """Tool -> the arguments of all its calls among these scripts, in their order."""
    found: dict[str, list] = {}
    for one in running:
        for call in one.calls:
            found.setdefault(call.name, []).append(call.arguments)
    return found


def hand_out(running: Sequence[Running], results: Mapping[str, Sequence[ToolResult]]) -> None:
    """Give every script the results of its calls, as `batches` put them together, and record them."""
    left = {name: iter(found) for name, found in results.items()}
    for one in running:
        own = [next(left[call.name]) for call in one.calls]
        for call, result in zip(one.calls, own, strict=True):
            place = len(one.trajectory.segments)
            one.trajectory.tool_uses.append(ToolUse(call.name, call.arguments, result.passages, place))
        one.resume(own)


class _Streaming:
    """One run in the streaming schedule."""

    def __init__(self, driver: Driver, stream: Stream, running: list[Running]) -> None:
        self._driver = driver
        self._stream = stream
        self._generating: dict[int, Running] = {}  # by the engine's ticket
        self._calling: list[Running] = []
        self._called: dict[Future, list[Running]] = {}
        self._oldest_call = 0.0
        self._running = running

    def run(self) -> None:
        self._locks = {name: Lock() for name, tool in self._driver.tools.items() if not tool.is_concurrent}
        threads = self._threads = ThreadPoolExecutor(CONCURRENT_BATCHES, "tools")
        try:
            with self._stream:
                self._go_on(self._running)
                while self._generating or self._calling or self._called:
                    self._launch_calls()
                    self._advance()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _go_on(self, running: Sequence[Running]) -> None:
        """Put what scripts want on its way."""
        self._driver.end_without_room(running)
        for one in running:
            if isinstance(one.wants, Call):
                self._oldest_call = self._oldest_call if self._calling else time.perf_counter()
                self._calling.append(one)
            elif one.wants is not None:
                limit = self._driver.books.limit(one.wants)
                key = (one.row, one.generations)
                self._generating[self._stream.submit(one.wants.prompt_ids, limit, one.wants.stop, key)] = one
                self._driver.generate_calls += 1

    def _launch_calls(self) -> None:
        waited = time.perf_counter() - self._oldest_call
        if not self._calling or (self._generating and waited < BATCH_SECONDS):
            return
        # Scripts that call the same tools go together; those that call several wait for all of them.
        groups: dict[frozenset, list[Running]] = {}
        for one in self._calling:
            groups.setdefault(frozenset(call.name for call in one.calls), []).append(one)
        self._calling = []
        for group in groups.values():
            self._called[self._threads.submit(self._run_calls, batches(group))] = group

    def _run_calls(self, calls: Mapping[str, Sequence]) -> dict[str, list[ToolResult]]:
        return {name: self._run_tool(name, arguments) for name, arguments in calls.items()}

    def _run_tool(self, name: str, arguments: Sequence) -> list[ToolResult]:
        with self._locks.get(name, nullcontext()):
            return self._driver.tools[name].run(arguments)

    def _advance(self) -> None:
        """Let the engine work, or wait for calls where it has nothing to do; then let scripts go on."""
        started = time.perf_counter()
        if self._generating:
            with STAGES.inside("generation"):
                finished = self._stream.step(BATCH_SECONDS)
            self._driver.seconds.generation += time.perf_counter() - started
            if finished:
                running = [self._generating.pop(ticket) for ticket, _ in finished]
                self._driver.books.enter(running, [generation for _, generation in finished])
                self._go_on(running)
            done = [future for future in self._called if future.done()]
        else:
            with STAGES.inside("tools"):
                done = list(wait(self._called, return_when=FIRST_COMPLETED).done)
            self._driver.seconds.tools += time.perf_counter() - started
        for future in done:
            running = self._called.pop(future)
            hand_out(running, future.result())
            self._go_on(running)
