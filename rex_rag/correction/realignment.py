"""Realignment (METHOD 4.3): a correction form's weights put in their place among the loss's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from rex_rag.correction.densities import behavior_log_probs, probe_log_density
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from rex_rag.correction.forms import CorrectionForm
    from rex_rag.training.config import REXRAGConfig


@dataclass(frozen=True)
class Mixture:
    """A mini-batch as a sample of mu = (1-a) pi_old + a pi_eps.

    `old` (log pi_old), `mask` (1 on trained tokens), `kinds` and `pool_logps` are (B, T), see
    `rex_rag.training.group_rows.describe_rows`; `advantages` is (B,); `failure_rate` is z and `share` is a, above 0.
    """

    old: torch.Tensor
    mask: torch.Tensor
    kinds: torch.Tensor
    pool_logps: torch.Tensor
    advantages: torch.Tensor
    failure_rate: float
    share: float

    @cached_property
    def probe_density(self) -> torch.Tensor:
        """(B, T) log pi_eps (eq. 6)."""
        return probe_log_density(self.old, self.kinds, self.pool_logps, self.failure_rate)

    @cached_property
    def behavior(self) -> torch.Tensor:
        """(B, T) log mu (eq. 7)."""
        return behavior_log_probs(self.old, self.probe_density, self.share)


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
    inputs: dict[str, torch.Tensor], per_token_logps: torch.Tensor, form: CorrectionForm, args: REXRAGConfig
) -> Realignment:
    """Realign a mini-batch to the mixture that produced it; without probes (a = 0) nothing is replaced.

    Args:
        inputs: the loss's inputs; see `rex_rag.training.group_rows.describe_rows` for what the correction reads.
        per_token_logps: (B, T) log pi_theta, detached; it is log pi_old where `inputs` holds none (generation and
            optimisation are then aligned).
        form: gives the weights, and says where they go.
        args: the settings that the form reads.

    Raises:
        ValueError: for weights that are neither one a token nor one a row.
    """
    old = inputs.get("old_per_token_logps")
    old = per_token_logps if old is None else old
    share = float(inputs["mixing_share"])
    if share == 0:
        return Realignment({}, old)
    mixture = Mixture(
        old=old,
        mask=loss_mask(inputs),
        kinds=inputs["segment_kinds"],
        pool_logps=inputs["pool_logps"],
        advantages=inputs["advantages"],
        failure_rate=float(inputs["failure_rate"]),
        share=share,
    )
    log_weights = form.log_weights(mixture, args)
    if log_weights is None:
        return Realignment({}, old)
    if log_weights.shape not in (old.shape, (len(old), 1)):
        raise UserError(
            f"correction {form.name!r} gives weights of shape {(*log_weights.shape,)} for {len(old)} rows of "
            f"{old.size(1)} tokens; give one a token or (B, 1), one a row"
        )
    if form.in_ratio:
        denominator = old.float() - log_weights
        # TRL's off-policy mask takes the denominator for the sampler's log-probabilities where it has no others.
        sampler = inputs.get("sampling_per_token_logps", old)
        replaced = {"old_per_token_logps": denominator, "sampling_per_token_logps": sampler}
        return Realignment(replaced, denominator, log_weights)
    # TRL takes advantages of shape (B, T); the weights are positive, so they commute with the clip's minimum.
    return Realignment({"advantages": inputs["advantages"].unsqueeze(1) * log_weights.exp()}, old, log_weights)


def loss_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T) 1 on the tokens of loss, KL and weights."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)
