"""The search protocol (Search-R1): tags, prompt, actions, observations. Pure text, no tokenizer.

Only model-written text is ever parsed. Text that comes from outside (passages) is made inert before it is shown, so
that it can neither close its own block nor look like an action to a reader of the trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rex_rag.types import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_TAGS = ("<think>", "</think>")
SEARCH_TAGS = ("<search>", "</search>")
ANSWER_TAGS = ("<answer>", "</answer>")
INFORMATION_TAGS = ("<information>", "</information>")
ALL_TAGS = (*THINK_TAGS, *SEARCH_TAGS, *ANSWER_TAGS, *INFORMATION_TAGS)

# A turn ends here; the text up to and including the tag is the model's.
STOP_STRINGS = (SEARCH_TAGS[1], ANSWER_TAGS[1])

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

# From the last opening tag before the closing one: a tag mentioned in a thought opens nothing.
_ACTION = re.compile(r"<(search|answer)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
_TAG = re.compile("|".join(re.escape(tag) for tag in ALL_TAGS), re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Action:
    """What the model asked for. `start` is the character offset of the opening tag."""

    kind: Literal["search", "answer"]
    content: str
    start: int


def parse_action(text: str) -> Action | None:
    """Return the first complete search or answer in newly generated text, or `None` where there is none.

    An empty query or answer is not an action: the caller gives feedback, as for any other malformed turn.
    """
    match = _ACTION.search(text)
    if match is None or not match.group(2).strip():
        return None
    return Action(kind=match.group(1), content=match.group(2).strip(), start=match.start())


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Strings of the tokenizer's own that inserted text must not contain.

    Also those that it marks as special and names nowhere, as Llama 3 does with all that frame a message.
    """
    marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def make_inert(text: str, forbidden: Iterable[str] = ()) -> str:
    """Escape the opening bracket of our tags and of `forbidden` strings (the tokenizer's control tokens).

    Retrieved text is untrusted; without this a passage containing `</information>` or `<|im_end|>` would close its
    own block for the model, or be encoded as a control token.
    """
    return escape_tokens(_TAG.sub(lambda match: "&lt;" + match.group(0)[1:], text), forbidden)


def escape_tokens(text: str, forbidden: Iterable[str]) -> str:
    """Escape strings that a tokenizer would take for control tokens, and nothing else."""
    for token in forbidden:
        if token in text:
            text = text.replace(token, "&lt;" + token[1:] if token.startswith("<") else " ".join(token))
    return text


def render_passages(passages: Sequence[Passage], forbidden: Iterable[str] = ()) -> str:
    """The body of an observation: one line a passage, `Doc 1(Title: T) text`."""
    forbidden = tuple(forbidden)
    return "\n".join(
        f"Doc {rank}(Title: {make_inert(passage.title, forbidden)}) {make_inert(passage.text, forbidden)}"
        for rank, passage in enumerate(passages, start=1)
    )


OBSERVATION_HEAD = "\n\n" + INFORMATION_TAGS[0]
OBSERVATION_TAIL = INFORMATION_TAGS[1] + "\n\n"


def build_prompt(
    question: str, template: str = PROMPT_TEMPLATE, forbidden: Iterable[str] = ()
) -> list[dict[str, str]]:
    """The conversational prompt of a question: one user message, to be rendered by the tokenizer's chat template.

    Args:
        forbidden: the tokenizer's control tokens, which are escaped where they stand in the question.
    """
    if "{question}" not in template:
        raise ValueError(
            f"the prompt template has no '{{question}}' placeholder: {template[:80]!r}… Add it where the question goes"
        )
    text = escape_tokens(question.strip(), forbidden)
    return [{"role": "user", "content": template.replace("{question}", text)}]
