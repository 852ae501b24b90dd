"""LLDS by hand: which rows, which actions, which tokens."""

import pytest
import torch

from rex_rag.correction.llds import llds
from rex_rag.types import SegmentKind

POLICY, PROBE, INFORMATION = SegmentKind.POLICY, SegmentKind.PROBE, SegmentKind.INFORMATION


def test_value_and_gradient_by_hand():
    # Two actions around an observation. The first fell by 0.3 - 0.1 = 0.2 as a whole: of its tokens the one that fell.
    # The second rose as a whole (0.2 - 0.5 < 0): the token that fell there is left alone. Then a row that was worse
    # than its group, and one whose advantage is 0, where a single token fell by 0.4.
    kinds = torch.tensor(
        [
            [POLICY, POLICY, INFORMATION, POLICY, POLICY],
            [POLICY, POLICY, POLICY, POLICY, POLICY],
            [POLICY, PROBE, -1, -1, -1],
        ]
    )
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    old = torch.full((3, 5), -1.0)
    fell = torch.tensor([[0.3, -0.1, 9.0, 0.2, -0.5], [1.0, 1.0, 1.0, 1.0, 1.0], [0.4, 2.0, 9.0, 9.0, 9.0]])
    logps = (old - fell).requires_grad_()
    value = llds(logps, old, kinds, mask, torch.tensor([1.0, -1.0, 0.0]))
    # Tokens of good rows: four of the first, one of the third (its PROBE token was not the policy's own).
    assert value.item() == pytest.approx((0.3 + 0.4) / 5)
    value.backward()
    expected = torch.zeros(3, 5)
    expected[0, 0] = expected[2, 0] = -1 / 5
    assert torch.allclose(logps.grad, expected)


def test_nothing_to_keep_is_zero():
    logps = torch.full((1, 2), -3.0, requires_grad=True)
    value = llds(logps, torch.zeros(1, 2), torch.full((1, 2), POLICY), torch.ones(1, 2), torch.tensor([-1.0]))
    value.backward()
    assert value.item() == 0 and not logps.grad.any()


def test_an_unchanged_policy_costs_nothing():
    logps = torch.full((1, 3), -2.0, requires_grad=True)
    value = llds(logps, logps.detach(), torch.full((1, 3), POLICY), torch.ones(1, 3), torch.tensor([1.0]))
    assert value.item() == 0
