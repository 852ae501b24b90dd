"""The pool, its exact log-probabilities and its seeded draws."""

import math

import pytest

from rex_rag.probes.explorer import draws
from rex_rag.probes.pool import DEFAULT_POOL, ExplorationPool, load_pool, pool_log_probs


def test_pool_log_probs_of_shared_prefixes_and_different_lengths():
    ids = [[1, 2, 3], [1, 2, 4], [1, 5], [6, 7]]
    # first token: 1 begins 3 of 4, 6 begins 1 of 4; after 1: 2 in 2 of 3, 5 in 1 of 3; after 1 2: 1 of 2 each
    expected = [[3 / 4, 2 / 3, 1 / 2], [3 / 4, 2 / 3, 1 / 2], [3 / 4, 1 / 3], [1 / 4, 1.0]]
    logprobs = pool_log_probs(ids)
    assert [[pytest.approx(math.exp(value)) for value in row] for row in logprobs] == expected
    assert [math.exp(sum(row)) for row in logprobs] == pytest.approx([1 / 4] * 4)


@pytest.mark.parametrize("leftover", ["", "\n", ".</think>"])
def test_every_prompt_has_the_probability_of_its_draw(bpe_tokenizer, leftover):
    pool = ExplorationPool(DEFAULT_POOL, bpe_tokenizer)
    encoded = pool.encode(leftover)
    assert len(encoded.ids) == 30
    for text, prompt, row, ids in zip(encoded.texts, DEFAULT_POOL, encoded.logprobs, encoded.ids, strict=True):
        assert text == leftover + prompt
        assert bpe_tokenizer.decode(ids) == text
        assert sum(row) == pytest.approx(-math.log(30))


def test_coarse_density_puts_everything_on_the_first_token(bpe_tokenizer):
    pool = ExplorationPool(DEFAULT_POOL, bpe_tokenizer, density="coarse")
    for row in pool.encode("").logprobs:
        assert row[0] == pytest.approx(-3.4011974)  # log 1/30
        assert set(row[1:]) == {0.0}


def test_single_prompt_pool_has_density_one(bpe_tokenizer):
    pool = ExplorationPool(load_pool(None, size=1), bpe_tokenizer)
    assert set(pool.encode("").logprobs[0]) == {0.0}


def test_built_in_pool_is_well_formed():
    assert len(DEFAULT_POOL) == len(set(DEFAULT_POOL)) == 30
    assert all(prompt.startswith("<think>") for prompt in DEFAULT_POOL)


def test_pool_file(tmp_path):
    path = tmp_path / "pool.txt"
    path.write_text("<think> One.\n\n  <think> Two.  \n")
    assert load_pool(path) == ("<think> One.", "<think> Two.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("Wait", "must begin with <think>"),
        ("<think> a </think> <answer> b </answer>", "contains <answer>"),
        ("<think> a\n<think> a", "twice"),
    ],
)
def test_bad_pools_are_refused(tmp_path, content, message):
    path = tmp_path / "pool.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pool(path)


def test_missing_pool_file_and_impossible_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        load_pool(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="exploration_pool_size is 31"):
        load_pool(None, size=31)


def test_prompts_that_a_tokenizer_cannot_tell_apart_are_refused(word_tokenizer):
    with pytest.raises(ValueError, match="cannot be told apart"):
        ExplorationPool(["<think> zebra", "<think> giraffe"], word_tokenizer)  # both are unknown words


def test_draws_depend_on_seed_step_and_row_alone():
    def drawn(seed, step):
        generators = [draws(seed, step, row) for row in range(2000)]
        return [(own.random() < 0.2, int(own.integers(30))) for own in generators]

    first = drawn(0, (5, 0))
    assert first == drawn(0, (5, 0))
    assert first != drawn(1, (5, 0)) and first != drawn(0, (6, 0)) and first != drawn(0, (5, 1))
    share = sum(probed for probed, _ in first) / len(first)
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)  # four standard errors
    counts = [sum(prompt == each for _, prompt in first) for each in range(30)]
    assert min(counts) > 30 and max(counts) < 110  # 66.7 expected, standard deviation 8
