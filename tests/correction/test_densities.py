"""Probe density, mixture, the three correction forms and the filter, on cases computed by hand."""

import math

import pytest
import torch

from rex_rag.correction.densities import (
    behavior_log_probs,
    clip_bound,
    decoupled_log_weights,
    prefix_mask,
    probe_log_density,
    sequence_log_weights,
    weight_statistics,
)
from rex_rag.probes.filter import KeepRatio, keep_best, keep_count, keep_random
from rex_rag.types import SegmentKind

POLICY, INFORMATION, FEEDBACK, PROBE, PAD = 0, 1, 2, 3, -1

# Row 0, a probe: two prefix tokens with a passage token between them, two inserted tokens, one continuation token.
# Row 1, an original: two tokens, a passage token, one token.
KINDS = torch.tensor(
    [
        [POLICY, INFORMATION, POLICY, PROBE, PROBE, POLICY, PAD],
        [POLICY, POLICY, INFORMATION, POLICY, PAD, PAD, PAD],
    ],
    dtype=torch.int8,
)
OLD = torch.tensor([[-1.0, -9.0, -2.0, -3.0, -4.0, -0.5, 0.0], [-1.0, -2.0, -9.0, -3.0, 0.0, 0.0, 0.0]])
POOL = torch.tensor([[0, 0, 0, math.log(0.25), 0.0, 0, 0], [0.0] * 7])
MASK = (KINDS == POLICY) | (KINDS == PROBE)
INF = math.inf


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_prefix_is_the_policy_tokens_before_the_prompt():
    assert prefix_mask(KINDS).tolist() == [
        [True, False, True, False, False, False, False],
        [False] * 7,
    ]


def test_probe_density():
    # z = 0.5 over |o'| = 2 policy tokens (the passage token does not count): each gains log(2) / 2 = 0.346574.
    density = probe_log_density(OLD, KINDS, POOL, failure_rate=0.5)
    close(density[0, [0, 2, 3, 4, 5]], [-0.653426, -1.653426, -1.386294, 0.0, -0.5])
    assert density[1].tolist() == [-INF] * 7
    # over the prefix the product is pi_old(o') / z = e^-3 / 0.5
    close(density[0, [0, 2]].sum().exp(), 0.0995741)


def test_probe_density_with_everything_failed_or_an_empty_prefix():
    assert probe_log_density(OLD, KINDS, POOL, failure_rate=1.0)[0, 0] == -1.0
    kinds = torch.tensor([[PROBE, POLICY]], dtype=torch.int8)
    density = probe_log_density(torch.tensor([[-3.0, -1.0]]), kinds, torch.tensor([[-0.5, 0.0]]), 0.25)
    assert density.tolist() == [[-0.5, -1.0]]


def test_probes_without_failures_are_refused_and_originals_alone_are_not():
    with pytest.raises(ValueError, match="failure_rate is 0"):
        probe_log_density(OLD, KINDS, POOL, failure_rate=0.0)
    assert probe_log_density(OLD[1:], KINDS[1:], POOL[1:], failure_rate=0.0).tolist() == [[-INF] * 7]


def test_mixture():
    behavior = behavior_log_probs(OLD, probe_log_density(OLD, KINDS, POOL, 0.5), mixing_share=0.25)
    # prefix: log(0.75 + 0.25 * sqrt(2)) = 0.098533 above log pi_old
    # inserted: log(0.75 e^-3 + 0.25 * 0.25) = log 0.0998403, log(0.75 e^-4 + 0.25 * 1) = log 0.2637367
    close(behavior[0, [0, 2, 3, 4, 5]], [-0.901467, -1.901467, -2.304183, -1.332804, -0.5])
    # originals: log 0.75 = -0.287682 below log pi_old
    close(behavior[1, [0, 1, 3]], [-1.287682, -2.287682, -3.287682])


def test_mixture_without_probes_is_the_old_policy_bit_for_bit():
    old = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    nothing = torch.full_like(old, -INF)
    assert torch.equal(behavior_log_probs(old, nothing, 0.0), old)


def test_token_form():
    """The clipped ratio is pi_theta / mu: at pi_theta = pi_old an original starts at 1 / (1 - a)."""
    behavior = behavior_log_probs(OLD, probe_log_density(OLD, KINDS, POOL, 0.5), 0.25)
    ratio = (OLD - behavior).exp()
    close(ratio[1, [0, 1, 3]], [4 / 3, 4 / 3, 4 / 3])
    # 1 / (0.75 + 0.353553), e^-3 / 0.0998403, e^-4 / 0.2637367, 1
    close(ratio[0, [0, 2, 3, 4, 5]], [0.906164, 0.906164, 0.498667, 0.0694467, 1.0])


