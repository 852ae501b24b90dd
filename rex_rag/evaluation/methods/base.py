"""What a method of the comparison is, and what it is given to work with.

A method turns questions into trajectories, one each. It is a script a question (`rex_rag.rollout.script`), and the
driver runs all of a batch together. It parses model-written text alone, and a question it cannot work on (a prompt
beyond the budget) becomes an unanswered trajectory with its cause counted; a failed search is no result of a method
and stops the run.

A script keeps the ids of what the model wrote and continues them; it never encodes them anew, save where a method's
own prompt quotes the model. Where a method shows retrieved text inside its prompt (RAG, IRCoT) or asks the model aside
(Search-o1), a trajectory's segments follow each other in time, not in one sequence of tokens.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rex_rag.evaluation.methods.prompt_texts import CHOICES, Prompt, placeholders, question_text
from rex_rag.evaluation.records import Question
from rex_rag.protocols.chat import encode_chat
from rex_rag.protocols.inert import control_tokens
from rex_rag.retrieval.base import Retriever
from rex_rag.rollout.books import RolloutSeconds
from rex_rag.rollout.driver import Driver
from rex_rag.rollout.script import CHARACTERS_A_TOKEN, RolloutBudget, Script
from rex_rag.support.errors import UserError
from rex_rag.support.tokenization import decode_on, encode_on
from rex_rag.tools import Tool, make_tools
from rex_rag.types import Segment, SegmentKind, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generator, Stream


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The same for every method of a comparison.

    generator: (stop strings) -> the generation backend that ends a row after any of them; called with each of
    `Method.stop_strings`, also with none, and often, so it should keep what it builds. stream: the engine to stream
    through, lock-step where there is none. retriever: may be `None` for methods that do not use one. budget: all
    limits, and `budget.top_k` passages a search. chat_template_kwargs: what the chat template is rendered with, as in
    training. seconds: where the time goes is added up here.
    """

    tokenizer: PreTrainedTokenizerBase
    generator: Callable[[tuple[str, ...]], Generator]
    retriever: Retriever | None = None
    budget: RolloutBudget = field(default_factory=RolloutBudget)
    chat_template_kwargs: Mapping[str, Any] | None = None
    stream: Stream | None = None
    seconds: RolloutSeconds = field(default_factory=RolloutSeconds)

    def encode_chat(self, prompt: Prompt | str) -> list[int]:
        """The prompt ids of one user message, up to where the model's turn begins.

        Raises:
            ValueError: for a tokenizer without a chat template.
        """
        text = prompt if isinstance(prompt, str) else prompt.text(self.control_tokens)
        return encode_chat(self.tokenizer, [{"role": "user", "content": text}], self.chat_template_kwargs)

    def encode(self, text: str) -> list[int]:
        """Ids of text that is inserted; no special token is added."""
        return encode_on(self.tokenizer, [text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included."""
        return decode_on(self.tokenizer, [ids])[0]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Strings of the tokenizer's own that inserted text must not contain."""
        return control_tokens(self.tokenizer)


class Attempt:
    """What a script works with: one question, its trajectory, and the tools."""

    def __init__(self, question: Question, toolbox: Toolbox) -> None:
        self.question = question
        self.tools = toolbox
        self.trajectory = Trajectory(prompt_ids=[])

    def within_observation(self, text: str, frame: str = "") -> str:
        """Text cut to what the observation budget leaves beside the frame it will stand in; a cut is counted."""
        limit = max(0, self.tools.budget.max_observation_tokens - len(self.tools.encode(frame)))
        most = limit * CHARACTERS_A_TOKEN
        ids = self.tools.encode(text[:most])
        if len(ids) <= limit and len(text) <= most:
            return text
        self.trajectory.truncations[Truncation.OBSERVATION] += 1
        return self.tools.decode(ids[:limit]).rstrip("\ufffd")

    def inform(self, text: str) -> list[int]:
        """Record text that the model is shown next; return its ids."""
        ids = self.tools.encode(text)
        self.trajectory.segments.append(Segment(SegmentKind.INFORMATION, ids, text))
        return ids


class Method(ABC):
    """One row of the comparison.

    Class attributes: `name` (of the command line), `title` (of tables), `source` (the citation),
    `uses_retriever`, `default_template` (the first prompt), `further_prompts` (its other texts, by name),
    `stop_strings` (every set that its scripts ask for), `marks` (strings of its own that carry meaning in what the
    model writes), `revision` (a number to raise whenever the same texts of a model come to another answer: runs of
    different revisions are not compared).

    Args:
        template: takes the place of `default_template`; must hold the same placeholders.
        further: take the place of `further_prompts` of the same name.

    Raises:
        ValueError: for a template that lacks a placeholder, and for further prompts that the method has not.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    uses_retriever: ClassVar[bool]
    revision: int | str = 1
    default_template: str
    further_prompts: Mapping[str, str] = {}
    stop_strings: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...] = ()

    def __init__(self, template: str | None = None, further: Mapping[str, str] | None = None) -> None:
        if unknown := dict(further or {}).keys() - self.further_prompts.keys():
            raise UserError(f"the method {self.name} has no text called {', '.join(sorted(unknown))}; leave it out")
        self.further = {**self.further_prompts, **(further or {})}
        self.template = self.default_template if template is None else template
        given = placeholders(self.template)
        missing = [name for name in placeholders(self.default_template) if name not in given]
        if missing:
            raise UserError(
                f"the prompt template of {self.name} has no '{{{missing[0]}}}' placeholder: {self.template[:80]!r}… "
                "Add it where that text goes"
            )

    @property
    def prompts(self) -> dict[str, str]:
        """Every text the method puts to the model, by name, with its placeholders."""
        return {"prompt": self.template, **self.further, "choices": CHOICES}

    @property
    def prompt_sha256(self) -> str:
        """Hash of `prompts` and stop strings, for the run's card."""
        content = {"prompts": self.prompts, "stop_strings": self.stop_strings}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def prompt_text(self, question: Question, **values: str) -> Prompt:
        """The first prompt of a question; further values are inserted as they are, and must be inert."""
        return Prompt(self.template, question_text(question), values)

    def run(self, questions: Sequence[Question], toolbox: Toolbox) -> list[Trajectory]:
        """Work on a batch of questions together; one finished trajectory for each, in their order.

        For several samples of a question, list it several times.

        Raises:
            RetrievalError: when a search could not be answered.
            ValueError: for a method that searches and a toolbox without a retriever.
        """
        if self.uses_retriever and toolbox.retriever is None:
            raise UserError(f"the method {self.name} searches, but no retriever was given; name one")
        attempts = [Attempt(question, toolbox) for question in questions]
        driver = Driver(
            toolbox.generator,
            {tool.spec.name: tool for tool in self.tools(toolbox)},
            toolbox.tokenizer,
            toolbox.budget,
            stop_sets=self.stop_strings,
            stream=toolbox.stream,
            marks=self.marks,
            seconds=toolbox.seconds,
        )
        scripts = self.scripts(attempts, toolbox)
        driver.run([(script, attempt.trajectory) for script, attempt in zip(scripts, attempts, strict=True)])
        return [attempt.trajectory for attempt in attempts]

    def tools(self, toolbox: Toolbox) -> list[Tool]:
        """What its scripts may call."""
        return make_tools(["search"], toolbox.retriever, toolbox.budget.top_k) if self.uses_retriever else []

    def scripts(self, attempts: Sequence[Attempt], toolbox: Toolbox) -> list[Script]:
        """One script for each attempt."""
        return [self.script(attempt) for attempt in attempts]

    @abstractmethod
    def script(self, attempt: Attempt) -> Script:
        """Work on one question: set `prompt_ids` and, where there is one, `answer` of `attempt.trajectory`."""
