"""Llama 3, Qwen3, Gemma 3 and Mistral: prompts, stops, masks and probes with their own tokenizers and templates."""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, WINDOW, mistral_tokenizer
from parts import PASSAGES, STOP_STRINGS, ScriptedGenerator, play, token_gradients
from tiny_training import write_tiny_recipe
from transformers import GenerationConfig, LlamaTokenizer

from rex_rag.cli import main
from rex_rag.commands.doctor import save_stand_in
from rex_rag.evaluation.methods import Toolbox, make_method
from rex_rag.evaluation.records import Question
from rex_rag.evaluation.token_reliability import token_texts
from rex_rag.models.language_model import end_token_ids
from rex_rag.probes.pool import DEFAULT_POOL
from rex_rag.protocols import ToolCall, ToolCalls
from rex_rag.protocols.inert import control_tokens
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.agent import Agent
from rex_rag.support.tokenization import decode_on, encode_on, open_tokenizer
from rex_rag.tools import SearchTool
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import SegmentKind

NAMED = {family.name: family for family in FAMILIES}
QUESTIONS = [
    {"question": "where is the owl", "golden_answers": ["oak"]},
    {"question": "where is the red, red fox", "golden_answers": ["hill"]},
]
SEARCH = "<think> so </think> <search> owl </search>"
RIGHT, WRONG = "<think> so </think> <answer> oak </answer>", "<think> Maybe </think> I am sure.<answer> red </answer>"
# Two originals of two questions; three answered wrongly and are probed, two probes are kept.
TURNS = [[SEARCH, WRONG, WRONG, "<answer> red </answer>"], [RIGHT], [" so </think> <answer> green </answer>"] * 2]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.save(tmp_path_factory.mktemp(family.name))


