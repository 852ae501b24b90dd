"""The bound on a token's KL estimate, on numbers computed by hand, and inside TRL's own formula."""

from __future__ import annotations

import pytest
import torch

from rex_rag.correction.kl import bounded_reference, k3_inverse


def k3(ref: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """As TRL computes it."""
    return torch.exp(ref - logps) - (ref - logps) - 1


def test_where_k3_is_ten():
    # e^2.6115 - 2.6115 - 1 = 13.6195 - 3.6115 = 10.008; e^-11 + 11 - 1 = 10.0000167
    below, above = k3_inverse(10.0)
    assert below == pytest.approx(-10.9999833, abs=1e-6)
    assert above == pytest.approx(2.610869, abs=1e-5)
    for value in (1e-3, 0.5, 1000.0):
        for d in k3_inverse(value):
            assert torch.expm1(torch.tensor(d, dtype=torch.float64)).item() - d == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_is_bounded_and_flat_beyond(dtype):
    # log pi_ref - log pi_theta: 1 (k3 = e - 2), 7 (k3 = 1088.6), -20 (k3 = 19), 100 (infinite in float32)
    ref = torch.tensor([[-1.0, -1.0, -21.0, 0.0]], dtype=dtype)
    logps = torch.tensor([[-2.0, -8.0, -1.0, -100.0]], dtype=dtype, requires_grad=True)
    bounded, over = bounded_reference(ref, logps, 10.0)
    kl = k3(bounded, logps)
    assert over.tolist() == [[False, True, True, True]]
    assert kl[0].tolist() == pytest.approx([0.718282, 10.0, 10.0, 10.0], abs=1e-3)
    kl.sum().backward()
    # d k3 / d log pi_theta = 1 - e^d where nothing is bounded
    assert logps.grad[0].float().tolist() == pytest.approx([1 - 2.718282, 0.0, 0.0, 0.0], abs=1e-2)


def test_nothing_changes_where_the_bound_does_not_act():
    ref, logps = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True)
    bounded, over = bounded_reference(ref, logps, 1000.0)
    assert bounded is ref
    assert not over.any()
