"""Dynamic sampling and the difficulty buffer: which questions are asked, and the counts of the batch that is left."""

import logging

import pytest
from datasets import Dataset
from parts import (
    PASSAGES,
    RIGHT,
    WRONG,
    ScriptedGenerator,
    TwoRanks,
    make_word_tokenizer,
    play,
    run_on_both,
    sampler_for,
)
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.dynamic_sampling import DifficultyBuffer, DynamicSampler, FreshQuestions
from rex_rag.training.group_rows import lay_out
from rex_rag.training.metrics import summarize, training_counts
from rex_rag.training.trainer import REXRAGTrainer

GROUP = 4  # two originals, two probe slots
QUESTIONS = [{"question": f"q{index}", "prompt": index, "golden_answers": ["oak"]} for index in range(8)]


def dynamic(sampler, questions=QUESTIONS, **settings):
    fresh = FreshQuestions(Dataset.from_list(questions), seed=0)
    return DynamicSampler(sampler, encode=lambda prompt: [5, prompt], group=GROUP, fresh=fresh, **settings)


def batch_of(*indices):
    """Rows and prompt ids of a process's share of a batch."""
    examples = [dict(QUESTIONS[index]) for index in indices for _ in range(GROUP)]
    return examples, [[5, example["prompt"]] for example in examples]


def asked(generator, call):
    """Which question every row of a generate call asked."""
    return [row[1] for row in generator.seen[call]]


def fresh_indices(count, avoided, step):
    rows = FreshQuestions(Dataset.from_list(QUESTIONS), seed=0).draw(count, {f"q{index}" for index in avoided}, step)
    return [row["prompt"] for row in rows]


def test_fresh_questions_are_a_function_of_seed_and_step():
    fresh = FreshQuestions(Dataset.from_list(QUESTIONS), seed=0)
    avoided = {"q0", "q1"}
    first = [row["question"] for row in fresh.draw(3, avoided, (7, 0, 1))]
    assert len(set(first)) == 3 and avoided == {"q0", "q1", *first}
    assert first == [row["question"] for row in fresh.draw(3, {"q0", "q1"}, (7, 0, 1))]
    others = [[row["question"] for row in fresh.draw(3, {"q0", "q1"}, step)] for step in ((7, 0, 2), (8, 0, 1))]
    assert first not in others and others[0] != others[1]
    assert len(fresh.draw(9, avoided, (7, 0, 1))) == 3  # all that is left
    assert avoided == {row["question"] for row in QUESTIONS} and fresh.draw(1, avoided, (7, 0, 1)) == []


def test_groups_without_signal_are_replaced(word_tokenizer, retriever):
    """Originals of q0 and q1 are all wrong, of q2 all right; of four probes 0.5 x 6 are kept, and one rescues q0.

    So q0 stays, with two probes. Of the fresh groups' three probes one may be kept, since the batch holds six
    originals and two probes already; it rescues the second fresh question, the first has right and wrong originals.
    Then no group lacks signal.
    """
    turns = [
        [WRONG, WRONG, WRONG, WRONG, RIGHT, RIGHT],
        [RIGHT, WRONG, WRONG],
        [WRONG, RIGHT, WRONG, WRONG],
        [RIGHT],
    ]
    scores = iter([[-1.0, -2.0, -3.0, -4.0], [-3.0, -2.0, -1.0]])
    sampler = sampler_for(word_tokenizer, retriever, turns, score=lambda probes: next(scores))
    examples, prompt_ids = batch_of(0, 1, 2)
    sampled = dynamic(sampler, rounds=2).sample(examples, prompt_ids, step=3, keep_ratio=0.5)
    one, two = fresh_indices(2, {0, 1, 2}, (3, 0, 1))
    assert not {one, two} & {0, 1, 2}
    assert [example["question"] for example in examples] == ["q0"] * 4 + [f"q{one}"] * 4 + [f"q{two}"] * 4
    assert prompt_ids == [[5, 0]] * 4 + [[5, one]] * 4 + [[5, two]] * 4
    generator = sampler.agent.driver.generator(())
    assert asked(generator, 0) == [0, 0, 1, 1, 2, 2] and asked(generator, 2) == [one, one, two, two]
    assert not generator.turns  # no call more

    batch = sampled.batch
    assert batch.correct == [False, False, False, True, False, False]
    assert [probe.parent for probe in batch.probes] == [0, 1, 5] and batch.probe_correct == [True, False, True]
    rows = lay_out(batch, 12, GROUP, 2)
    assert [row is not None and row.prompt_ids[1] for row in rows] == [
        *(0, 0, 0, 0),
        *(one, one, False, False),
        *(two, two, two, False),
    ]
    # Originals that failed: q0's two, one and two of the fresh ones'; three probes of nine rows.
    assert (batch.global_originals, batch.global_failed, batch.global_kept) == (6, 5, 3)
    assert batch.failure_rate == 5 / 6 and batch.mixing_share == 3 / 9
    discarded = [*sampled.discarded.originals, *sampled.discarded.probes]
    assert len(discarded) == 5 and [probe.parent for probe in sampled.discarded.probes] == [0]
    assert sampled.metrics == {
        "dynamic_sampling/rounds": 1.0,
        "dynamic_sampling/replaced": 2.0,
        "dynamic_sampling/discarded_tokens": float(sum(row.model_length for row in discarded)),
    }

    # Rates are over all that was sampled: ten originals and four probes of five questions.
    summary = summarize([training_counts(batch, sampled.discarded, 2)])
    expected = {
        "em/originals": 3 / 10,
        "em/probes": 2 / 4,
        "dead_end/rate": 3 / 5,
        "dead_end/rescue_rate": 2 / 3,
        "probes/made": 7.0,
        "probes/kept": 4.0,
        "signal/asked": 3 / 5,
        "signal/trained": 1.0,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)


