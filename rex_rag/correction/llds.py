"""The regulariser against lazy likelihood displacement (LLDS), arXiv 2512.04220.

GRPO in search agents tends to make good actions less likely too, since they share their tokens with bad ones; the
paper finds that collapses begin so. LLDS acts only where an action as a whole has become less likely, and there only
on the tokens that have.
"""

from __future__ import annotations

import torch

from rex_rag.types import SegmentKind


def llds(
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    kinds: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
) -> torch.Tensor:
    """Mean over the tokens of good rows of max(0, log pi_old - log pi_theta), in actions that became less likely.

    A row is good where its advantage is not negative; an action is a run of `POLICY` tokens.

    Args:
        per_token_logps: (B, T) log pi_theta, with its gradient.
        old_per_token_logps: (B, T) log pi_old, of the policy that sampled.
        kinds: (B, T) segment kinds.
        mask: (B, T) 1 on trained tokens.
        advantages: (B,).

    Returns:
        A scalar, in nats a token; 0 where there is no good row.
    """
    kept = mask.bool() & (kinds == SegmentKind.POLICY) & (advantages >= 0).unsqueeze(1)
    loss = (old_per_token_logps - per_token_logps).masked_fill(~kept, 0.0)  # (B, T)
    begins = kept & ~torch.nn.functional.pad(kept, (1, 0))[:, :-1]
    action = begins.cumsum(dim=1)  # (B, T): 1, 2, … within a row
    sums = torch.zeros(kept.size(0), int(action.max()) + 1, dtype=loss.dtype, device=loss.device)
    sums = sums.scatter_add(1, action, loss.detach())
    less_likely = sums.gather(1, action) > 0
    return (loss.clamp(min=0) * less_likely).sum() / kept.sum().clamp(min=1)
