"""Policy correction (paper section 3.4): probe density, behaviour log-probabilities, weights.

Pure functions on tensors, in log space and float32. Shapes: B rows, T completion tokens. Nothing here knows trainers,
tokenizers or processes.

The estimator: a batch of N originals drawn from `pi_old` and K kept probes drawn from `pi_eps` is a sample of the
mixture mu = (1-a) pi_old + a pi_eps with a = K / (N+K). Weighting by pi_theta / mu instead of pi_theta / pi_old makes
the expectation that of the policy again (exactly so on whole trajectories: the balance heuristic).
"""

from __future__ import annotations

import math

import torch

from rex_rag.types import SegmentKind

PADDING_KIND = -1

# Those of TRL's losses that clip the ratio.
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def prefix_mask(kinds: torch.Tensor) -> torch.Tensor:
    """The `POLICY` tokens of a probe that stand before its exploration prompt.

    Args:
        kinds: (B, T) segment kinds, `PADDING_KIND` behind the end.

    Returns:
        (B, T) bool; all `False` on originals.
    """
    is_prompt = kinds == SegmentKind.PROBE
    before_prompt = is_prompt.long().cumsum(dim=1) == 0
    return (kinds == SegmentKind.POLICY) & before_prompt & is_prompt.any(dim=1, keepdim=True)


def probe_log_density(
    old_per_token_logps: torch.Tensor, kinds: torch.Tensor, pool_logps: torch.Tensor, failure_rate: float
) -> torch.Tensor:
    """Per-token log-density of the probe policy pi_eps (paper eq. 6).

    On the prefix, log pi_eps = log pi_old - log(z) / |o'|, so that the product over it is pi_old(o') / z: the density
    of a prefix given that its original failed. This takes P(fail | o') as 1 and is exact only where the prefix
    decides the answer. `PROBE` tokens have their frequency in the pool; the continuation has log pi_old. An original
    holds no pool prompt, so its density is 0.

    Args:
        old_per_token_logps: (B, T) log pi_old.
        kinds: (B, T) segment kinds.
        pool_logps: (B, T) log-frequency in the pool of every `PROBE` token; other positions are not read.
        failure_rate: z, the fraction of originals of the global batch that failed, in (0, 1] where there are probes.

    Returns:
        (B, T) float32 log pi_eps; -inf on every token of an original.

    Raises:
        ValueError: where there are probes but nothing failed.
    """
    is_prompt = kinds == SegmentKind.PROBE
    is_probe = is_prompt.any(dim=1, keepdim=True)  # (B, 1)
    if bool(is_probe.any()) and not 0.0 < failure_rate <= 1.0:
        raise ValueError(
            f"failure_rate is {failure_rate}, but the batch holds probes; probes come from failed originals, so it "
            "must be in (0, 1]"
        )
    old = old_per_token_logps.float()
    prefix = prefix_mask(kinds)
    prefix_length = prefix.sum(dim=1, keepdim=True).clamp(min=1)  # an empty prefix has no token to carry the shift
    log_z = math.log(failure_rate) if failure_rate > 0 else 0.0
    density = old - prefix.float() * (log_z / prefix_length)
    density = torch.where(is_prompt, pool_logps.float(), density)
    return density.masked_fill(~is_probe, -math.inf)


def behavior_log_probs(
    old_per_token_logps: torch.Tensor, probe_logps: torch.Tensor, mixing_share: float
) -> torch.Tensor:
    """Per-token log mu = log((1-a) pi_old + a pi_eps) (paper eq. 7-8); equals log pi_old exactly for a = 0.

    Args:
        old_per_token_logps: (B, T) log pi_old.
        probe_logps: (B, T) log pi_eps.
        mixing_share: a = kept probes / all kept rows of the global batch, in [0, 1).

    Returns:
        (B, T) float32.
    """
    log_keep, log_share = _log_shares(mixing_share)
    return torch.logaddexp(old_per_token_logps.float() + log_keep, probe_logps + log_share)


def decoupled_log_weights(old_per_token_logps: torch.Tensor, behavior_logps: torch.Tensor) -> torch.Tensor:
    """Per-token log(pi_old / mu), (B, T) float32, to multiply a surrogate that clips pi_theta / pi_old."""
    return old_per_token_logps.float() - behavior_logps


def sequence_log_weights(
    old_per_token_logps: torch.Tensor, probe_logps: torch.Tensor, mask: torch.Tensor, mixing_share: float
) -> torch.Tensor:
    """Whole-trajectory log(pi_old(o) / mu(o)), the balance heuristic.

    Originals get -log(1-a): their density under the probe policy is taken as 0, which neglects only originals that
    spell out a whole pool prompt by themselves.

    Args:
        old_per_token_logps: (B, T) log pi_old.
        probe_logps: (B, T) log pi_eps.
        mask: (B, T) 1 on trained tokens (`POLICY`, `PROBE`).
        mixing_share: a, in [0, 1).

    Returns:
        (B, 1) float32.
    """
    log_keep, log_share = _log_shares(mixing_share)
    log_ratio = (probe_logps - old_per_token_logps.float()).masked_fill(~mask.bool(), 0.0).sum(dim=1, keepdim=True)
    return -torch.logaddexp(torch.full_like(log_ratio, log_keep), log_ratio + log_share)


def _log_shares(mixing_share: float) -> tuple[float, float]:
    if not 0.0 <= mixing_share < 1.0:
        raise ValueError(f"mixing_share is {mixing_share}; a batch holds originals, so it must be in [0, 1)")
    return math.log1p(-mixing_share), math.log(mixing_share) if mixing_share > 0 else -math.inf


def clip_bound(epsilon: float) -> float:
    """The mixing share beyond which originals start outside the clip range: 1/(1-a) > 1 + eps, a > eps / (1 + eps)."""
    return epsilon / (1.0 + epsilon)


def weight_statistics(log_weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums from which mean, effective sample size and maximum follow after a reduction over processes.

    Args:
        log_weights: (B, T) or (B, 1).
        mask: the same shape; which entries count.

    Returns:
        (4,) float32: sum w, sum w^2, count, max w (0 where nothing counts).
    """
    weights = torch.where(mask.bool(), log_weights.float(), -math.inf).exp()
    maximum = weights.max() if weights.numel() else weights.new_zeros(())
    return torch.stack([weights.sum(), weights.square().sum(), mask.float().sum(), maximum])
