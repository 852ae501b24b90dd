"""Where the seconds of a method go: wrappers around generator and retriever that measure and change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rex_rag.retrieval.base import Retriever, as_retriever
from rex_rag.types import Passage

if TYPE_CHECKING:
    from rex_rag.models.generation import Generation, Generator


class Stopwatch:
    """Seconds in the model (`generation`) and in the retriever (`retrieval`) since the last reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.generation = 0.0
        self.retrieval = 0.0

    def generator(self, make: Callable[[tuple[str, ...]], Generator]) -> Callable[[tuple[str, ...]], Generator]:
        """`make` with its generators measured."""
        return lambda stop_strings: _TimedGenerator(make(stop_strings), self)

    def retriever(self, retriever: Retriever) -> Retriever:
        """The retriever, measured."""
        return _TimedRetriever(as_retriever(retriever), self)


class _TimedGenerator:
    def __init__(self, generator: Generator, watch: Stopwatch) -> None:
        self._generator = generator
        self._watch = watch
        self.equal_rows = generator.equal_rows

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        started = time.perf_counter()
        try:
            return self._generator.generate(prompt_ids, max_new_tokens)
        finally:
            self._watch.generation += time.perf_counter() - started


class _TimedRetriever(Retriever):
    def __init__(self, retriever: Retriever, watch: Stopwatch) -> None:
        self._retriever = retriever
        self._watch = watch

    @property
    def description(self) -> str:
        return self._retriever.description

    def check(self) -> None:
        self._retriever.check()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        with self._measured():
            return self._retriever.search(queries, top_k)

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        with self._measured():
            return self._retriever.read(keys)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._watch.retrieval += time.perf_counter() - started