def test_rounds_are_bounded_and_no_question_comes_twice(word_tokenizer, retriever):
    turns = [[WRONG] * 4] * 3
    sampler = sampler_for(word_tokenizer, retriever, turns, probe_probability=0.0)
    examples, prompt_ids = batch_of(0, 1)
    sampled = dynamic(sampler, rounds=2).sample(examples, prompt_ids, step=3, keep_ratio=0.5)
    seen = [question for call in range(3) for question in asked(sampler.agent.driver.generator(()), call)[::2]]
    assert len(seen) == len(set(seen)) == 6
    assert sampled.metrics["dynamic_sampling/rounds"] == 2 and sampled.metrics["dynamic_sampling/replaced"] == 4
    assert summarize([training_counts(sampled.batch, sampled.discarded, 2)])["signal/trained"] == 0
    assert sampled.batch.global_failed == 4  # of the batch that is left, not of the twelve originals


def test_a_training_set_without_other_questions_is_asked_as_it_is(word_tokenizer, retriever, caplog):
    sampler = sampler_for(word_tokenizer, retriever, [[WRONG] * 6, [WRONG] * 2], probe_probability=0.0)
    examples, prompt_ids = batch_of(0, 1, 2)
    with caplog.at_level(logging.WARNING):
        sampled = dynamic(sampler, questions=QUESTIONS[:4], rounds=3).sample(
            examples, prompt_ids, step=3, keep_ratio=0.5
        )
    # The one other question takes the first group's place.
    assert [example["question"] for example in examples[::GROUP]] == ["q3", "q1", "q2"]
    assert sampled.metrics["dynamic_sampling/replaced"] == 1
    assert "3 questions are to be replaced, but the training set holds 1 others" in caplog.text


def test_ranks_make_equally_many_calls_and_ask_what_one_process_asks(word_tokenizer, retriever):
    """Rank 0's two groups lack signal, and one of them after the first round; rank 1's have it from the start."""
    mixed, wrong = [RIGHT, WRONG], [WRONG, WRONG]
    alone = sampler_for(word_tokenizer, retriever, [wrong * 2 + mixed * 2, mixed + wrong, mixed], probe_probability=0)
    examples, prompt_ids = batch_of(0, 1, 2, 3)
    expected = dynamic(alone, rounds=3).sample(examples, prompt_ids, step=3, keep_ratio=0.5)

    ranks, results = TwoRanks(), [None, None]

    def work(rank):
        turns = [[wrong * 2, mixed + wrong, mixed], [mixed * 2, ["x"], ["x"]]][rank]
        gather = ranks.gather(rank)
        sampler = sampler_for(word_tokenizer, retriever, turns, gather=gather, rank=rank, probe_probability=0)
        share = batch_of(*((0, 1), (2, 3))[rank])
        sampled = dynamic(sampler, rounds=3, gather=gather, rank=rank).sample(*share, step=3, keep_ratio=0.5)
        results[rank] = (sampler.agent.driver.generate_calls, share[0], sampled)

    run_on_both(work)
    assert [calls for calls, _, _ in results] == [3, 3]
    questions = [example["question"] for _, rows, _ in results for example in rows]
    assert questions == [example["question"] for example in examples]
    for _, _, sampled in results:
        assert sampled.metrics == expected.metrics and sampled.metrics["dynamic_sampling/replaced"] == 3
        assert (sampled.batch.global_originals, sampled.batch.global_failed) == (8, 4)
    assert expected.batch.global_failed == 4


