"""Text from outside made inert: it can neither close its own block, nor act, nor be encoded as a control token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_TAGS = ("<think>", "</think>")
SEARCH_TAGS = ("<search>", "</search>")
ANSWER_TAGS = ("<answer>", "</answer>")
INFORMATION_TAGS = ("<information>", "</information>")
ALL_TAGS = (*THINK_TAGS, *SEARCH_TAGS, *ANSWER_TAGS, *INFORMATION_TAGS)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Strings of the tokenizer's own that inserted text must not contain.

    Also those that it marks as special and names nowhere, as Llama 3 does with all that frame a message.
    """
    marked = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def make_inert(text: str, forbidden: Iterable[str] = (), marks: Iterable[str] = ALL_TAGS) -> str:
    """Escape the opening bracket of `marks`, in any case, and of `forbidden` strings (a tokenizer's control tokens).

    Retrieved text is untrusted; without this a passage containing `</information>` or `<|im_end|>` would close its
    own block for the model, or be encoded as a control token.
    """
    pattern = re.compile("|".join(re.escape(mark) for mark in marks), re.IGNORECASE)
    return escape_tokens(pattern.sub(lambda match: _escaped(match.group()), text), forbidden)


def escape_tokens(text: str, forbidden: Iterable[str]) -> str:
    """Escape strings that a tokenizer would take for control tokens, and nothing else."""
    for token in forbidden:
        if token in text:
            text = text.replace(token, _escaped(token))
    return text


def _escaped(mark: str) -> str:
    return "&lt;" + mark[1:] if mark.startswith("<") else " ".join(mark)
