"""The corrected gradient is unbiased: checked against exact enumeration on a policy of three decisions.

A completion is a prefix x (4 choices), then either the answer at once, or a doubt d (2 prompts) and a second try c
(3 choices). The answer at once is right for one of the prefixes and wrong for the others: it follows from the prefix,
so P(fail | o') is 0 or 1 and eq. 6 is exact. Probes re-open failing prefixes, insert a doubt drawn from the pool and
continue with the policy.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from rex_rag.correction.densities import probe_log_density, sequence_log_weights
from rex_rag.types import SegmentKind

NUM_PREFIXES, NUM_DOUBTS, NUM_TRIES = 4, 2, 3
PASSES = torch.tensor([True, False, False, False])  # prefix 0 answers rightly at once
TRY_IS_RIGHT = 2
AT_ONCE = NUM_DOUBTS  # the second decision: a doubt, or to answer at once
ORIGINALS, PROBES, BATCHES = 256, 64, 1500


def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    second = torch.randn(NUM_PREFIXES, NUM_DOUBTS + 1, generator=generator, dtype=torch.float64)
    second[:, AT_ONCE] += 2.0  # doubting by itself is rare
    return {
        "prefix": torch.randn(NUM_PREFIXES, generator=generator, dtype=torch.float64),
        "second": second,
        "try": torch.randn(NUM_PREFIXES, NUM_DOUBTS, NUM_TRIES, generator=generator, dtype=torch.float64),
    }


def log_tables(theta):
    return {name: value.log_softmax(-1) for name, value in theta.items()}


# Every trajectory: (x, answer at once) and (x, d, c).
TRAJECTORIES = [(x, AT_ONCE, 0) for x in range(NUM_PREFIXES)] + list(
    product(range(NUM_PREFIXES), range(NUM_DOUBTS), range(NUM_TRIES))
)
X, D, C = (torch.tensor(column) for column in zip(*TRAJECTORIES, strict=True))
DOUBTS = D != AT_ONCE
REWARD = torch.where(DOUBTS, C == TRY_IS_RIGHT, PASSES[X]).double()


def token_log_probs(theta) -> torch.Tensor:
    """(trajectories, 3) log-probability of every decision; the third is 0 where the answer came at once."""
    tables = log_tables(theta)
    third = tables["try"][X, D.clamp(max=NUM_DOUBTS - 1), C]
    return torch.stack([tables["prefix"][X], tables["second"][X, D], torch.where(DOUBTS, third, 0.0)], dim=1)


def flat_gradient(objective: torch.Tensor, theta) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective, list(theta.values()))])


def setting():
    theta = {name: value.requires_grad_() for name, value in parameters().items()}
    logps = token_log_probs(theta)
    probabilities = logps.sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1.0)
    exact = flat_gradient((probabilities * REWARD).sum(), theta)
    # the score function of every trajectory, one row each
    scores = torch.stack([flat_gradient(token_log_probs(theta)[row].sum(), theta) for row in range(len(TRAJECTORIES))])
    return {name: value.detach() for name, value in theta.items()}, exact, scores


def sample_batch(theta, generator):
    """Indices of originals and of probes, and the batch's own failure rate, as the trainer would have them."""
    probabilities = token_log_probs(theta).sum(1).exp()
    originals = torch.multinomial(probabilities, ORIGINALS, replacement=True, generator=generator)
    failed = originals[~PASSES[X[originals]]]
    chosen = failed[torch.randperm(len(failed), generator=generator)[:PROBES]]
    assert len(chosen) == PROBES
    prefixes = X[chosen]
    doubts = torch.randint(NUM_DOUBTS, (PROBES,), generator=generator)
    tries = torch.multinomial(log_tables(theta)["try"][prefixes, doubts].exp(), 1, generator=generator).squeeze(1)
    probes = NUM_PREFIXES + (prefixes * NUM_DOUBTS + doubts) * NUM_TRIES + tries
    return originals, probes, len(failed) / ORIGINALS


def corrected_weights(theta, failure_rate) -> torch.Tensor:
    """pi / mu of every trajectory, by the package's functions.

    The balance heuristic asks for a trajectory's density under both policies whoever sampled it, so every trajectory
    that re-opens a failing prefix with a pool prompt is marked as a probe, sampled so or not.
    """
    is_probe = (DOUBTS & ~PASSES[X]).unsqueeze(1)
    kinds = torch.where(
        is_probe,
        torch.tensor([[SegmentKind.POLICY, SegmentKind.PROBE, SegmentKind.POLICY]]),
        torch.tensor([[SegmentKind.POLICY] * 3]),
    ).to(torch.int8)
    pool_logps = torch.full((len(TRAJECTORIES), 3), -math.log(NUM_DOUBTS))
    old = token_log_probs(theta)
    density = probe_log_density(old, kinds, pool_logps, failure_rate)
    share = PROBES / (ORIGINALS + PROBES)
    return sequence_log_weights(old, density, torch.ones_like(kinds), share).exp().squeeze(1).double()


@pytest.fixture(scope="module")
def estimates():
    theta, exact, scores = setting()
    generator = torch.Generator().manual_seed(0)
    corrected, uncorrected = [], []
    for _ in range(BATCHES):
        originals, probes, failure_rate = sample_batch(theta, generator)
        rows = torch.cat([originals, probes])
        counts = torch.bincount(rows, minlength=len(TRAJECTORIES)).double() / len(rows)
        uncorrected.append((counts * REWARD) @ scores)
        corrected.append((counts * REWARD * corrected_weights(theta, failure_rate)) @ scores)
    return exact, torch.stack(corrected), torch.stack(uncorrected)


def z_scores(samples: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    error = samples.std(0) / math.sqrt(len(samples))
    return (samples.mean(0) - exact) / error.clamp(min=1e-12)


def test_corrected_gradient_agrees_with_the_exact_one(estimates):
    """40 components: were all unbiased, the largest |z| would exceed 3.8 in less than one run of 150."""
    exact, corrected, _ = estimates
    z = z_scores(corrected, exact)
    assert z.abs().max() < 3.8
    assert z.square().mean() < 2.0
    assert (corrected.mean(0) - exact).norm() < 0.02 * exact.norm()


def test_uncorrected_gradient_does_not(estimates):
    exact, _, uncorrected = estimates
    assert z_scores(uncorrected, exact).abs().max() > 50
    assert (uncorrected.mean(0) - exact).norm() > 0.2 * exact.norm()


def test_weights_average_to_one(estimates):
    """E_mu[pi / mu] = 1: probabilities of the mixture times the weights add up to 1."""
    theta = parameters()
    old = token_log_probs(theta).sum(1)
    failing = ~PASSES[X]
    z = old.exp()[failing].sum().item()
    weights = corrected_weights(theta, z)
    tables = log_tables(theta)
    probe_density = torch.where(
        DOUBTS & failing,
        tables["prefix"][X].exp() / z / NUM_DOUBTS * tables["try"][X, D.clamp(max=NUM_DOUBTS - 1), C].exp(),
        0.0,
    )
    assert probe_density.sum().item() == pytest.approx(1.0)
    share = PROBES / (ORIGINALS + PROBES)
    mixture = (1 - share) * old.exp() + share * probe_density
    assert (mixture * weights).sum().item() == pytest.approx(1.0, abs=1e-6)
