"""The correction forms: what replaces pi_theta / pi_old in the clipped surrogate (METHOD 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rex_rag.policy_correction import (
    behavior_log_probs,
    decoupled_log_weights,
    probe_log_density,
    sequence_log_weights,
)


@dataclass(slots=True)
class Realignment:
    """How a mini-batch's loss differs from GRPO's.

    `inputs` replaces entries of the loss's inputs. `denominator` is the log-density below pi_theta in the clipped
    ratio, (B, T). `log_weights` are log(pi_old / mu), (B, T) or (B, 1); `None` where nothing is corrected.
    """

    inputs: dict[str, torch.Tensor]
    denominator: torch.Tensor
    log_weights: torch.Tensor | None = None


def realign(
    inputs: dict[str, torch.Tensor], per_token_logps: torch.Tensor, correction: str, weight_max: float | None
) -> Realignment:
    """Realign a mini-batch to the mixture that produced it.

    Without probes (a = 0) or with `correction="none"` nothing is replaced.

    Args:
        inputs: the loss's inputs; see `rex_rag.slots.describe_rows` for what the correction reads.
        per_token_logps: (B, T) log pi_theta, detached; it is log pi_old where `inputs` holds none (generation and
            optimisation are then aligned).
        correction: `"token"`, `"decoupled"`, `"sequence"` or `"none"`.
        weight_max: upper truncation of the decoupled and sequence weights.
    """
    old = inputs.get("old_per_token_logps")
    old = per_token_logps if old is None else old
    share = float(inputs["mixing_share"])
    if share == 0 or correction == "none":
        return Realignment({}, old)
    mask = loss_mask(inputs)
    density = probe_log_density(old, inputs["segment_kinds"], inputs["pool_logps"], float(inputs["failure_rate"]))
    if correction == "sequence":
        log_weights = sequence_log_weights(old, density, mask, share)
    else:
        behavior = behavior_log_probs(old, density, share)
        log_weights = decoupled_log_weights(old, behavior)
        if correction == "token":
            return Realignment({"old_per_token_logps": behavior}, behavior, log_weights)
    if weight_max is not None:
        log_weights = log_weights.clamp(max=math.log(weight_max))
    # TRL takes advantages of shape (B, T); the weights are positive, so they commute with the clip's minimum.
    return Realignment({"advantages": inputs["advantages"].unsqueeze(1) * log_weights.exp()}, old, log_weights)


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T) 1 on the tokens of loss, KL and weights."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)
