"""The bound on the KL estimate of a token.

k3 = exp(d) - d - 1 with d = log pi_ref - log pi_theta estimates KL(pi_theta || pi_ref) on tokens sampled from
pi_theta. Inserted (`PROBE`) tokens are not: the policy may make them ever less likely, and exp(d) outgrows everything
else in the batch. The reference clamps d to [-20, 20] and k3 to at most 10 nats, without gradient beyond. Since k3
exceeds 10 for any |d| of 20, the second bound is the only one that acts.
"""

from __future__ import annotations

import math

import torch


def bounded_reference(
    ref_per_token_logps: torch.Tensor, per_token_logps: torch.Tensor, token_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference log-probabilities under which k3 is at most `token_max`, and constant where that bound acts.

    There log pi_ref is replaced by log pi_theta + d*, with k3(d*) = token_max and the sign of d: the estimate's value
    is then the bound, and its gradient cancels. Elsewhere nothing changes, bit for bit.

    Args:
        ref_per_token_logps: (B, T) log pi_ref.
        per_token_logps: (B, T) log pi_theta, with its gradient.
        token_max: in nats, positive.

    Returns:
        (B, T) log pi_ref to compute k3 from, and (B, T) bool, where the bound acts.
    """
    log_ratio = ref_per_token_logps.float() - per_token_logps.detach().float()
    over = log_ratio.exp() - log_ratio - 1 > token_max
    if not over.any():  # the float32 below would change how bfloat16 rounds
        return ref_per_token_logps, over
    below, above = k3_inverse(token_max)
    bounded = per_token_logps.float() + torch.where(log_ratio < 0, below, above)
    return torch.where(over, bounded, ref_per_token_logps), over


def k3_inverse(value: float) -> tuple[float, float]:
    """The negative and the positive d with exp(d) - d - 1 = value, by Newton's method; value in (0, 1000]."""
    return _root(-value - 1.0, value), _root((2.0 * value) ** 0.5, value)


def _root(start: float, value: float) -> float:
    # Both starts lie beyond the root (d^2 / 2 <= k3 for d > 0), whence Newton on a convex function converges.
    d = start
    for _ in range(100):
        d -= (math.expm1(d) - d - value) / math.expm1(d)
    return d
