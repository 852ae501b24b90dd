"""A protocol of one's own: brackets instead of tags. Named in a recipe as `protocol: own_protocol:Brackets`."""

import re

from rex_rag.protocols import Action, Framing, Protocol, ToolCall

ACTION = re.compile(r"\[(find|done)\](.+?)\[/\1\]", re.DOTALL)


class Brackets(Protocol):
    name = "brackets"
    marks = ("[find]", "[/find]", "[done]", "[/done]", "[found]", "[/found]", "<think>", "</think>")
    stop_strings = ("[/find]", "[/done]")

    def default_template(self):
        return "Look things up by [find]…[/find], and end with [done]…[/done].\nQuestion: {question}"

    def default_feedback(self):
        return "\nWrite [find] or [done].\n"

    def parse(self, text):
        if not (match := ACTION.search(text)) or not match[2].strip():
            return None
        if match[1] == "done":
            return Action(match.start(), answer=match[2].strip())
        return Action(match.start(), calls=(ToolCall("search", {"query": match[2].strip()}),))

    def framing(self, tokenizer, settings=None):
        return Framing("\n[found]", "\n", "[/found]\n", self.feedback)
