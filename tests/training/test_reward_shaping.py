"""Shaping counts in the advantage beside a right answer alone, and is logged as it was given."""

from math import nan

import pytest
import torch
from parts import PASSAGES, RIGHT, WRONG, ScriptedGenerator, play
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.reward_shaping import gate_shaping
from rex_rag.training.rewards import shaping

SILENT = "so so so"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def test_shaping_is_gated_group_by_group():
    """Columns: exact match, format, a function that does not apply to every row. Two originals, a probe, a slot."""
    given = torch.tensor(
        [
            *([1.0, 1.0, 0.5], [0.0, 0.0, nan], [nan, nan, nan], [nan, nan, nan]),  # a right original: all counts
            *([0.0, 1.0, 0.5], [0.0, 0.0, nan], [1.0, 0.0, 0.2], [nan, nan, nan]),  # a rescued dead end: all counts
            *([0.0, 1.0, 0.5], [0.0, 0.0, nan], [0.0, 1.0, 0.2], [nan, nan, nan]),  # all wrong: nothing counts
            *([1.0, 1.0, 0.5], [1.0, 0.0, 0.1], [nan, nan, nan], [nan, nan, nan]),  # all right: all counts
        ]
    )
    expected = given.clone()
    expected[8:12, 1] = torch.tensor([0.0, 0.0, 0.0, nan])
    assert torch.equal(gate_shaping(given, [False, True, False], 4).nan_to_num(-1), expected.nan_to_num(-1))
    expected[8:12, 2] = torch.tensor([0.0, nan, 0.0, nan])
    assert torch.equal(gate_shaping(given, [False, True, True], 4).nan_to_num(-1), expected.nan_to_num(-1))


def scored(folder, tmp_path, turns, **settings):
    """Two questions of four originals, exact match and 0.2 x format; the trainer and its scored batch."""
    sizes = {"num_generations": 4, "num_probe_slots": 0, "per_device_train_batch_size": 8, "max_turns": 0}
    gated = {"format_reward_weight": 0.2, "reward_funcs": None}
    trainer = tiny_trainer(folder, tmp_path, BM25Retriever(PASSAGES), log_completions=True, **sizes | gated | settings)
    play(trainer.sampler.agent, ScriptedGenerator(trainer._tokenizer, [turns]))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(
        [dict(trainer.train_dataset[index]) for index in (0, 1) for _ in range(4)]
    )


MIXED, ALL_WRONG, ALL_RIGHT = [RIGHT, WRONG, WRONG, SILENT], [WRONG, WRONG, SILENT, SILENT], [RIGHT] * 4


def test_an_all_wrong_group_teaches_no_format(folder, tmp_path):
    """Rewards 1.2, 0.2, 0.2, 0: mean 0.4, std sqrt(0.88 / 3) = 0.541603, so 0.8 / 0.541703 = 1.476826 and so on.

    The other group's 0.2, 0.2, 0, 0 would have mean 0.1, std 0.115470: +-0.1 / 0.115570 = +-0.865275, as large as if
    right and wrong stood there.
    """
    mixed = [1.476826, -0.369207, -0.369207, -0.738413]
    trainer, output = scored(folder, tmp_path, MIXED + ALL_WRONG)
    assert output["advantages"].tolist() == pytest.approx([*mixed, 0, 0, 0, 0], abs=1e-5)
    _, output = scored(folder, tmp_path, MIXED + ALL_WRONG, shaping_needs_right_answer=False)
    everywhere = [0.865275, 0.865275, -0.865275, -0.865275]
    assert output["advantages"].tolist() == pytest.approx([*mixed, *everywhere], abs=1e-5)
    # What is logged is what was given: 5 of 8 are well-formed, 1 is right.
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["rewards/format_reward/mean"] == pytest.approx(5 / 8)
    assert metrics["rewards/format_reward/std"] == pytest.approx((15 / 56) ** 0.5)
    assert metrics["rewards/exact_match_reward/mean"] == pytest.approx(1 / 8)
    assert metrics["reward"] == pytest.approx((1.2 + 4 * 0.2) / 8)
    assert metrics["reward_std"] == pytest.approx((1.1 / 7) ** 0.5)  # squares: 0.9025 + 4 x 0.0025 + 3 x 0.0625
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 2)
    assert list(trainer._logs["rewards"]["format_reward"]) == [1, 1, 1, 0, 1, 1, 0, 0]
    assert list(trainer._logs["advantages"]) == pytest.approx([*mixed, 0, 0, 0, 0], abs=1e-5)


def test_the_std_of_a_whole_batch_is_that_of_what_counts(folder, tmp_path):
    """1.2, 0.2, 0.2 and five zeros: mean 0.2, std sqrt(1.2 / 7) = 0.414039, and the group's mean is 0.4."""
    _, output = scored(folder, tmp_path, MIXED + ALL_WRONG, scale_rewards="batch")
    expected = [0.8 / 0.414139, -0.2 / 0.414139, -0.2 / 0.414139, -0.4 / 0.414139, 0, 0, 0, 0]
    assert output["advantages"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("marked", [True, False])
def test_a_function_of_ones_own_is_shaping_where_it_is_marked(folder, tmp_path, marked):
    """0, -0.1, -0.2, -0.3 in both groups: mean -0.15, std 0.129099, so 0.15 / 0.129199 = 1.160999 and so on.

    Right answers are ranked by it; wrong ones only where it is no shaping.
    """

    def brevity(completions, **_):
        return [-0.1 * (index % 4) for index in range(len(completions))]

    function = shaping(brevity) if marked else brevity
    _, output = scored(folder, tmp_path, ALL_RIGHT + ALL_WRONG, reward_funcs=function, format_reward_weight=0.0)
    ranked = [1.160999, 0.387000, -0.387000, -1.160999]
    expected = ranked + ([0, 0, 0, 0] if marked else ranked)
    assert output["advantages"].tolist() == pytest.approx(expected, abs=1e-5)
