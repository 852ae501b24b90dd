"""Reward shaping: what shapes an answer's form counts where a question was answered right at all.

Exact match is the task; the format reward, and whatever else is marked by `rex_rag.training.rewards.shaping`, shapes
how an answer comes about. Where a group holds no right answer, shaping is all that tells its rows apart, and division
by the group's std makes a full-size advantage of any difference, however small: the policy then learns form from its
failures, and nothing pulls it back. So there shaping counts as 0. Where every answer is right it counts, and ranks
right answers among themselves: what it spoils turns up as wrong answers, against which exact match is the larger
reward again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from trl.trainer.utils import nanstd


def gate_shaping(rewards_per_func: torch.Tensor, is_shaping: Sequence[bool], group: int) -> torch.Tensor:
    """The rewards that advantages are made of: shaping is 0 in groups without a right answer.

    Args:
        rewards_per_func: (B, R) rewards of the global batch, exact match first; NaN where a function does not apply,
            whole rows of it in empty probe slots. A right probe is a right answer of its group.
        is_shaping: of the R functions.
        group: rows per question.

    Returns:
        (B, R); what is NaN stays NaN.
    """
    answered = (rewards_per_func[:, 0].view(-1, group) > 0).any(dim=1)  # NaN compares as false
    silenced = ~answered.repeat_interleave(group).unsqueeze(1) & ~rewards_per_func.isnan()  # (B, R)
    return rewards_per_func.masked_fill(silenced & torch.tensor(is_shaping, device=silenced.device), 0.0)


def log_given_rewards(
    rewards_per_func: torch.Tensor,
    names: Sequence[str],
    weights: torch.Tensor,
    metrics: Mapping[str, list[float]],
    logs: Mapping,
) -> None:
    """Put the rewards as they were given in the place of the gated ones that TRL has logged of a training batch.

    Args:
        rewards_per_func: (B, R), NaN as in `gate_shaping`.
        names: of the R functions.
        weights: (R,).
        metrics: TRL's, whose newest values are replaced.
        logs: of TRL's completion table, which holds this very batch.
    """
    for name, column in zip(names, rewards_per_func.T, strict=True):
        metrics[f"rewards/{name}/mean"][-1] = torch.nanmean(column).item()
        metrics[f"rewards/{name}/std"][-1] = nanstd(column).item()
        logs["rewards"][name].clear()
        logs["rewards"][name].extend(column.tolist())
    scored = rewards_per_func[~rewards_per_func.isnan().all(dim=1)]
    rewards = (scored * weights.to(scored.device)).nansum(dim=1)
    metrics["reward"][-1], metrics["reward_std"][-1] = rewards.mean().item(), nanstd(rewards).item()