@pytest.fixture(scope="module")
def trainer(family, folder, tmp_path_factory) -> REXRAGTrainer:
    """From the model's folder alone, as `rex_rag.train` does it."""
    output = tmp_path_factory.mktemp("out")
    (output / "prompt.txt").write_text("Question: {question}")
    settings = {
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 1, "learning_rate": 1e-3},
        **{"num_generations": 4, "num_probe_slots": 2, "probe_probability": 1.0, "keep_ratio": 0.5},
        **{"per_device_train_batch_size": 8, "shuffle_dataset": False, "beta": 0.04, "epsilon": 0.9},
        **{"max_prompt_length": 400, "max_turn_tokens": 100, "max_sequence_length": 900, "retrieval_top_k": 1},
        **{"prompt_template": str(output / "prompt.txt"), "chat_template_kwargs": family.settings},
    }
    trainer = REXRAGTrainer(
        model=str(folder),
        args=REXRAGConfig(output_dir=str(output), **settings),
        train_dataset=Dataset.from_list(QUESTIONS),
        retriever=BM25Retriever(PASSAGES),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def prompts(trainer) -> list[list[int]]:
    return [trainer._encode_prompt(prompt) for prompt in trainer.train_dataset["prompt"]]


def test_a_prompt_is_the_templates_with_one_begin_token(family, trainer, folder):
    tokenizer = open_tokenizer(str(folder))
    toolbox = Toolbox(tokenizer, lambda stop: None, chat_template_kwargs=family.settings)
    method = make_method("rex_rag", "Question: {question}")
    for row, ids in zip(QUESTIONS, prompts(trainer), strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert text == family.prompt.format(said=f"Question: {row['question']}")
        if tokenizer.bos_token_id is not None:
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert toolbox.encode_chat(method.prompt_text(Question("1", row["question"], ("x",)))) == ids
    control = control_tokens(tokenizer)
    hostile = toolbox.encode_chat(method.prompt_text(Question("2", "".join(control), ("x",))))
    for token in tokenizer.convert_tokens_to_ids(control):
        assert hostile.count(token) == ids.count(token)


@contextmanager
def writing(model, rows):
    """Have a model write these ids, row by row, whatever it is asked."""
    steps = itertools.count()

    def write(module, args, output):
        step = next(steps)
        for row, ids in enumerate(rows):
            output.logits[row, -1] = -math.inf
            output.logits[row, -1, ids[min(step, len(ids) - 1)]] = 0

    handle = model.register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


def test_each_row_ends_at_its_own_stop_string_or_end_token(family, trainer):
    tokenizer = trainer.tokenizer
    texts = [f"{SEARCH} and more", *(f"the tree{end} and more" for end in family.ends), "the tree of the hill " * 9]
    rows = encode_on(tokenizer, texts)
    generator = trainer.evaluator.driver.generator(STOP_STRINGS)
    with writing(trainer.model, rows):
        written = generator.generate((prompts(trainer) * 2)[: len(rows)], max_new_tokens=30)
    through_tag = next(end for end in itertools.count(1) if "</search>" in decode_on(tokenizer, [rows[0][:end]])[0])
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    lengths = [through_tag, *(row.index(end) + 1 for row, end in zip(rows[1:-1], ends, strict=True)), 30]
    assert [one.ids for one in written] == [row[:length] for row, length in zip(rows, lengths, strict=True)]


def log_probs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(T, V) at the places of a completion, in one pass without padding, cache or other rows."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def test_padding_and_cache_change_nothing_that_is_generated(trainer):
    asked = prompts(trainer)
    assert len(asked[0]) != len(asked[1])
    written = trainer.evaluator.driver.generator(()).generate(asked, max_new_tokens=2 * WINDOW)
    for prompt, row in zip(asked, written, strict=True):
        logps = log_probs(trainer.model, prompt, row.ids)
        likeliest = logps.max(dim=1).values
        assert torch.allclose(logps.gather(1, torch.tensor(row.ids)[:, None])[:, 0], likeliest, atol=1e-4)


def scored(trainer):
    play(trainer.sampler.agent, ScriptedGenerator(trainer.tokenizer, TURNS))
    trainer.model.train()
    rows = [dict(row) for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def test_a_step_trains_what_was_sampled_and_a_probe_keeps_its_originals_ids(trainer):
    inputs = scored(trainer)
    rows, batch = trainer._slots.rows, trainer._slots.batch
    assert (batch.global_originals, batch.global_made, batch.global_kept) == (4, 3, 2)
    for row in filter(None, rows):
        [seen] = decode_on(trainer.tokenizer, [row.completion_ids])
        assert "".join(segment.text for segment in row.segments) == seen
    assert rows[0].segments[1].text == "\n\n<information>Doc 1(Title: Owl) the owl is in the oak</information>\n\n"
    for probe in batch.probes:
        original = batch.originals[probe.parent]
        assert probe.completion_ids[: probe.cut] == original.completion_ids[: probe.cut]
        kept = original.segments[0].text[: original.answer_span.offset]
        shown = "".join(segment.text for segment in probe.segments[: probe.probe_segment + 1])
        assert any(shown == kept + prompt for prompt in DEFAULT_POOL)
        assert math.isclose(sum(probe.pool_logprobs), -math.log(len(DEFAULT_POOL)), abs_tol=1e-5)
    inserted = [probe.segments[probe.probe_segment].text for probe in batch.probes]
    assert any(text.endswith(DEFAULT_POOL) and text.partition("<think>")[0].strip() for text in inserted)

    with torch.no_grad():  # away from the reference, so that the KL has a gradient
        for parameter in trainer.model.parameters():
            parameter.mul_(1.01)
    logps, gradient = token_gradients(trainer, inputs)
    trainer.model.zero_grad()
    kinds = inputs["segment_kinds"]
    assert {SegmentKind.POLICY, SegmentKind.INFORMATION, SegmentKind.PROBE} <= set(kinds.flatten().tolist())
    trained = (kinds == SegmentKind.POLICY) | (kinds == SegmentKind.PROBE)
    assert (gradient[~trained] == 0).all() and (gradient[trained] != 0).all()
    for place, row in enumerate(filter(None, rows)):
        ids = torch.tensor(row.completion_ids)
        assert kinds[place, : len(ids)].tolist() == row.kinds
        alone = log_probs(trainer.model, row.prompt_ids, row.completion_ids).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(logps[place, : len(ids)].float(), alone, atol=1e-4)


def test_a_training_step_is_taken_and_the_model_keeps_its_end_tokens(family, trainer, tmp_path):
    play(trainer.sampler.agent, ScriptedGenerator(trainer.tokenizer, TURNS))
    trainer.train()
    [row] = [row for row in trainer.state.log_history if "loss" in row]
    assert (row["probes/made"], row["probes/kept"]) == (3, 2)
    assert math.isfinite(row["loss"]) and math.isfinite(row["kl"]) and row["grad_norm"] > 0
    trainer.save_model(str(tmp_path))
    kept = end_token_ids(open_tokenizer(str(tmp_path)), GenerationConfig.from_pretrained(tmp_path))
    assert set(trainer.tokenizer.convert_tokens_to_ids(list(family.ends))) <= set(kept)


CALLED = ("qwen3", "qwen3_no_thinking", "qwen3_instruct_2507")


def test_tool_calls_are_refused_where_a_template_has_no_such_calls(family, folder):
    tokenizer = open_tokenizer(str(folder))
    if family.name in CALLED:
        framing = ToolCalls().framing(tokenizer, family.settings)
        assert framing.tail.endswith(family.prompt.partition("{said}")[2])
        return
    with pytest.raises(ValueError, match=r"'tool_calls'.*'search_r1'"):
        ToolCalls().framing(tokenizer, family.settings)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507"])
def test_a_rollout_of_tool_calls_is_what_the_template_would_write(name, tmp_path):
    tokenizer = open_tokenizer(str(NAMED[name].save(tmp_path)))
    protocol = ToolCalls(template="Question: {question}")
    said = "<think>\nlook\n</think>\n\n" + protocol.write_call(ToolCall("search", {"query": "owl"}))
    generator = ScriptedGenerator(tokenizer, [[f"{said}<|im_end|>"], ["<answer> oak</answer><|im_end|>"]])
    agent = Agent(lambda stop: generator, [SearchTool(BM25Retriever(PASSAGES), 1)], tokenizer, protocol)
    [trajectory] = agent.rollout([agent.script.encode("where")])
    assert trajectory.answer == "oak" and trajectory.invalid_actions == 0
    messages = [
        {"role": "user", "content": "Question: where"},
        {"role": "assistant", "content": said},
        {"role": "tool", "content": "Doc 1(Title: Owl) the owl is in the oak"},
    ]
    before_the_answer = trajectory.prompt_ids + trajectory.segments[0].ids + trajectory.segments[1].ids
    rendered = tokenizer.apply_chat_template(
        messages, tools=protocol.schemas, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(before_the_answer) == rendered


@pytest.mark.parametrize(
    ("name", "settings", "problem", "ends_with"),
    [
        ("llama3_2", {}, False, "and the question"),
        ("qwen3", {}, False, "and the question"),
        ("qwen3_5_think", {}, False, "begins inside a thought"),
        ("qwen3_5_think", {"chat_template_kwargs": {"enable_thinking": False}}, False, "and the question"),
        ("gemma3", {"protocol": "tool_calls"}, True, "protocol 'search_r1'"),
        ("mistral", {"max_observation_tokens": 8}, True, "better several hundred"),
    ],
)
def test_the_doctor_tells_what_a_template_does(name, settings, problem, ends_with, tmp_path, capsys):
    model = {"model_name_or_path": str(NAMED[name].save(tmp_path / name)), "max_sequence_length": 400}
    recipe = write_tiny_recipe(tmp_path, **model | settings)
    assert main(["doctor", str(recipe), "--no_dry_run"]) == problem
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "tokenizer"]
    assert line.startswith("PROBLEM" if problem else "ok") and line.endswith(ends_with)


def test_the_doctors_stand_in_keeps_the_tokenizer(folder, tmp_path):
    tokenizer = open_tokenizer(str(folder))
    save_stand_in(str(tmp_path), tokenizer, 100)
    again = open_tokenizer(str(tmp_path))
    text = f"{WRONG} {tokenizer.eos_token}\n[INST] é"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)


@pytest.mark.parametrize("legacy", [False, True])
def test_text_goes_on_without_a_blank_that_nobody_wrote(legacy):
    """`legacy` as in Mistral's first models and Llama 2, which put the blank behind control tokens too."""
    made = mistral_tokenizer()
    vocabulary, merges = made._vocab, made._merges
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)
    for text in ("\n\n<information>Doc", ".<think> Wait", " oak", "é", ""):
        [ids] = encode_on(tokenizer, [text])
        [before] = encode_on(tokenizer, ["tree"])
        assert tokenizer.decode(before + ids) == "tree" + text
        assert decode_on(tokenizer, [ids]) == [text]
        assert "".join(token_texts(tokenizer, ids)).replace("\ufffd", "") == text
    assert tokenizer.decode(tokenizer("tree", add_special_tokens=False)["input_ids"] * 2) == "tree tree"
