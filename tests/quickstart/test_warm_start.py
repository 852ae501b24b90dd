"""What the warm start begins with, and the order in which it sees its rows."""

from types import SimpleNamespace

import torch

from rex_rag.protocols import make_protocol
from rex_rag.quickstart.warm_start import (
    QUICKSTART_PROMPT,
    StopWhenGood,
    batches_of_like_length,
    begin_by_copying,
    build_model,
    build_tokenizer,
)

ROWS = [{"input_ids": [0] * (20 + index * 7919 % 100)} for index in range(1000)]


def test_batches_hold_rows_of_like_length_and_every_row_once_before_any_twice():
    order = batches_of_like_length(ROWS, steps=100, batch_size=10, seed=0)
    assert sorted(order) == list(range(1000))
    lengths = [[len(ROWS[index]["input_ids"]) for index in order[at : at + 10]] for at in range(0, 1000, 10)]
    # Of 200 rows sorted, ten neighbours: lengths 20 to 119, so about 5 apart, and 80 or more in a random ten.
    assert max(max(batch) - min(batch) for batch in lengths) <= 15
    # Long and short ones come mixed: means of twenty batches in a row are 69.5, give or take 6.5 (29 / sqrt(20)).
    means = [sum(map(sum, lengths[at : at + 20])) / 200 for at in range(0, 100, 20)]
    assert all(45 < mean < 95 for mean in means)
    assert order != batches_of_like_length(ROWS, steps=100, batch_size=10, seed=1)


def test_more_steps_than_rows_go_round_and_few_rows_make_a_small_batch():
    assert len(batches_of_like_length(ROWS, steps=230, batch_size=10, seed=0)) == 2300
    assert batches_of_like_length(ROWS[:3], steps=2, batch_size=24, seed=0)[:3] != []
    assert len(batches_of_like_length(ROWS[:3], steps=2, batch_size=24, seed=0)) == 6


def test_attention_begins_by_looking_for_its_own_token_and_passing_it_on():
    tokenizer = build_tokenizer(make_protocol("search_r1", template=QUICKSTART_PROMPT))
    model = build_model(tokenizer, hidden_size=64, layers=2)
    begin_by_copying(model)
    for layer in model.model.layers:
        q, k, v, o = (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo")
        half = torch.eye(64) / 2
        # Whatever is seen is added, halved, to what is there; a token's likeness to itself is |x|^2 / 2.
        torch.testing.assert_close(o @ v, half, atol=1e-5, rtol=0)
        torch.testing.assert_close(q.T @ k, half, atol=1e-5, rtol=0)


def test_the_bar_promises_no_steps_and_shows_no_figure_before_it_is_measured():
    args = SimpleNamespace(check_from=2, check_every=2, target=0.95)
    callback = StopWhenGood(args, SimpleNamespace(exact_match=lambda model, hops: 0.96))
    state, control = SimpleNamespace(max_steps=1800, global_step=0), SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(None, state, control)
    callback.on_log(None, state, control, logs={"loss": 0.5})
    assert callback.bar.total is None and "nan" not in str(callback.bar) and "one-hop EM" not in str(callback.bar)
    for state.global_step in (1, 2):
        callback.on_step_end(None, state, control)
        callback.on_log(None, state, control, logs={"loss": 0.5})
    assert control.should_training_stop and "one-hop EM 0.96 of 0.95" in str(callback.bar)
    callback.on_train_end(None, state, control)
