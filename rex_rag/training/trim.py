"""Padding that no row needs, cut off: TRL pads all to the longest of the whole generation batch.

Probes are the longest rows, about twice as long as the dead ends that they leave, and few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

_PROMPT = ("prompt_ids", "prompt_mask")


def trimmed(inputs: Mapping[str, Any], multiple: int | None = None) -> dict[str, Any]:
    """A copy of the loss's inputs, prompts without common padding on the left, completions on the right.

    Every tensor of the completion's width is cut alike. Masked positions count in no loss, so it stays what it was, to
    the rounding of float sums; where nothing can be cut, the very tensors are handed on.

    Args:
        multiple: what lengths are padded to (TRL's `pad_to_multiple_of`).
    """
    output = dict(inputs)
    width = inputs["completion_ids"].size(1)
    kept = _rounded(_extent(inputs["completion_mask"]), width, multiple)
    if kept < width:
        for name, value in inputs.items():
            if name not in _PROMPT and isinstance(value, torch.Tensor) and value.dim() >= 2 and value.size(1) == width:
                output[name] = value[:, :kept]
    width = inputs["prompt_ids"].size(1)
    kept = _rounded(_extent(inputs["prompt_mask"].flip(1)), width, multiple)
    if kept < width:
        for name in _PROMPT:
            output[name] = inputs[name][:, width - kept :]
    return output


def in_two_buckets(
    forward: Callable[..., tuple],
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    **others: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    """The forward pass of short rows and of long ones apart, each without the padding that the others need.

    Takes and gives what TRL's `_get_per_token_logps_and_entropies` does. Log-probabilities of padding are 0, which
    counts in no loss; the others are the same, to the rounding of kernels.
    """
    lengths = _lengths(attention_mask[:, -logits_to_keep:])
    order = lengths.argsort(stable=True)
    split = _best_split((lengths[order] + attention_mask.size(1) - logits_to_keep).tolist())
    if split is None:
        return forward(model, input_ids, attention_mask, logits_to_keep, **others)
    parts = []
    for rows in (order[:split], order[split:]):
        cut = logits_to_keep - max(1, int(lengths[rows].max()))
        end = input_ids.size(1) - cut
        logps, entropies, _ = forward(
            model, input_ids[rows, :end], attention_mask[rows, :end], logits_to_keep - cut, **others
        )
        parts.append([None if one is None else functional.pad(one, (0, cut)) for one in (logps, entropies)])
    back = order.argsort()
    logps, entropies = (None if None in pair else torch.cat(pair)[back] for pair in zip(*parts, strict=True))
    return logps, entropies, None


def by_length(
    forward: Callable[..., tuple],
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int,
    multiple: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of many rows, scored `batch_size` at once in the order of their lengths, each batch trimmed.

    forward: TRL's `_get_per_token_logps_and_entropies`, which would pad every batch to the longest row of all. As many
    passes as there, so that processes stay in step where passes are collective. Padding gets 0, as there.

    Returns:
        (B, logits_to_keep).
    """
    prompt = input_ids.size(1) - logits_to_keep
    lengths = attention_mask.sum(dim=1)
    output = None
    for rows in lengths.argsort(stable=True).split(batch_size):
        mask = attention_mask[rows]
        kept = _rounded(_extent(mask[:, prompt:]), logits_to_keep, multiple)
        start = prompt - _rounded(_extent(mask[:, :prompt].flip(1)), prompt, multiple)
        place = slice(start, prompt + kept)
        logps, _, _ = forward(model, input_ids[rows, place], mask[:, place], kept, batch_size=batch_size)
        if output is None:
            output = logps.new_zeros(len(input_ids), logits_to_keep)
        output[rows, :kept] = logps
    assert output is not None  # there are rows
    return output


def _lengths(mask: torch.Tensor) -> torch.Tensor:
    """(B,) how many columns from the left hold all that each row has."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).max(dim=1).values


def _best_split(lengths: list[int]) -> int | None:
    """Of ascending lengths, how many to take apart from the longest; `None` where that spares less than a tenth."""
    whole = len(lengths) * lengths[-1]
    costs = [
        (count * lengths[count - 1] + (len(lengths) - count) * lengths[-1], count) for count in range(1, len(lengths))
    ]
    cost, count = min(costs, default=(whole, 0))
    return count if cost < 0.9 * whole else None


def _extent(mask: torch.Tensor) -> int:
    """How many columns from the left hold a 1 of any row; at least 1."""
    used = mask.bool().any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _rounded(length: int, width: int, multiple: int | None) -> int:
    return length if not multiple else min(width, -(-length // multiple) * multiple)
