"""Mixed sampling: which originals are probed, and the filter's order and count over two ranks."""

import math
from dataclasses import replace

from parts import BUDGET, RIGHT, SILENT, WRONG, ScriptedGenerator, TwoRanks, agent_for, run_on_both, sampler_for
from parts import PROBE_POOL as POOL

from rex_rag.models.generation import VLLMGenerator
from rex_rag.probes.explorer import draws
from rex_rag.rollout.script import RolloutBudget
from rex_rag.training.metrics import mixed_counts, summarize


def is_oak(_, trajectory):
    return trajectory.answer == "oak"


def run(sampler, count, keep_ratio=1.0, first_row=0, step=(3, 0)):
    rows = range(first_row, first_row + count)
    return sampler.sample([[5]] * count, is_oak, step=step, rows=rows, keep_ratio=keep_ratio)


def test_only_wrong_answers_are_probed(word_tokenizer, retriever):
    turns = [[RIGHT, WRONG, SILENT, WRONG], [SILENT], [RIGHT, WRONG]]
    batch = run(sampler_for(word_tokenizer, retriever, turns), 4)
    assert batch.correct == [True, False, False, False]
    assert [probe.parent for probe in batch.probes] == [1, 3]
    assert batch.probe_correct == [True, False]
    # the silent original failed to answer, so it neither is probed nor counts into z
    assert (batch.global_originals, batch.global_failed, batch.global_made, batch.global_kept) == (4, 2, 2, 2)
    assert batch.failure_rate == 0.5 and batch.mixing_share == 2 / 6


def test_draws_are_those_of_seed_step_and_global_row(word_tokenizer, retriever):
    expected = [row for row in range(40) if draws(0, (3, 0), 80 + row).random() < 0.5]
    turns = [[WRONG] * 40, [WRONG] * len(expected)]
    sampler = sampler_for(word_tokenizer, retriever, turns, probe_probability=0.5, probe_filter="none")
    batch = run(sampler, 40, first_row=80)
    assert [probe.parent for probe in batch.probes] == expected
    for probe in batch.probes:
        own = draws(0, (3, 0), 80 + probe.parent)
        own.random()
        prompt = own.integers(3)
        assert probe.segments[-2].text.strip() == POOL[prompt]


def test_slots_bound_the_probes_of_a_question(word_tokenizer, retriever):
    sampler = sampler_for(word_tokenizer, retriever, [[WRONG] * 4, [WRONG] * 2], probe_slots=1, probe_filter="none")
    assert [probe.parent for probe in run(sampler, 4).probes] == [0, 2]


def test_no_failures_no_probes(word_tokenizer, retriever):
    batch = run(sampler_for(word_tokenizer, retriever, [[RIGHT] * 4]), 4)
    assert batch.probes == [] and batch.mixing_share == 0.0 and batch.failure_rate == 0.0


def test_filtered_probes_are_never_continued(word_tokenizer, retriever):
    scores = {0: -3.0, 1: -1.0, 2: -2.0, 3: math.nan}
    sampler = sampler_for(
        word_tokenizer,
        retriever,
        [[WRONG] * 4, [RIGHT, WRONG]],
        score=lambda probes: [scores[probe.parent] for probe in probes],
    )
    batch = run(sampler, 4, keep_ratio=0.5)
    assert [probe.parent for probe in batch.probes] == [1, 2]
    assert batch.global_made == 4 and batch.global_kept == 2
    assert not sampler.agent.driver.generator(()).turns  # the script holds continuations for two probes only


def test_filter_over_two_ranks(word_tokenizer, retriever):
    """Six failed originals, scores -6 -1 -4 on rank 0 and -2 -5 -3 on rank 1; keep floor(0.4 * 8) = 3: -1, -2, -3."""
    ranks = TwoRanks()
    scores = [{0: -6.0, 1: -1.0, 3: -4.0}, {0: -2.0, 1: -5.0, 2: -3.0}]
    turns = [
        [[WRONG, WRONG, RIGHT, WRONG], [RIGHT]],
        [[WRONG, WRONG, WRONG, RIGHT], [WRONG, RIGHT]],
    ]
    batches = [None, None]

    def work(rank):
        sampler = sampler_for(
            word_tokenizer,
            retriever,
            turns[rank],
            score=lambda probes: [scores[rank][probe.parent] for probe in probes],
            gather=ranks.gather(rank),
            rank=rank,
        )
        batches[rank] = run(sampler, 4, keep_ratio=0.4, first_row=4 * rank)

    run_on_both(work)
    assert [[probe.parent for probe in batch.probes] for batch in batches] == [[1], [0, 2]]
    for batch in batches:
        assert (batch.global_originals, batch.global_failed, batch.global_made, batch.global_kept) == (8, 6, 6, 3)
        assert batch.failure_rate == 0.75 and batch.mixing_share == 3 / 11


