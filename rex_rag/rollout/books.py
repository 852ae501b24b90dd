"""The books of a rollout: what a generation becomes, where it was cut, and where the seconds went.

One rule names a cut, for training and evaluation: a turn that ends neither in an end-of-message token nor behind a
stop string was cut, by the sequence's limit where that was what was left, else by the turn's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rex_rag.protocols.inert import ALL_TAGS, control_tokens
from rex_rag.rollout.script import Generate, RolloutBudget, Running, Written
from rex_rag.support.tokenization import decode_on
from rex_rag.types import Segment, SegmentKind, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generation

_SAID = "said-by-the-assistant"


@dataclass(slots=True)
class RolloutSeconds:
    """Where the wall time of rollouts went, in seconds, since the last reset.

    Streaming, calls run beside generation: `tools` is then what was waited for with nothing to generate.
    """

    generation: float = 0.0
    tools: float = 0.0
    total: float = 0.0

    @property
    def driver(self) -> float:
        """The driver's own share: neither model nor tools."""
        return self.total - self.generation - self.tools

    def reset(self) -> None:
        self.generation = self.tools = self.total = 0.0


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Control tokens that end the model's message: the tokenizer's own, and what its chat template writes there.

    They differ for base models, of which an engine then knows the first alone and goes on behind the second.
    """
    own = [tokenizer.eos_token] if tokenizer.eos_token else []
    if tokenizer.chat_template is None:
        return tuple(own)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_SAID)[2].lstrip()
    of_template = [token for token in control_tokens(tokenizer) if behind.startswith(token)]
    return tuple(dict.fromkeys([*own, *of_template]))


class Books:
    """Turns what an engine sampled into segments.

    Args:
        marks: strings that carry meaning in what the model writes, though the tokenizer may hold them as control
            tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, budget: RolloutBudget, marks: Iterable[str]) -> None:
        self.budget = budget
        self._tokenizer = tokenizer
        as_id = tokenizer.convert_tokens_to_ids
        self._end_ids = {as_id(token) for token in end_tokens(tokenizer)}
        self._control_ids = {as_id(token) for token in control_tokens(tokenizer) if token not in {*ALL_TAGS, *marks}}

    def room(self, wants: Generate) -> int:
        return self.budget.max_sequence_length - len(wants.prompt_ids)

    def limit(self, wants: Generate) -> int:
        """Tokens that a generation may have; at most 0 where nothing is left of the sequence."""
        turn = self.budget.max_turn_tokens
        return min(turn, turn if wants.limit is None else wants.limit, self.room(wants))

    def enter(self, running: Sequence[Running], generations: Sequence[Generation]) -> None:
        """Append what was sampled, count what was cut, and let every script go on."""
        limits = [self.limit(one.generate) for one in running]
        sampled = [generation.ids[:limit] for generation, limit in zip(generations, limits, strict=True)]
        texts = self.decode(sampled)
        for one, generation, limit, ids, text in zip(running, generations, limits, sampled, texts, strict=True):
            logprobs = None if generation.logprobs is None else generation.logprobs[:limit]
            one.trajectory.segments.append(Segment(SegmentKind.POLICY, ids, text, logprobs))
            one.trajectory.turns += 1
            one.generations += 1
            is_cut = bool(generation.is_cut) or len(ids) >= limit
            one.resume(self._written(one, ids, text, limit, is_cut))

    def _written(self, one: Running, ids: list[int], text: str, limit: int, is_cut: bool) -> Written:
        kept = next((place for place, token in enumerate(ids) if token in self._end_ids), len(ids))
        while kept and ids[kept - 1] in self._control_ids:
            kept -= 1
        has_end_token = kept < len(ids)
        if has_end_token:
            text = self.decode([ids[:kept]])[0]
        # A backend may leave the end token out; a row that stopped early for no other reason ended.
        stopped = any(string in text for string in one.generate.stop)
        ended = has_end_token or not (is_cut or stopped)
        truncation = None
        if not ended and not stopped:
            by_turn = limit in (one.generate.limit, self.budget.max_turn_tokens)
            truncation = Truncation.TURN if by_turn else Truncation.SEQUENCE
            one.trajectory.truncations[truncation] += 1
        return Written(ids[:kept], text, ended, truncation)

    def decode(self, ids: list[list[int]]) -> list[str]:
        """The texts of a batch of token ids, control tokens and spaces included."""
        return decode_on(self._tokenizer, ids)