def test_a_question_rests_as_many_turns_as_it_was_right_in_a_row():
    buffer = DifficultyBuffer(2)
    for all_right in (True, False, True):  # the series begins anew
        buffer.note("easy", all_right)
        assert not buffer.takes_turn_off("easy")
    buffer.note("easy", True)
    buffer.note("other", True)
    assert buffer.resting == {"easy"}
    restored = DifficultyBuffer(2)
    restored.load_state_dict(buffer.state_dict())
    assert [restored.takes_turn_off("easy") for _ in range(3)] == [True, True, False]
    restored.note("easy", True)  # right once more: it rests anew
    assert [restored.takes_turn_off("easy") for _ in range(3)] == [True, True, False]
    restored.note("easy", False)
    restored.note("easy", True)
    assert restored.resting == set()


def test_resting_questions_are_replaced_before_they_are_asked(word_tokenizer, retriever):
    """q1 was all right once; it rests for one turn, and a question that neither rests nor is in the batch is asked."""
    turns = [[RIGHT, WRONG, RIGHT, RIGHT], [WRONG] * 4, [WRONG] * 4]
    sampler = sampler_for(word_tokenizer, retriever, turns, probe_probability=0.0)
    sampling = dynamic(sampler, rest_after=1)
    [resting] = fresh_indices(1, {0, 1}, (1, 0))
    sampling.buffer.note(f"q{resting}", True)  # it would be drawn
    metrics = []
    for step in range(3):
        examples, prompt_ids = batch_of(0, 1)
        metrics.append(sampling.sample(examples, prompt_ids, step=step, keep_ratio=0.5).metrics)
    [other] = fresh_indices(1, {0, 1, resting}, (1, 0))
    seen = [asked(sampler.agent.driver.generator(()), call) for call in range(3)]
    assert seen == [[0, 0, 1, 1], [0, 0, other, other], [0, 0, 1, 1]]
    assert [part["difficulty/rested"] for part in metrics] == [0, 1, 0]
    assert [part["difficulty/resting"] for part in metrics] == [2, 1, 1]


# In the trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


class AnswersByQuestion:
    """Every row of an easy question is right, of a mixed one every other, of any other none, probes included."""

    equal_rows = False

    def __init__(self, tokenizer, easy, mixed):
        self._tokenizer = tokenizer
        self._words = {word: tokenizer.convert_tokens_to_ids(word) for word in (*easy, *mixed)}
        self._easy, self._mixed = easy, mixed

    def generate(self, prompt_ids, max_new_tokens):
        texts = [RIGHT if self._right(row, place) else WRONG for place, row in enumerate(prompt_ids)]
        return ScriptedGenerator(self._tokenizer, [texts]).generate(prompt_ids, max_new_tokens)

    def _right(self, row, place):
        return any(self._words[word] in row for word in self._easy) or (
            place % 2 == 0 and any(self._words[word] in row for word in self._mixed)
        )


EASY, MIXED, HARD = ("owl", "fox", "hill"), ("tree", "gold", "elm"), ("river", "green")


def make_trainer(folder, output, **settings):
    # Every word twice, in other words: two questions each that the generator treats alike.
    questions = [
        {"question": f"{opening} the {word}", "golden_answers": ["oak"]}
        for opening in ("where is", "of is")
        for word in (*EASY, *MIXED, *HARD)
    ]
    sizes = {"num_generations": 4, "num_probe_slots": 2, "per_device_train_batch_size": 16, "max_turns": 0}
    shaped = {"reward_funcs": None, "keep_ratio": 0.25}
    trainer = tiny_trainer(
        folder, output, BM25Retriever(PASSAGES), questions=questions, **{**sizes, **shaped, **settings}
    )
    play(trainer.sampler.agent, AnswersByQuestion(trainer._tokenizer, EASY, MIXED))
    return trainer