def test_probes_that_cannot_be_trained_are_kept_on_no_rank(word_tokenizer, retriever):
    """Rank 0 makes two probes and drops the one that answers red; rank 1 makes one and drops none."""
    ranks = TwoRanks()
    turns = [[[WRONG, WRONG], [RIGHT, WRONG]], [[WRONG, RIGHT], [RIGHT]]]
    batches = [None, None]

    def work(rank):
        sampler = sampler_for(
            word_tokenizer,
            retriever,
            turns[rank],
            trained=lambda probe: replace(probe, segments=[]) if probe.answer == "oak" else "red",
            gather=ranks.gather(rank),
            rank=rank,
        )
        batches[rank] = run(sampler, 2, first_row=2 * rank)

    run_on_both(work)
    assert [[probe.parent for probe in batch.probes] for batch in batches] == [[0], [0]]
    assert [batch.dropped for batch in batches] == [{"red": 1}, {}]
    for batch in batches:
        assert [probe.trained.segments for probe in batch.probes] == [[]] and batch.probes[0].segments
        assert (batch.global_originals, batch.global_failed, batch.global_made, batch.global_kept) == (4, 3, 3, 2)
        assert batch.mixing_share == 2 / 6
    counts = summarize(mixed_counts(batch, 2) for batch in batches)
    assert (counts["probes/made"], counts["probes/kept"], counts["probes/dropped"]) == (3, 2, 1)
    assert counts["probes/dropped/red"] == 1 and counts["em/probes"] == 1.0


def test_random_subset_has_the_filters_size(word_tokenizer, retriever):
    kept = []
    for step in range(5):
        sampler = sampler_for(word_tokenizer, retriever, [[WRONG] * 4, [WRONG] * 2], probe_filter="random")
        kept.append(tuple(probe.parent for probe in run(sampler, 4, keep_ratio=0.5, step=(step, 0)).probes))
    assert {len(parents) for parents in kept} == {2}
    assert len(set(kept)) > 1


def test_served_engines_get_one_token_limit_and_equally_many_rows(word_tokenizer, retriever):
    """One engine takes the main process's limit for all ranks, so an idle rank 0 must not ask for a single token."""
    ranks = TwoRanks()
    calls = [[], []]

    def work(rank):
        turns = [[RIGHT, RIGHT], ["x"]] if rank == 0 else [["so so", WRONG], [WRONG]]
        gather = ranks.gather(rank)
        generator = ScriptedGenerator(word_tokenizer, turns)
        generator.equal_rows = True
        generate = generator.generate

        def recording(prompt_ids, max_new_tokens):
            calls[rank].append((len(prompt_ids), max_new_tokens))
            return generate(prompt_ids, max_new_tokens)

        generator.generate = recording
        agent = agent_for(generator, retriever, word_tokenizer, BUDGET, lambda count: max(gather(count)))
        agent.rollout([[5], [6]])

    run_on_both(work)
    # turn 1: two rows each; turn 2: rank 1 has one live row, rank 0 joins with as many rows and the same limit
    assert calls[0] == calls[1] == [(2, 40), (1, 40)]


def test_served_engines_are_called_equally_often_whatever_room_the_ranks_rows_have(word_tokenizer, retriever):
    """Of 120 tokens, 40 a turn: rank 0's rows have room for 40 and 15, rank 1's for 40 and 25."""
    ranks = TwoRanks()
    calls = [[], []]

    def work(rank):
        def turn(prompts):
            calls[rank].append((limits[rank], [len(prompt) for prompt in prompts]))
            return [[5] * limits[rank] for _ in prompts], [[-1.0] * limits[rank] for _ in prompts]

        gather = ranks.gather(rank)
        generator = VLLMGenerator(turn, lambda limit: limits.__setitem__(rank, limit), equal_rows=True)
        budget = RolloutBudget(
            max_turns=0, max_turn_tokens=40, max_observation_tokens=40, max_sequence_length=120, top_k=1
        )
        agent = agent_for(generator, retriever, word_tokenizer, budget, lambda count: max(gather(count)))
        agent.rollout([[5], [6] * (105 if rank == 0 else 95)])

    limits = [0, 0]
    run_on_both(work)
    # a rank without a row of that room joins with a row of one token
    assert calls == [[(40, [1]), (25, [1]), (15, [105])], [(40, [1]), (25, [95]), (15, [1])]]
