"""Cut a Gemma's vocabulary to the tokens that some texts use, so that its embedding is small.

Invariants: texts in use have the very pieces they had before, since every merge on the way to a piece is kept and only
merges are taken away; other texts lose nothing either, since all bytes are kept; and the log-probabilities of the
tokens that are kept are those of the whole model, renormalised, in any context of such tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers import AddedToken
from transformers import GemmaTokenizer

from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Gemma's base model knows no turns, so a prompt is its text. The tokenizer itself puts no <bos> before a text, and
# Gemma writes rubbish without one.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content + '\n' }}{% endfor %}"
PRINTABLE = tuple(map(chr, range(0x21, 0x7F)))
SPACE = "▁"  # what a space is in the vocabulary
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def make_tokenizer(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Iterable[str]
) -> GemmaTokenizer:
    """A Gemma tokenizer whose chat template begins with `<bos>`; a text of `added` is one token wherever it stands."""
    tokenizer = GemmaTokenizer(
        vocab=dict(vocabulary), merges=list(merges), padding_side="left", add_bos_token=False, model_max_length=32768
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def symbols_of(piece: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """The piece, its characters, and what byte-pair encoding makes of them on the way to it."""
    symbols = list(piece)
    seen = set(symbols)
    # No merge crosses the ends of a piece, or it would be another piece: it comes about in a text as it does alone.
    while pairs := [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, place = min(pairs)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        seen.add(symbols[place])
    return seen


def cut_tokenizer(tokenizer: GemmaTokenizer, used: Iterable[int]) -> tuple[GemmaTokenizer, list[int]]:
    """The tokenizer with the tokens of `used` alone, and those that any text may need: bytes, ASCII, added tokens.

    Returns:
        The smaller tokenizer, and the ids that its tokens had before, in the order of their new ids.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    kept = {*added, *BYTES}
    for piece in {*tokenizer.convert_ids_to_tokens(sorted(set(used))), *PRINTABLE, SPACE} - kept:
        kept |= symbols_of(piece, ranks)
    old = sorted(vocabulary[token] for token in kept & vocabulary.keys())
    tokens = tokenizer.convert_ids_to_tokens(old)
    smaller = make_tokenizer(
        {token: index for index, token in enumerate(tokens)},
        [(left, right) for left, right in merges if left in kept and right in kept and left + right in kept],
        (text for text in added if text not in tokenizer.all_special_tokens),
    )
    return smaller, old


def cut_model(model: PreTrainedModel, old: Sequence[int], tokenizer: GemmaTokenizer) -> None:
    """Keep the embedding rows of the ids `old`, in this order, which is that of `tokenizer`; in place.

    Raises:
        ValueError: for a model whose output layer is not its embedding, or ids that are not the tokenizer's.
    """
    if not model.config.tie_word_embeddings or len(old) != len(tokenizer):
        raise UserError(
            f"a model with tie_word_embeddings={model.config.tie_word_embeddings} cannot be cut to {len(old)} ids of "
            f"a tokenizer of {len(tokenizer)}; give a model with tied embeddings and what cut_tokenizer returned"
        )
    rows = model.get_input_embeddings().weight.detach()[list(old)]
    model.resize_token_embeddings(len(old), mean_resizing=False)
    embedding = model.get_input_embeddings()
    embedding.weight.data.copy_(rows)
    embedding.padding_idx = tokenizer.pad_token_id
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