def test_decoupled_form():
    behavior = behavior_log_probs(OLD, probe_log_density(OLD, KINDS, POOL, 0.5), 0.25)
    weights = decoupled_log_weights(OLD, behavior).exp()
    close(weights[0, [0, 3, 4, 5]], [0.906164, 0.498667, 0.0694467, 1.0])
    close(weights[1, [0, 1, 3]], [4 / 3, 4 / 3, 4 / 3])


def test_sequence_form():
    density = probe_log_density(OLD, KINDS, POOL, 0.5)
    weights = sequence_log_weights(OLD, density, MASK, 0.25).exp()
    # pi_eps / pi_old = (1 / 0.5) * (0.25 / e^-3) * (1 / e^-4) = 2 * 5.021384 * 54.59815 = 548.3166
    # weight 1 / (0.75 + 0.25 * 548.3166); an original 1 / 0.75
    close(weights, [[0.00725542], [1.3333333]])


def test_sequence_form_is_finite_where_the_policy_would_never_doubt():
    kinds = torch.tensor([[POLICY, PROBE]], dtype=torch.int8)
    old = torch.tensor([[-1.0, -300.0]])
    density = probe_log_density(old, kinds, torch.tensor([[0.0, -3.4]]), 0.5)
    weight = sequence_log_weights(old, density, torch.ones(1, 2), 0.1)
    # -(log 0.1 + log 2 + 300 - 3.4): log weight -294.99, no overflow on the way
    close(weight, [[-294.990562]])


def test_mixing_share_one_is_refused():
    with pytest.raises(ValueError, match="mixing_share is 1"):
        behavior_log_probs(OLD, OLD, 1.0)


def test_half_precision_log_probs_are_corrected_in_single_precision():
    density = probe_log_density(OLD.bfloat16(), KINDS, POOL, 0.5)
    assert density.dtype == behavior_log_probs(OLD.bfloat16(), density, 0.25).dtype == torch.float32


def test_clip_bound():
    assert clip_bound(0.2) == pytest.approx(1 / 6)
    assert 1 / (1 - clip_bound(0.28)) == pytest.approx(1.28)


@pytest.mark.parametrize(
    ("ratio", "originals", "kept"), [(0.12, 80, 9), (0.12, 2560, 307), (0.29, 100, 29), (0.12, 8, 0), (1.0, 5, 5)]
)
def test_keep_count_is_the_floor(ratio, originals, kept):
    assert keep_count(ratio, originals) == kept


def test_keep_best_orders_by_score_then_position():
    assert keep_best([-3.0, -1.0, -2.0, -1.0], 2) == [False, True, False, True]
    assert keep_best([-1.0, -1.0, -1.0], 2) == [True, True, False]
    assert keep_best([math.nan, -5.0, -4.0], 2) == [False, True, True]
    assert keep_best([-1.0], 0) == [False]
    assert keep_best([], 3) == []


def test_keep_random_is_seeded_and_of_the_size_asked():
    chosen = keep_random(20, 7, seed=3, step=(11, 0))
    assert sum(chosen) == 7
    assert chosen == keep_random(20, 7, seed=3, step=(11, 0))
    assert chosen != keep_random(20, 7, seed=3, step=(12, 0))


def test_keep_ratio_follows_probe_accuracy():
    ratio = KeepRatio(0.08, "accuracy_ema")
    ratio.update(0.5)
    assert ratio.value == pytest.approx(0.122)  # 0.08 + 0.1 * (0.5 - 0.08)
    ratio.update(0.0)
    assert ratio.value == pytest.approx(0.1098)
    resumed = KeepRatio(0.08, "accuracy_ema")
    resumed.load_state_dict(ratio.state_dict())
    assert resumed.value == ratio.value
    constant = KeepRatio(0.12)
    constant.update(1.0)
    assert constant.value == 0.12


def test_weight_statistics():
    log_weights = torch.tensor([[0.0, math.log(3.0)], [math.log(2.0), 50.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    close(weight_statistics(log_weights, mask), [6.0, 14.0, 3.0, 3.0])


def test_only_sampled_and_inserted_prompts_are_trained():
    assert [kind for kind in SegmentKind if kind.is_trained] == [SegmentKind.POLICY, SegmentKind.PROBE]
