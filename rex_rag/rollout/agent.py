"""The agent's turns: think, call, read, answer, by a protocol and within a budget.

Invariant: the ids that the model is given in turn k+1 are exactly the ids of turn k plus the ids of the inserted text.
Text is decoded only to be parsed. The turns are a script that is re-enterable from its trajectory: a probe is an
original's beginning that goes on. Nothing here knows rewards or trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rex_rag.protocols.base import Action, Protocol
from rex_rag.protocols.chat import encode_chat
from rex_rag.protocols.inert import control_tokens, make_inert
from rex_rag.rollout.books import RolloutSeconds
from rex_rag.rollout.driver import Driver
from rex_rag.rollout.script import CHARACTERS_A_TOKEN, Call, Generate, RolloutBudget, Script
from rex_rag.support.errors import UserError
from rex_rag.support.tokenization import decode_on, encode_on
from rex_rag.tools.base import Tool, ToolResult
from rex_rag.types import AnswerSpan, Segment, SegmentKind, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generator, Stream

# Observations whose ids are kept: the trajectories of a question often read the same.
_KEPT_OBSERVATIONS = 4096


class AgentScript:
    """The turns of an agent as a script.

    Raises:
        ValueError: for an observation budget that the protocol's own framing would fill.
    """

    def __init__(
        self,
        protocol: Protocol,
        tokenizer: PreTrainedTokenizerBase,
        budget: RolloutBudget,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.protocol = protocol
        self.budget = budget
        self.tokenizer = tokenizer
        self.settings = chat_template_kwargs
        self.control_tokens = control_tokens(tokenizer)
        self._framing = protocol.framing(tokenizer, chat_template_kwargs)
        self._tail_ids = self._encode(self._framing.tail)
        self._body_ids = lru_cache(_KEPT_OBSERVATIONS)(lambda text: tuple(self._encode(text)))
        longest_head = self._framing.message_end + self._framing.head
        self._smallest_observation = len(self._encode(longest_head)) + len(self._tail_ids) + 1
        if budget.max_observation_tokens < self._smallest_observation:
            raise UserError(
                f"max_observation_tokens is {budget.max_observation_tokens}, but the text around a result alone takes "
                f"{self._smallest_observation - 1} tokens with this tokenizer; use at least "
                f"{self._smallest_observation}, better several hundred"
            )

    def encode(self, question: str) -> list[int]:
        """The prompt ids of a question, up to where the model's turn begins."""
        messages = self.protocol.messages(question, self.control_tokens)
        return encode_chat(self.tokenizer, messages, self.settings, self.protocol.schemas)

    def parse(self, text: str) -> Action | None:
        return self.protocol.parse(text)

    def decode(self, ids: list[list[int]]) -> list[str]:
        """The texts of a batch of token ids, control tokens and spaces included."""
        return decode_on(self.tokenizer, ids)

    def turns(self, trajectory: Trajectory) -> Script:
        """Run a trajectory from where it stands to its end."""
        while True:
            so_far = trajectory.prompt_ids + trajectory.completion_ids
            written = yield Generate(so_far, self.protocol.stop_strings)
            last = trajectory.turns > self.budget.max_turns
            action = self.protocol.parse(trajectory.segments[-1].text)
            if action is not None and action.answer is not None:
                trajectory.answer = action.answer
                trajectory.answer_span = AnswerSpan(len(trajectory.segments) - 1, action.start)
                return
            if action is not None and not last:
                results = yield Call(action.calls)
                if not self._observe(trajectory, results):
                    return
                continue
            if action is None:
                trajectory.invalid_actions += 1
                last = last or written.truncation is Truncation.SEQUENCE
            if last:
                return
            text = self._message_end(trajectory) + self._framing.feedback
            if not self._insert(trajectory, SegmentKind.FEEDBACK, list(self._body_ids(text)), text):
                return

    def _message_end(self, trajectory: Trajectory) -> str:
        """What closes the model's message before something follows; it may have written it itself."""
        end = self._framing.message_end
        return "" if not end or trajectory.segments[-1].text.rstrip().endswith(end) else end

    def _observe(self, trajectory: Trajectory, results: Sequence[ToolResult]) -> bool:
        """Insert what calls brought, cut to the budget; returns whether the trajectory goes on."""
        room = self.budget.max_sequence_length - trajectory.length - 1
        allowance = min(self.budget.max_observation_tokens, room)
        if allowance < self._smallest_observation:
            trajectory.truncations[Truncation.SEQUENCE] += 1
            return False
        kept = allowance - len(self._tail_ids)
        most = kept * CHARACTERS_A_TOKEN
        inert = [make_inert(result.text[:most], self.control_tokens, self.protocol.marks) for result in results]
        body = self._message_end(trajectory) + self._framing.head + self._framing.between.join(inert)
        ids = list(self._body_ids(body[:most]))
        if len(ids) > kept or len(body) > most or any(len(result.text) > most for result in results):
            cause = Truncation.OBSERVATION if allowance < room else Truncation.SEQUENCE
            trajectory.truncations[cause] += 1
            ids = ids[:kept]
            body = self.decode([ids])[0]
        return self._insert(trajectory, SegmentKind.INFORMATION, ids + self._tail_ids, body + self._framing.tail)

    def _insert(self, trajectory: Trajectory, kind: SegmentKind, ids: list[int], text: str) -> bool:
        """Append inserted text; `False` where it would leave no token to generate."""
        if trajectory.length + len(ids) < self.budget.max_sequence_length:
            trajectory.segments.append(Segment(kind, ids, text))
            return True
        trajectory.truncations[Truncation.SEQUENCE] += 1
        return False

    def _encode(self, text: str) -> list[int]:
        return encode_on(self.tokenizer, [text])[0]


