"""A model's tokenizer: loaded in one way everywhere, and text in the middle of a sequence to ids and back.

Tokenizers of sentencepiece's kind (Llama 2's, Mistral's) put a blank before a text, and take one off what they decode.
Where ids stand before it, that is a blank which nobody wrote, or one too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTER = "a"


def open_tokenizer(
    place: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub name, padding on the left.

    Errors are those of transformers, which loads it.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        place,
        revision=revision,
        padding_side="left",
        trust_remote_code=trust_remote_code,
        # Where mistral_common is installed, as with vLLM, a tekken.json beside them hides a Mistral model's own files,
        # its chat template too.
        mistral_format=False,
    )


def encode_on(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts that go on where other ids stand, without special tokens."""
    anchor = _anchor(tokenizer)
    if anchor is None:
        return _ids(tokenizer, texts)
    text_before, length = anchor
    return [row[length:] for row in _ids(tokenizer, [text_before + text for text in texts])]


def decode_on(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of ids that stand behind others, control tokens and blanks included."""
    if not rows:  # batch_decode takes an empty batch for one empty row
        return []
    if _anchor(tokenizer) is None:
        return _texts(tokenizer, rows)
    before = _ids(tokenizer, [_LETTER])[0]
    return [text[len(_LETTER) :] for text in _texts(tokenizer, [[*before, *row] for row in rows])]


@lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int] | None:
    """What to write before a text so that its own ids have no blank in front, and how many ids that is.

    `None` where they have none anyhow. A control token parts texts, and newer tokenizers give the blank to the first
    part alone. Older ones give it to each: there a line break stands for the end of what was before, which is a byte
    and in no merge.
    """
    [letter] = _ids(tokenizer, [_LETTER])
    if _texts(tokenizer, [letter * 2]) == [_LETTER * 2]:
        return None
    for anchor in (tokenizer.eos_token, "\n"):
        if anchor is None:
            continue
        before, both = _ids(tokenizer, [anchor, anchor + _LETTER])
        if both[: len(before)] == before and _texts(tokenizer, [letter + both[len(before) :]]) == [_LETTER * 2]:
            return anchor, len(before)
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose: what is too long is cut to a budget afterwards, so its length is nothing to warn of.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    rows = [list(row) for row in rows]
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
