"""What a protocol is: how a model is asked, how it acts, how results come back to it.

Only model-written text is ever parsed. A protocol is pure text; `framing` alone looks at a tokenizer, since some
protocols put results into turns of the model's own chat template.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rex_rag.protocols.inert import ALL_TAGS, escape_tokens
from rex_rag.support.errors import UserError
from rex_rag.support.wording import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model is told of it. `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @property
    def lone_parameter(self) -> str | None:
        """The parameter of a tool that has one; a tag holds its value as text."""
        names = list(self.parameters.get("properties", ()))
        return names[0] if len(names) == 1 else None

    def refusal(self, arguments: object) -> str | None:
        """Why the tool cannot be called with these arguments; `None` where it can."""
        if not isinstance(arguments, Mapping):
            return "the arguments are no object"
        known = self.parameters.get("properties", {})
        for name in self.parameters.get("required", ()):
            if name not in arguments:
                return f"{name} is missing"
        for name, value in arguments.items():
            if name not in known:
                return f"{name} is unknown"
            if known[name].get("type") == "string" and not (isinstance(value, str) and value.strip()):
                return f"{name} is no text"
        return None


SEARCH = ToolSpec(
    "search",
    "Search for passages; the best matching ones are returned.",
    {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for."}},
        "required": ["query"],
    },
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the model asks for."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Action:
    """What the model asked for: calls, or an answer. `start` is the character at which it begins."""

    start: int
    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Framing:
    """The text around what is inserted, for one tokenizer.

    Results stand as head + result + between + result + tail. `message_end` goes before head and feedback where the
    model's turn does not end with it already. Nothing of it comes from outside.
    """

    head: str
    between: str
    tail: str
    feedback: str
    message_end: str = ""


class Protocol(ABC):
    """How a model is asked, acts and is answered.

    Args:
        tools: what the model may call.
        template: the user message, `{question}` in the place of the question; the protocol's own by default.
        feedback: what is inserted after a turn without a valid action; the protocol's own by default.

    Raises:
        ValueError: for a template without the placeholder, tools of one name, and tools that the protocol cannot
            call.

    Attributes:
        name: the value of the setting `protocol`.
        marks: strings that carry meaning, which text from outside must not contain.
    """

    name: ClassVar[str]
    marks: tuple[str, ...] = ALL_TAGS

    def __init__(
        self, tools: Sequence[ToolSpec] = (SEARCH,), template: str | None = None, feedback: str | None = None
    ) -> None:
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) < len(tools):
            raise UserError(f"two tools have the same name among {[tool.name for tool in tools]}; rename one")
        self.template = self.default_template() if template is None else template
        self.feedback = self.default_feedback() if feedback is None else feedback
        if "{question}" not in self.template:
            raise UserError(
                f"the prompt template has no '{{question}}' placeholder: {self.template[:80]!r}… Add it where the "
                "question goes"
            )

    @property
    @abstractmethod
    def stop_strings(self) -> tuple[str, ...]:
        """Where a turn ends, besides the model's own end of message; the text up to and including it is the
        model's."""

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """The tools as the chat template is to show them; `None` where the prompt itself describes them."""
        return None

    @abstractmethod
    def default_template(self) -> str:
        """The user message that a question is put into."""

    @abstractmethod
    def default_feedback(self) -> str:
        """What is said after a turn without a valid action."""

    @abstractmethod
    def parse(self, text: str) -> Action | None:
        """The first complete action in newly generated text, or `None` where there is none.

        An empty query or answer is no action: the model gets feedback, as for any other malformed turn.
        """

    @abstractmethod
    def framing(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None) -> Framing:
        """The text around results and feedback. settings: `chat_template_kwargs`."""

    def write_call(self, call: ToolCall) -> str:
        """A call as the model would write it, for demonstrations; `parse` reads it back."""
        raise NotImplementedError(f"the protocol {self.name} does not say how a call is written")

    def write_answer(self, answer: str) -> str:
        """An answer as the model would write it, for demonstrations; `parse` reads it back."""
        return f"<answer> {answer}</answer>"

    def messages(self, question: str, forbidden: Iterable[str] = ()) -> list[dict[str, str]]:
        """The conversation of a question, to be rendered by the tokenizer's chat template.

        Args:
            forbidden: the tokenizer's control tokens, which are escaped where they stand in the question.
        """
        text = escape_tokens(question.strip(), forbidden)
        return [{"role": "user", "content": self.template.replace("{question}", text)}]

    def describe(self) -> dict[str, Any]:
        """All that a model trained with it has to be asked with; JSON-able."""
        return {
            "name": self.name,
            "template": self.template,
            "feedback": self.feedback,
            "tools": [tool.schema["function"] for tool in self.tools.values()],
        }

    def _tool(self, name: str, by: str) -> ToolSpec:
        if name not in self.tools:
            raise UserError(f"{by} calls {shorten(name)}, but the tools are {', '.join(self.tools) or 'none'}")
        return self.tools[name]