class Agent:
    """A model that acts by a protocol: runs trajectories to their end.

    Args:
        generator: stop strings -> the backend that ends a row after any of them.
        tools: what the protocol's tools are; each tool of the protocol must be there.
        protocol: how the model is asked, acts and is answered.
        budget: the limits.
        stream: the engine to stream through; lock-step by default.

    The other arguments are the driver's.
    """

    def __init__(
        self,
        generator: Callable[[tuple[str, ...]], Generator],
        tools: Sequence[Tool],
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        budget: RolloutBudget | None = None,
        *,
        stream: Stream | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_over_ranks: Callable[[int], int] = lambda count: count,
        context_length: int | None = None,
    ) -> None:
        self.budget = budget or RolloutBudget()
        self.script = AgentScript(protocol, tokenizer, self.budget, chat_template_kwargs)
        self.seconds = RolloutSeconds()
        self.driver = Driver(
            generator,
            {tool.spec.name: tool for tool in tools},
            tokenizer,
            self.budget,
            stop_sets=[protocol.stop_strings],
            stream=stream,
            marks=protocol.marks,
            seconds=self.seconds,
            max_over_ranks=max_over_ranks,
            context_length=context_length,
        )

    @property
    def protocol(self) -> Protocol:
        return self.script.protocol

    def rollout(self, prompts: Sequence[Sequence[int]]) -> list[Trajectory]:
        """Run one trajectory per prompt (token ids) to its end. A collective: every process must call it.

        Raises:
            ValueError: for a prompt that leaves no token to generate.
            RetrievalError: when a call could not be answered.
        """
        for prompt in prompts:
            if len(prompt) >= self.budget.max_sequence_length:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens leaves nothing of max_sequence_length "
                    f"{self.budget.max_sequence_length}; shorten the prompt template or raise the limit"
                )
        trajectories = [Trajectory(prompt_ids=list(prompt)) for prompt in prompts]
        self.resume(trajectories)
        return trajectories

    def resume(self, trajectories: Sequence[Trajectory]) -> None:
        """Run the given trajectories to their end, in place. A collective: every process must call it."""
        self.driver.run([(self.script.turns(one), one) for one in trajectories if not one.done])
