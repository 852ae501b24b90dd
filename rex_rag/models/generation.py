"""Generation backends behind one interface: token ids in, token ids (and log-probabilities) out.

A row stops at its first stop string, end-of-sequence token or token limit. The ids of a stopped row may run a
character or two past the stop string where a token straddles it: they were sampled, so they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote for one row. `logprobs` is `None` where the backend reports none.

    is_cut: whether the token limit ended the row; `None` where the number of ids says so.
    """

    ids: list[int]
    logprobs: list[float | None] | None = None
    is_cut: bool | None = None


class Generator(Protocol):
    """A generation backend. `equal_rows` says that every process must send equally many rows."""

    equal_rows: bool

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        """Continue every row by at least one and at most `max_new_tokens` tokens. A collective call."""
        ...


class Stream(Protocol):
    """An engine that takes rows one by one and gives each back as soon as it is done. Used as a context manager.

    Entering makes it ready (a trainer's newest weights), leaving drops what is still under way.
    """

    def __enter__(self) -> Stream: ...

    def __exit__(self, *exception: object) -> None: ...

    def submit(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop_strings: tuple[str, ...], key: tuple[int, ...]
    ) -> int:
        """Have a row continued; returns its ticket. Its draws follow from `key`, where the engine can be seeded."""
        ...

    def step(self, patience: float) -> list[tuple[int, Generation]]:
        """Do a piece of work, or wait at most `patience` seconds for one; rows that are done, by their tickets."""
        ...


class _StopAtTag(StoppingCriteria):
    """Stops row by row at a stop string in what was generated, and remembers at which length each row stopped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        self._criteria = StopStringCriteria(tokenizer, list(stop_strings))
        self._prompt_width = 0
        self.stopped_at: torch.Tensor | None = None  # (B,) total length in tokens, 0 while running

    def reset(self, prompt_width: int) -> None:
        self._prompt_width = prompt_width
        self.stopped_at = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        # A stop string that begins in the prompt is none: a text may be continued where it was stopped.
        stopped = self._criteria(input_ids[:, self._prompt_width :], scores, **kwargs)
        if self.stopped_at is None:
            self.stopped_at = torch.zeros(input_ids.size(0), dtype=torch.long, device=input_ids.device)
        first = stopped & (self.stopped_at == 0)
        self.stopped_at[first] = input_ids.size(1)
        return self.stopped_at > 0


@contextmanager
def _bare_generation_config(model: PreTrainedModel):
    """Hide the model's own generation settings, from which `generate` fills whatever a given config leaves open.

    A model that ships a repetition penalty would otherwise sample from another distribution than log-probabilities
    are computed for. Below an adapter `generate` reads the base model's settings, and peft writes the wrapper's over
    them: every module that holds settings gets its own back, and one that held none loses what it was given.
    """
    own = {
        module: vars(module)["generation_config"] for module in model.modules() if "generation_config" in vars(module)
    }
    for module in own:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module in model.modules():
            vars(module).pop("generation_config", None)
            if module in own:
                module.generation_config = own[module]


class TransformersGenerator:
    """Generation with `model.generate`, left-padded, stopping row by row.

    Args:
        model: the policy. Ignored where `model_context` is given.
        tokenizer: its tokenizer; needs a pad token.
        temperature: 0 decodes greedily; otherwise samples from the full softmax at this temperature.
        eos_token_ids: ids that end a row besides the stop strings; the tokenizer's by default.
        model_context: returns a context manager that yields the model ready to generate (a trainer's unwrapping).
        stop_strings: where a turn ends; with none, only the end-of-sequence token and the token limit end it.
    """

    equal_rows = False

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        eos_token_ids: Sequence[int] | None = None,
        model_context: Callable[[], AbstractContextManager] | None = None,
        stop_strings: Sequence[str],
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token; set tokenizer.pad_token (often to the eos token)")
        self._model_context = model_context or (lambda: nullcontext(model))
        self._tokenizer = tokenizer
        self._stop = _StopAtTag(tokenizer, stop_strings) if stop_strings else None
        if eos_token_ids is None:
            eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._eos_token_ids = list(eos_token_ids)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        self._config = GenerationConfig(
            **{"do_sample": False, **sampling},
            eos_token_id=self._eos_token_ids or None,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            disable_compile=True,
        )

    @torch.no_grad()
    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        self._config.max_new_tokens = max_new_tokens
        width = max(len(row) for row in prompt_ids)
        if self._stop is not None:
            self._stop.reset(width)
        input_ids = torch.full((len(prompt_ids), width), self._tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(prompt_ids):
            input_ids[index, width - len(row) :] = torch.tensor(row)
            attention_mask[index, width - len(row) :] = 1
        with self._model_context() as model, _bare_generation_config(model):
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=self._config,
                stopping_criteria=StoppingCriteriaList([] if self._stop is None else [self._stop]),
            )
        new_ids = output[:, width:].cpu()
        lengths = self._lengths(new_ids, width)
        return [Generation(ids=row[:length].tolist()) for row, length in zip(new_ids, lengths, strict=True)]

    def _lengths(self, new_ids: torch.Tensor, prompt_width: int) -> list[int]:
        """How many of the new tokens each row sampled itself; the rest is padding while other rows went on."""
        lengths = torch.full((new_ids.size(0),), new_ids.size(1))
        if self._stop is not None and self._stop.stopped_at is not None:
            stopped_at = self._stop.stopped_at.cpu()
            lengths = torch.where(stopped_at > 0, stopped_at - prompt_width, lengths)
        is_eos = torch.isin(new_ids, torch.tensor(self._eos_token_ids))
        first_eos = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, new_ids.size(1))
        return torch.minimum(lengths, first_eos).tolist()


class VLLMGenerator:
    """Generation through TRL's vLLM object, colocated or served; TRL keeps the weights in sync.

    Args:
        single_turn: (prompt ids) -> (completion ids, log-probs), TRL's single-turn generation.
        set_max_tokens: sets the token limit of the next call.
        equal_rows: whether every process must send equally many rows (server mode slices by process).
    """

    def __init__(
        self,
        single_turn: Callable[[list[list[int]]], tuple[list[list[int]], list[list[float | None]]]],
        set_max_tokens: Callable[[int], None],
        *,
        equal_rows: bool,
    ) -> None:
        self._single_turn = single_turn
        self._set_max_tokens = set_max_tokens
        self.equal_rows = equal_rows

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        self._set_max_tokens(max_new_tokens)
        completions, logprobs = self._single_turn([list(row) for row in prompt_ids])
        return [
            Generation(ids=list(ids), logprobs=list(values)) for ids, values in zip(completions, logprobs, strict=True)
        ]
