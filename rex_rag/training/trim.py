"""Padding that no row of a mini-batch needs, cut off: TRL pads all to the longest of the whole generation batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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


def _extent(mask: torch.Tensor) -> int:
    """How many columns from the left hold a 1 of any row; at least 1."""
    used = mask.bool().any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _rounded(length: int, width: int, multiple: int | None) -> int:
    return length if not multiple else min(width, -(-length // multiple) * multiple)
