"""What a method of the comparison is, and what it is given to work with.

A method turns questions into trajectories, one each. It parses model-written text alone, and a question it cannot work
on (a prompt beyond the budget) becomes an unanswered trajectory with its cause counted; a failed search is no result
of a method and stops the run.
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
from rex_rag.models.chat import encode_chat
from rex_rag.protocols.search_r1 import control_tokens
from rex_rag.retrieval.base import Retriever
from rex_rag.rollout.engine import RolloutBudget
from rex_rag.types import Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generator

_SAID = "said-by-the-assistant"


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The same for every method of a comparison.

    generator: (stop strings) -> the generation backend that ends a row after any of them; called with each of
    `Method.stop_strings`, also with none, and often, so it should keep what it builds. retriever: may be `None` for
    methods that do not use one. budget: all limits, and `budget.top_k` passages a search. chat_template_kwargs: what
    the chat template is rendered with, as in training.
    """

    tokenizer: PreTrainedTokenizerBase
    generator: Callable[[tuple[str, ...]], Generator]
    retriever: Retriever | None = None
    budget: RolloutBudget = field(default_factory=RolloutBudget)
    chat_template_kwargs: Mapping[str, Any] | None = None

    def encode_chat(self, prompt: Prompt | str) -> list[int]:
        """The prompt ids of one user message, up to where the model's turn begins (`rex_rag.models.chat`).

        Raises:
            ValueError: for a tokenizer without a chat template.
        """
        text = prompt if isinstance(prompt, str) else prompt.text(self.control_tokens)
        return encode_chat(self.tokenizer, [{"role": "user", "content": text}], self.chat_template_kwargs)

    def encode(self, text: str) -> list[int]:
        """Ids of text that is inserted; no special token is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Strings of the tokenizer's own that inserted text must not contain."""
        return control_tokens(self.tokenizer)

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Control tokens that end the model's message: the tokenizer's own, and what its chat template writes there.

        They differ for base models, of which an engine then knows the first alone and goes on behind the second.
        """
        own = [self.tokenizer.eos_token] if self.tokenizer.eos_token else []
        if self.tokenizer.chat_template is None:
            return tuple(own)
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
        behind = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_SAID)[2].lstrip()
        of_template = [token for token in self.control_tokens if behind.startswith(token)]
        return tuple(dict.fromkeys([*own, *of_template]))


class Method(ABC):
    """One row of the comparison.

    Class attributes: `name` (of the command line), `title` (of tables), `source` (the citation),
    `uses_retriever`, `default_template` (the first prompt), `further_prompts` (its other texts, by name),
    `stop_strings` (every set that it asks the toolbox's `generator` for), `revision` (a number to raise whenever the
    same texts of a model come to another answer: runs of different revisions are not compared).

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
    revision: ClassVar[int] = 1
    default_template: ClassVar[str]
    further_prompts: ClassVar[dict[str, str]] = {}
    stop_strings: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self, template: str | None = None, further: Mapping[str, str] | None = None) -> None:
        if unknown := dict(further or {}).keys() - self.further_prompts.keys():
            raise ValueError(f"the method {self.name} has no text called {', '.join(sorted(unknown))}; leave it out")
        self.further = {**self.further_prompts, **(further or {})}
        self.template = self.default_template if template is None else template
        given = placeholders(self.template)
        missing = [name for name in placeholders(self.default_template) if name not in given]
        if missing:
            raise ValueError(
                f"the prompt template of {self.name} has no '{{{missing[0]}}}' placeholder: {self.template[:80]!r}… "
                "Add it where that text goes"
            )

    @property
    def prompts(self) -> dict[str, str]:
        """Every text the method puts to the model, by name, with its placeholders."""
        return {"prompt": self.template, **self.further, "choices": CHOICES}

    @property
    def prompt_sha256(self) -> str:
        """Hash of `prompts` and stop strings, for the protocol card."""
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
            raise ValueError(f"the method {self.name} searches, but no retriever was given; name one")
        return self._run(questions, toolbox) if questions else []

    @abstractmethod
    def _run(self, questions: Sequence[Question], toolbox: Toolbox) -> list[Trajectory]: ...


def unanswered(prompt_ids: Sequence[int], cause: Truncation) -> Trajectory:
    """What becomes of a question that the model cannot even be asked."""
    trajectory = Trajectory(prompt_ids=list(prompt_ids), done=True)
    trajectory.truncations[cause] += 1
    return trajectory
