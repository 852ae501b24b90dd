"""Streaming through vLLM's step loop, in this process: rows come and go one by one, the engine batches what is there.

Prefix caching serves the turns of a trajectory, and a probe its original's beginning: their ids are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rex_rag.models.generation import Generation

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import CompletionOutput


class VLLMStream:
    """Rows in flight through one `LLM`.

    Args:
        engine: yields the engine, ready to generate with the newest weights, once for every run of a driver.
        temperature: 0 decodes greedily; otherwise samples from the full softmax at this temperature.
        max_length: prompt and completion together, in tokens.
        end_ids: ids that end a row, besides the model's own.
        with_logprobs: whether the log-probability of every sampled token is wanted.
        seed: a row's key -> its seed; `None` lets the engine draw.
    """

    def __init__(
        self,
        engine: Callable[[], AbstractContextManager[LLM]],
        *,
        temperature: float,
        max_length: int,
        end_ids: Sequence[int] = (),
        with_logprobs: bool = False,
        seed: Callable[[tuple[int, ...]], int] | None = None,
    ) -> None:
        self._open = engine
        self._temperature = temperature
        self._max_length = max_length
        self._end_ids = list(end_ids)
        self._logprobs = 0 if with_logprobs else None
        self._seed = seed
        self._tickets = itertools.count()
        self._under_way: set[int] = set()

    def __enter__(self) -> VLLMStream:
        self._context = self._open()
        self._engine = self._context.__enter__().llm_engine
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._under_way:
            self._engine.abort_request([str(ticket) for ticket in self._under_way])
            self._under_way.clear()
        self._context.__exit__(*exception)

    def submit(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop_strings: tuple[str, ...], key: tuple[int, ...]
    ) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ticket = next(self._tickets)
        parameters = SamplingParams(
            temperature=self._temperature,
            max_tokens=max(1, min(max_new_tokens, self._max_length - len(prompt_ids))),
            stop=list(stop_strings),
            include_stop_str_in_output=bool(stop_strings),
            stop_token_ids=self._end_ids,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            logprobs=self._logprobs,
            seed=self._seed(key) if self._seed is not None and self._temperature else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(str(ticket), {"prompt_token_ids": list(prompt_ids)}, parameters)
        self._under_way.add(ticket)
        return ticket

    def step(self, patience: float) -> list[tuple[int, Generation]]:
        finished = []
        for output in self._engine.step():
            if output.finished:
                ticket = int(output.request_id)
                self._under_way.discard(ticket)
                finished.append((ticket, _generation(output.outputs[0])))
        return finished


def _generation(output: CompletionOutput) -> Generation:
    ids = list(output.token_ids)
    if output.logprobs is None:
        return Generation(ids)
    # A token that the engine could not score has NaN, which is no log-probability.
    values = [row[token].logprob for token, row in zip(ids, output.logprobs, strict=True)]
    return Generation(ids, [None if math.isnan(value) else value for value in values])
