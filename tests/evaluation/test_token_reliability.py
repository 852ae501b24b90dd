"""LogTokU's figures against values worked out by hand, and the logits of a real tiny model."""

from __future__ import annotations

import math

import pytest
import torch
from parts import make_tiny_model

from rex_rag.evaluation.token_reliability import (
    aleatoric_uncertainty,
    completion_evidence,
    epistemic_uncertainty,
    evidence,
    score_trajectory,
    token_reliability,
    token_texts,
)
from rex_rag.types import Segment, SegmentKind, Trajectory

# digamma at whole numbers is a harmonic sum less Euler's constant g, which cancels in every difference:
#   digamma(1) = -g, digamma(2) = 1 - g, digamma(3) = 3/2 - g, digamma(4) = 11/6 - g, digamma(5) = 25/12 - g
# and digamma(3/2) = 2 - g - 2 ln 2.
HAND_COMPUTED = [
    # shares 3/4 and 1/4 of 4: 3/4 (digamma(5) - digamma(4)) + 1/4 (digamma(5) - digamma(2))
    #   = 3/4 * 3/12 + 1/4 * 13/12 = 22/48
    ([3.0, 1.0], 22 / 48, 2 / 6),
    # digamma(3) - digamma(2) = 1/2
    ([1.0, 1.0], 1 / 2, 2 / 4),
    # all of it for one candidate: no doubt between candidates
    ([2.0, 0.0], 0.0, 2 / 4),
    # digamma(2) - digamma(3/2) = 2 ln 2 - 1
    ([0.5, 0.5], 2 * math.log(2) - 1, 2 / 3),
    # 1/2 (digamma(5) - digamma(3)) + 2 * 1/4 (digamma(5) - digamma(2)) = 7/24 + 13/24
    ([2.0, 1.0, 1.0], 20 / 24, 3 / 7),
]


@pytest.mark.parametrize(("alpha", "aleatoric", "epistemic"), HAND_COMPUTED)
def test_figures_are_those_worked_out_by_hand(alpha: list[float], aleatoric: float, epistemic: float):
    alpha = torch.tensor(alpha)
    assert aleatoric_uncertainty(alpha).item() == pytest.approx(aleatoric, abs=1e-6)
    assert epistemic_uncertainty(alpha).item() == pytest.approx(epistemic, abs=1e-6)
    assert token_reliability(alpha).item() == pytest.approx(-aleatoric * epistemic, abs=1e-6)


def test_rows_are_figured_out_one_by_one():
    alpha = torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]]])  # (2, 1, 2)
    assert aleatoric_uncertainty(alpha).shape == (2, 1)
    assert token_reliability(alpha).flatten().tolist() == pytest.approx([-22 / 48 / 3, -1 / 4], abs=1e-6)


def test_evidence_is_the_largest_logits_without_what_is_below_zero():
    logits = torch.tensor([[-3.0, 1.0, 0.5, 3.0], [2.0, -5.0, -1.0, -7.0]])
    assert evidence(logits).tolist() == [[3.0, 1.0], [2.0, 0.0]]
    assert evidence(logits, k=3).tolist() == [[3.0, 1.0, 0.5], [2.0, 0.0, 0.0]]
    assert evidence(logits.bfloat16()).dtype == torch.float32


def test_without_any_evidence_nothing_is_rated():
    alpha = evidence(torch.tensor([[-1.0, -2.0, -30.0], [4.0, 4.0, 4.0]]))
    assert alpha[0].tolist() == [0.0, 0.0]
    assert epistemic_uncertainty(alpha).tolist() == [1.0, pytest.approx(2 / 10)]
    assert torch.isnan(aleatoric_uncertainty(alpha)).tolist() == [True, False]
    assert torch.isnan(token_reliability(alpha)).tolist() == [True, False]


def test_doubt_between_equals_grows_to_the_logarithm_of_their_number():
    alpha = torch.tensor([[10.0] * 2, [1e3] * 2, [1e5] * 2])
    values = aleatoric_uncertainty(alpha).tolist()
    assert values[0] < values[1] < math.log(2) + 1e-4
    # digamma(21) - digamma(11) = 1/11 + ... + 1/20
    assert values[0] == pytest.approx(sum(1 / n for n in range(11, 21)), abs=1e-6)
    assert values[2] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_too_few_or_too_many_candidates_are_refused(k: int):
    with pytest.raises(ValueError, match=f"k={k} candidates cannot be taken from 4 logits"):
        evidence(torch.zeros(1, 4), k)


@pytest.fixture(scope="module")
def model(word_tokenizer):
    return make_tiny_model(word_tokenizer)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("prompt", [1, 3, 6])
def test_evidence_of_a_completion_is_that_of_the_logits_before_each_token(model, prompt: int, chunk: int):
    ids = list(range(5, 16))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    expected = evidence(logits[prompt - 1 : -1], 2)  # the last logits would produce a token that is not there
    found = completion_evidence(model, ids[:prompt], ids[prompt:], chunk_tokens=chunk)
    assert found.shape == (len(ids) - prompt, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01  # rows differ, so a shift by one would show


def test_logits_held_at_once_are_bounded_and_the_model_is_left_as_it_was(model):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.size(1)))
    model.train()
    try:
        assert completion_evidence(model, list(range(5, 15)), list(range(5, 30)), chunk_tokens=8).size(0) == 25
        assert model.training
    finally:
        hook.remove()
        model.eval()
    assert seen == [8, 8, 8, 8, 2]


def test_a_text_without_beginning_or_end(model):
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        completion_evidence(model, [], [5])
    assert completion_evidence(model, [5, 6], []).shape == (0, 2)


def test_a_character_spread_over_tokens_is_the_text_of_the_last(bpe_tokenizer):
    part = "\ufffd"
    for text, expected in (
        ("aé日b", ["a", part, "é", part, part, "日", "b"]),
        ("👍", [part, part, part, "👍"]),
        ("", []),
    ):
        assert token_texts(bpe_tokenizer, bpe_tokenizer(text)["input_ids"]) == expected
    [first, middle, last] = bpe_tokenizer("日")["input_ids"]
    # Bytes that are no character remain none, and do not take the next one along.
    assert token_texts(bpe_tokenizer, [last, first, middle, *bpe_tokenizer("é")["input_ids"]]) == [part] * 4 + ["é"]


def test_every_token_of_a_trajectory_is_scored_under_its_kind(model, word_tokenizer):
    ids = word_tokenizer(["red owl", "oak", "blue"], add_special_tokens=False)["input_ids"]
    kinds = (SegmentKind.POLICY, SegmentKind.INFORMATION, SegmentKind.POLICY)
    segments = [Segment(kind, row, "") for kind, row in zip(kinds, ids, strict=True)]
    tokens = score_trajectory(model, word_tokenizer, Trajectory([5, 6, 7], segments))
    assert [token.text for token in tokens] == ["red", "owl", "oak", "blue"]
    assert [token.kind for token in tokens] == [kinds[0], kinds[0], kinds[1], kinds[2]]
    alpha = completion_evidence(model, [5, 6, 7], [token for row in ids for token in row])
    assert [token.reliability for token in tokens] == pytest.approx(token_reliability(alpha).tolist(), nan_ok=True)
    assert [token.epistemic for token in tokens] == pytest.approx(epistemic_uncertainty(alpha).tolist())
