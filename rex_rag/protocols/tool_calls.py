"""Native tool calls: `<tool_call>` JSON as Qwen2.5, Qwen3 and Hermes write it, results in tool turns of the template.

The model's own chat template shows it the tools and frames the results, so an instruct model acts in the format that
it knows. A turn is a whole assistant message; it may hold several calls, which are answered together. The answer
stands between `<answer>` tags, so that it can be told from reasoning and compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rex_rag.protocols.base import Action, Framing, Protocol, ToolCall
from rex_rag.protocols.chat import render_chat
from rex_rag.protocols.inert import ALL_TAGS, ANSWER_TAGS, control_tokens
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALL_TAGS = ("<tool_call>", "</tool_call>")
RESPONSE_TAGS = ("<tool_response>", "</tool_response>")

TOOL_PROMPT_TEMPLATE = (
    "Find the answer to the question below. Reason between <think> and </think>, first and whenever you receive new "
    "information. Call the tools as often as you want for what you do not know. Once nothing is missing, write the "
    "answer alone, without any explanation, between <answer> and </answer>, for example <answer> Lisbon </answer>.\n"
    "Question: {question}\n"
)

TOOL_FEEDBACK_TEXT = (
    "That was not a valid action. Call one of the tools with all of its arguments, or write the final answer between "
    "<answer> and </answer>. Try again."
)

_CALL = re.compile(rf"{CALL_TAGS[0]}((?:(?!{CALL_TAGS[0]}).)*?){CALL_TAGS[1]}", re.DOTALL)
_ANSWER = re.compile(rf"{ANSWER_TAGS[0]}((?:(?!{ANSWER_TAGS[0]}).)*?){ANSWER_TAGS[1]}", re.DOTALL)
# Stand for what is said and inserted while a template is read; no template writes them.
_SOUGHT = "sought-by-the-model"
_SAID, _FIRST, _SECOND, _TOLD = "said-by-the-model", "first-result", "second-result", "told-by-the-user"


class ToolCalls(Protocol):
    """The first complete `<answer>` ends the rollout, unless calls stand before it: then these are run.

    A call that names no tool, or lacks an argument, makes the whole turn invalid.
    """

    name = "tool_calls"
    marks = (*ALL_TAGS, *CALL_TAGS, *RESPONSE_TAGS)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ()

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        return [tool.schema for tool in self.tools.values()] or None

    def default_template(self) -> str:
        return TOOL_PROMPT_TEMPLATE

    def default_feedback(self) -> str:
        return TOOL_FEEDBACK_TEXT

    def parse(self, text: str) -> Action | None:
        answer = _ANSWER.search(text)
        calls = [match for match in _CALL.finditer(text) if answer is None or match.start() < answer.start()]
        if calls:
            read = tuple(call for match in calls if (call := self._read(match.group(1))) is not None)
            return Action(calls[0].start(), calls=read) if len(read) == len(calls) else None
        if answer is None or not answer.group(1).strip():
            return None
        return Action(answer.start(), answer=answer.group(1).strip())

    def _read(self, text: str) -> ToolCall | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in self.tools:
            return None
        arguments = call.get("arguments", {})
        return None if self.tools[call["name"]].refusal(arguments) else ToolCall(call["name"], arguments)

    def framing(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None) -> Framing:
        """Read off the chat template: what it writes between a model's message and the next one.

        Raises:
            ValueError: for a tokenizer without a chat template, or with one that knows no tool turns, does not tell
                the model of its tools, or has it call them in another form.
        """
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
        results = [{"role": "tool", "content": _FIRST}, {"role": "tool", "content": _SECOND}]
        told = render_chat(tokenizer, [*asked, {"role": "user", "content": _TOLD}], settings, self.schemas)
        try:
            with_tools = render_chat(tokenizer, [*asked, *results], settings, self.schemas)
            head, rest = with_tools.split(_SAID)[1].split(_FIRST)
            between, tail = rest.split(_SECOND)
            before, after = told.split(_SAID)[1].split(_TOLD)
        except (IndexError, ValueError):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} does not show results of tools (messages of the "
                "role 'tool'), which the protocol 'tool_calls' needs; use a model whose template does, or the "
                "protocol 'search_r1'"
            ) from None
        if self.tools and not self._is_told(tokenizer, settings):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} does not have tools called as the protocol "
                f"'tool_calls' reads it, JSON between {CALL_TAGS[0]} and {CALL_TAGS[1]}, so that no call would be "
                "valid; use a model whose template does, as those of Qwen2.5 and Qwen3, or the protocol 'search_r1'"
            )
        ends = [token for token in control_tokens(tokenizer) if head.startswith(token) and before.startswith(token)]
        end = max(ends, key=len, default="")
        return Framing(head[len(end) :], between, tail, f"{before[len(end) :]}{self.feedback}{after}", end)

    def _is_told(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None) -> bool:
        """Whether a chat template tells the model of its tools, and writes a call as it is read here.

        One that writes nothing for a call, as a small one may, leaves its form to the prompt.
        """
        asked, tool = {"role": "user", "content": "?"}, next(iter(self.tools.values()))
        if render_chat(tokenizer, [asked], settings, self.schemas) == render_chat(tokenizer, [asked], settings):
            return False
        call = ToolCall(tool.name, dict.fromkeys(tool.parameters.get("properties", ()), _SOUGHT))
        function: dict[str, Any] = {"name": call.name, "arguments": dict(call.arguments)}
        calls = [{"id": "call00000", "type": "function", "function": function}]
        said: dict[str, Any] = {"role": "assistant", "content": _SAID, "tool_calls": calls}
        try:
            written = render_chat(tokenizer, [asked, said], settings, self.schemas)
        except UserError:
            return False
        action = self.parse(written.rpartition(_SAID)[2])
        return _SOUGHT not in written or (action is not None and action.calls == (call,))

    def write_call(self, call: ToolCall) -> str:
        self._tool(call.name, "a demonstration")
        said = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        return f"{CALL_TAGS[0]}\n{said}\n{CALL_TAGS[1]}"
