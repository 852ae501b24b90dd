"""The tags of Search-R1 (arXiv 2503.09516): `<search>`, `<information>`, `<answer>`, in one assistant turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rex_rag.protocols.base import SEARCH, Action, Framing, Protocol, ToolCall, ToolSpec
from rex_rag.protocols.inert import ALL_TAGS, ANSWER_TAGS, INFORMATION_TAGS
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATE = (
    "Find the answer to the question below. Whenever you receive new information, first reason about it between "
    "<think> and </think>. If you notice that you lack some knowledge, ask the search engine by writing "
    "<search> your query </search>; the best matching passages are returned between <information> and "
    "</information>. You may search as many times as you want. Once nothing is missing, write the answer alone, "
    "without any explanation, between <answer> and </answer>, for example <answer> Lisbon </answer>.\n"
    "Question: {question}\n"
)

FEEDBACK_TEXT = (
    "\n\nThat was not a valid action. To use the search engine, write the query between <search> and </search>. "
    "To give the final answer, write it between <answer> and </answer>. Try again.\n\n"
)

OBSERVATION_HEAD = "\n\n" + INFORMATION_TAGS[0]
OBSERVATION_TAIL = INFORMATION_TAGS[1] + "\n\n"

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("think", "answer", "information")


class SearchR1(Protocol):
    """A tool is called by its name as a tag; one action a turn, and the first complete one decides.

    A tool of one parameter takes what stands between its tags as that parameter's text, any other a JSON object.
    """

    name = "search_r1"

    def __init__(
        self, tools: Sequence[ToolSpec] = (SEARCH,), template: str | None = None, feedback: str | None = None
    ) -> None:
        if bad := [tool.name for tool in tools if not _NAME.fullmatch(tool.name) or tool.name in _TAKEN]:
            raise UserError(
                f"a tool named {bad[0]!r} cannot be called by a tag: use lower-case letters, digits and _, and none "
                f"of {', '.join(_TAKEN)}"
            )
        super().__init__(tools, template, feedback)
        # In the order of the first protocol's tags, for one tool the very tuple.
        self._stop = (*(f"</{name}>" for name in self.tools), ANSWER_TAGS[1])
        self.marks = tuple(dict.fromkeys([*ALL_TAGS, *(f"<{b}{name}>" for name in self.tools for b in ("", "/"))]))
        names = "|".join([*self.tools, "answer"])
        # From the last opening tag before the closing one: a tag mentioned in a thought opens nothing.
        self._action = re.compile(rf"<({names})>((?:(?!<\1>).)*?)</\1>", re.DOTALL)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._stop

    def default_template(self) -> str:
        further = [tool for tool in self.tools.values() if tool.name != SEARCH.name]
        if not further:
            return PROMPT_TEMPLATE
        head, question = PROMPT_TEMPLATE.split("Once nothing is missing")
        said = " ".join(f"You can also write {self._usage(tool)}: {tool.description}" for tool in further)
        return f"{head}{said} Once nothing is missing{question}"

    def default_feedback(self) -> str:
        further = [tool for tool in self.tools.values() if tool.name != SEARCH.name]
        if not further:
            return FEEDBACK_TEXT
        ways = " ".join(f"To use {tool.name}, write {self._usage(tool)}." for tool in self.tools.values())
        return (
            f"\n\nThat was not a valid action. {ways} To give the final answer, write it between <answer> and "
            "</answer>. Try again.\n\n"
        )

    def _usage(self, tool: ToolSpec) -> str:
        inside = tool.lone_parameter or json.dumps(dict.fromkeys(tool.parameters.get("properties", ()), "…"))
        return f"<{tool.name}> {inside} </{tool.name}>"

    def parse(self, text: str) -> Action | None:
        match = self._action.search(text)
        if match is None or not match.group(2).strip():
            return None
        name, content = match.group(1), match.group(2).strip()
        if name == "answer":
            return Action(match.start(), answer=content)
        tool = self.tools[name]
        arguments = {tool.lone_parameter: content} if tool.lone_parameter else _object(content)
        if tool.refusal(arguments) is not None:
            return None
        return Action(match.start(), calls=(ToolCall(name, arguments),))

    def framing(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None) -> Framing:
        return Framing(OBSERVATION_HEAD, "\n", OBSERVATION_TAIL, self.feedback)

    def write_call(self, call: ToolCall) -> str:
        tool = self._tool(call.name, "a demonstration")
        inside = call.arguments[tool.lone_parameter] if tool.lone_parameter else json.dumps(dict(call.arguments))
        return f"<{tool.name}> {inside}</{tool.name}>"


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