def test_rewards_masks_and_tables_are_of_the_questions_that_were_asked(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, dynamic_sampling_rounds=1, log_completions=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    mixed, easy, hard = (
        [row for row in trainer.train_dataset if row["question"].endswith(words)] for words in (MIXED, EASY, HARD)
    )
    before = trainer.state.num_input_tokens_seen
    inputs = [dict(row) for row in (mixed[0], easy[0], hard[0], easy[1]) for _ in range(4)]
    output = trainer._generate_and_score_completions(inputs)
    questions = [row["question"] for row in inputs[::4]]
    assert questions[0] == mixed[0]["question"] and len(set(questions)) == 4
    assert not {row["question"] for row in (easy[0], hard[0], easy[1])} & set(questions)
    filled = [row for row in trainer._slots.rows if row is not None]
    for ids, mask, row in zip(output["prompt_ids"], output["prompt_mask"], filled, strict=True):
        assert ids[mask.bool()].tolist() == row.prompt_ids
    table = trainer._logs
    assert list(table["extra"]["question"]) == [
        example["question"] for example, row in zip(inputs, trainer._slots.rows, strict=True) if row is not None
    ]
    for prompt, question in zip(table["prompt"], table["extra"]["question"], strict=True):
        assert prompt[-1]["content"] == f"Question: {question}"
    right = [float(row.answer == "oak") for row in filled]
    assert list(table["rewards"]["exact_match_reward"]) == right and output["advantages"].size(0) == len(right)
    discarded = trainer._slots.discarded
    assert len(discarded.originals) == 6
    seen = [*filled, *discarded.originals, *discarded.probes]
    tokens = sum(len(row.prompt_ids) + row.completion_length for row in seen)
    assert trainer.state.num_input_tokens_seen - before == tokens
    share = trainer._slots.batch.mixing_share
    assert float(output["mixing_share"]) == share == (len(filled) - 8) / len(filled)


def test_a_step_that_was_begun_before_is_drawn_for_as_if_it_was_not(word_tokenizer, retriever):
    sampler = sampler_for(word_tokenizer, retriever, [[WRONG] * 4] * 6, probe_probability=0.0)
    sampling, rounds = dynamic(sampler, rounds=1), []
    for resumes in (False, False, True):
        if resumes:
            sampling.load_state_dict({})
        examples, prompt_ids = batch_of(0, 1)
        sampling.sample(examples, prompt_ids, step=3, keep_ratio=0.5)
        rounds.append([example["question"] for example in examples])
    assert rounds[0] == rounds[2] != rounds[1]


def test_evaluation_replaces_nothing(folder, tmp_path):
    trainer = make_trainer(
        folder, tmp_path, dynamic_sampling_rounds=3, rest_after=1, per_device_eval_batch_size=4, num_generations_eval=2
    )
    trainer.dynamic_sampler.buffer.note(trainer.train_dataset[0]["question"], True)
    state = trainer.dynamic_sampler.state_dict()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert trainer.sampler.agent.driver.generate_calls == 16 * 2 // 4
    # Six questions all right, six of which one of two rows is: a generate call holds the two rows of two questions.
    assert metrics["eval_em/originals"] == pytest.approx((6 * 2 + 6) / 32)
    assert trainer.dynamic_sampler.state_dict() == state
    assert not [name for name in metrics if "signal" in name or "dynamic" in name or "difficulty" in name]


def test_a_resumed_run_asks_what_the_uninterrupted_one_asks(folder, tmp_path):
    settings = {"dynamic_sampling_rounds": 1, "rest_after": 1, "max_steps": 4, "save_steps": 2, "beta": 0.04}

    def run(output, **kwargs):
        trainer, questions = make_trainer(folder, output, **settings), []
        log = trainer._log_rollouts

        def recording(slots):
            questions.append([example["question"] for example in trainer._examples[::4]])
            log(slots)

        trainer._log_rollouts = recording
        trainer.train(**kwargs)
        rows = [row for row in trainer.state.log_history if "signal/asked" in row]
        names = ("signal/", "dynamic_sampling/", "difficulty/", "em/", "num_tokens")
        return questions, [{key: row[key] for key in row if key.startswith(names)} for row in rows]

    whole, whole_log = run(tmp_path / "whole")
    resumed, resumed_log = run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole[2:] == resumed and whole_log == resumed_log
    assert sum(row["dynamic_sampling/replaced"] for row in whole_log[2:]) > 0
    assert all(len(set(questions)) == 4 for questions in whole)
    assert whole_log[-1]["difficulty/resting"] > 0


def test_a_stream_is_refused_before_the_model_loads(folder, tmp_path):
    stream = Dataset.from_list([{"question": "q", "golden_answers": ["a"]}]).to_iterable_dataset()
    for setting in ("dynamic_sampling_rounds", "rest_after"):
        with pytest.raises(ValueError, match=rf"{setting} is 1.*train_dataset is a stream.*set both to 0"):
            REXRAGTrainer(
                model="does/not-exist",
                args=REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{setting: 1}),
                train_dataset=stream,
                retriever=BM25Retriever(PASSAGES),
                processing_class=make_word_tokenizer(),
            )
