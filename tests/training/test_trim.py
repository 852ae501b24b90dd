"""Padding is cut where no row needs it, and the loss stays what it was."""

from __future__ import annotations

import pytest
import torch

from rex_rag.training.trim import by_length, in_two_buckets, trimmed


def batch() -> dict[str, torch.Tensor]:
    return {
        "prompt_ids": torch.tensor([[0, 0, 5], [0, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": torch.arange(8.0).view(2, 4),
        "importance_sampling_ratio": torch.ones(2, 1),
        "num_items_in_batch": torch.tensor(3),
    }


def test_columns_that_no_row_uses_are_cut_and_nothing_else():
    output = trimmed(batch())
    assert output["prompt_ids"].tolist() == [[0, 5], [6, 7]] and output["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert output["completion_ids"].tolist() == [[1, 2], [3, 0]]
    assert output["old_per_token_logps"].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert output["importance_sampling_ratio"].shape == (2, 1)
    assert output["advantages"].tolist() == [1.0, -1.0] and output["num_items_in_batch"].item() == 3


def test_nothing_to_cut_hands_the_very_tensors_on():
    given = trimmed(batch())
    assert all(value is given[name] for name, value in trimmed(given).items())


@pytest.mark.parametrize(("multiple", "lengths"), [(4, (3, 4)), (2, (2, 2)), (3, (3, 3))])
def test_lengths_stay_multiples(multiple, lengths):
    output = trimmed(batch(), multiple)
    assert (output["prompt_ids"].size(1), output["completion_ids"].size(1)) == lengths


def test_rows_without_a_token_leave_one_column():
    empty = batch() | {"completion_mask": torch.zeros(2, 4, dtype=torch.long)}
    assert trimmed(empty)["completion_ids"].size(1) == 1


def test_two_buckets_give_what_one_pass_gives():
    """A pass whose log-probabilities tell id and position, so that a row or a column in the wrong place shows."""
    shapes = []

    def forward(model, input_ids, attention_mask, logits_to_keep, compute_entropy):
        shapes.append(tuple(input_ids.shape))
        logps = (input_ids * 10 + torch.arange(input_ids.size(1)))[:, -logits_to_keep:].float()
        return logps, logps / 2 if compute_entropy else None, None

    mask = torch.zeros(6, 9, dtype=torch.long)
    mask[:, :3] = 1  # prompts
    for row, length in enumerate((2, 6, 1, 2, 2, 1)):
        mask[row, 3 : 3 + length] = 1
    ids = torch.arange(54).view(6, 9) * mask
    logps, entropies, _ = in_two_buckets(forward, None, ids, mask, 6, compute_entropy=True)
    assert shapes == [(5, 5), (1, 9)]  # five rows of at most two tokens, and the one of six
    kept = mask[:, 3:].bool()
    whole, _, _ = forward(None, ids, mask, 6, compute_entropy=False)
    assert torch.equal(logps[kept], whole[kept]) and torch.equal(entropies[kept], whole[kept] / 2)
    assert not logps[~kept][-4:].any()
    shapes.clear()
    in_two_buckets(forward, None, ids[:1], mask[:1], 6, compute_entropy=False)
    assert shapes == [(1, 9)]  # nothing to take apart


def test_rows_by_length_get_what_one_pass_gives_each_batch_without_the_others_padding():
    shapes = []

    def forward(model, input_ids, attention_mask, logits_to_keep, batch_size):
        shapes.append(tuple(input_ids.shape))
        logps = (input_ids * 10 + input_ids.roll(1, dims=1))[:, -logits_to_keep:].float()
        return logps * attention_mask[:, -logits_to_keep:], None, None

    mask = torch.zeros(5, 9, dtype=torch.long)
    for row, (prompt, length) in enumerate(((3, 2), (3, 6), (1, 1), (2, 2), (1, 1))):
        mask[row, 3 - prompt : 3 + length] = 1
    ids = (1 + torch.arange(45).view(5, 9)) * mask
    logps = by_length(forward, None, ids, mask, 6, batch_size=2)
    # Lengths 2 and 2, 4 and 5, 9: prompts of 1, 3 and 3 tokens, completions of 1, 2 and 6.
    assert shapes == [(2, 2), (2, 5), (1, 9)]
    assert torch.equal(logps, forward(None, ids, mask, 6, batch_size=5)[0])
    shapes.clear()
    by_length(forward, None, ids, mask, 6, batch_size=2, multiple=4)
    assert shapes == [(2, 7), (2, 7), (1, 9)]  # a prompt's three columns are no multiple of four, and stay
