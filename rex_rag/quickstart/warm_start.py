"""Build the quickstart's starting point: a tiny policy that searches, and the world it will be trained on.

A tiny Qwen2 with a tokenizer trained on the spot learns the search protocol from imperfect demonstrations over
several worlds (`rex_rag.quickstart.demonstrations`): it answers one-hop questions of a world it has never seen, and
runs into dead ends on two-hop ones. Training goes on until one-hop questions are answered, or to `--max-steps`.

    python -m rex_rag.quickstart.warm_start --output outputs/quickstart/warm_start

writes the model and tokenizer to `--output` and the unseen world, in the FlashRAG layout, to `--world`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin starve whatever else is running
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from rex_rag.answers import exact_match
from rex_rag.models.generation import TransformersGenerator
from rex_rag.probes.pool import DEFAULT_POOL
from rex_rag.protocols import PROTOCOLS, Protocol, ToolCall, make_protocol
from rex_rag.quickstart.demonstrations import build_demonstrations, tokenize_demonstrations
from rex_rag.quickstart.hopworld import HopQuestion, HopWorldConfig, build_hopworld, hopworld_words, write_hopworld
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.agent import Agent
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.options import OptionParser
from rex_rag.tools import SearchTool

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# As Qwen's, but for the schemas of tools, of which a tiny model is told the names.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool.function.name + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUICKSTART_PROMPT = "Question: {question}"
EVALUATION_BUDGET = RolloutBudget(max_turns=4, max_turn_tokens=64, max_observation_tokens=96, max_sequence_length=512)
# More than the merges there are: training the tokenizer ends when every word it saw is one token.
VOCABULARY_LIMIT = 8192


def build_tokenizer(protocol: Protocol) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (byte-level BPE) in which every word of a HopWorld run, and every tag, is one token.

    It is the same whatever the seed. Loading a Qwen2 model's directory with AutoTokenizer gives this very class, which
    it would not for a word-level one.
    """
    said = "I need the of is \n\n \nDoc Doc 1(Title: 2(Title: 3(Title: 4(Title: 5(Title: ) ). .\n"
    texts = [said, "user", "assistant", protocol.template, protocol.default_template(), protocol.default_feedback()]
    call = protocol.write_call(ToolCall("search", {"query": ""}))
    texts += [*DEFAULT_POOL, *([] if protocol.stop_strings else ["system", call, call.replace("}", '"}')])]
    tags = re.compile("|".join(map(re.escape, protocol.marks)))
    corpus = [piece for text in texts for piece in tags.split(text)] + [f" {word}" for word in hopworld_words()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_LIMIT,
            min_frequency=1,
            special_tokens=[END_OF_TEXT],
            # All 256 bytes, so that no character of a text is ever lost.
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learned = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    # Ordinary tokens, not special ones: a decoded trajectory must show them.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in protocol.marks])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, hidden_size: int, layers: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights; about 0.1 million parameters at hidden size 64 and 2 layers."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            # Heads of 32: the smallest size that vLLM's kernels take.
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            # This and Adam's beta2 of 0.98 halve the steps that a model this small needs.
            initializer_range=0.06,
        )
    )


@torch.no_grad()
def begin_by_copying(model: Qwen2ForCausalLM) -> None:
    """Attention that looks for its own token and passes on what it sees (mimetic initialization, arXiv 2305.09828).

    Finding the way from random weights to copying a name is what takes longest, and on some seeds thousands of steps.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        for one in (attention.q_proj, attention.v_proj):
            torch.nn.init.orthogonal_(one.weight, gain=0.5**0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def training_rows(args: argparse.Namespace, tokenizer: Qwen2Tokenizer, protocol: Protocol) -> list[dict]:
    """Tokenised demonstrations over the training worlds, whose seeds follow that of the unseen world."""
    rows = []
    for seed in range(args.seed + 1, args.seed + 1 + args.worlds):
        questions = (args.questions_per_world // 3, 2 * args.questions_per_world // 3, 0)
        world = build_hopworld(HopWorldConfig(seed=seed, train_questions=questions, test_questions=(0, 0, 0)))
        demonstrations = build_demonstrations(
            world.train,
            BM25Retriever(world.passages),
            wrong_rate=args.wrong_rate,
            top_k=args.top_k,
            seed=seed,
            doubts=DEFAULT_POOL,
            doubt_rate=args.doubt_rate,
            doubt_wrong_rate=args.doubt_wrong_rate,
            protocol=protocol,
        )
        rows += [dict(row) for row in tokenize_demonstrations(demonstrations, tokenizer, protocol)]
    return rows


class Examination:
    """Exact match of a model on questions of the unseen world, by rollouts with the real engine."""

    def __init__(self, args: argparse.Namespace, world, tokenizer: Qwen2Tokenizer, protocol: Protocol) -> None:
        self.tools = [SearchTool(BM25Retriever(world.passages), args.top_k)]
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.budget = RolloutBudget(**{**_fields(EVALUATION_BUDGET), "top_k": args.top_k})
        # Training questions: the test split stays unseen by every decision taken here.
        self.questions = {
            hops: [question for question in world.train if question.hops == hops][: args.check_questions]
            for hops in (1, 2)
        }

    def exact_match(self, model: Qwen2ForCausalLM, hops: int, *, greedy: bool = False) -> float:
        questions = self.questions[hops]
        answers = self._answers(model, questions, greedy)
        return sum(
            exact_match(answer, question.golden_answers) for answer, question in zip(answers, questions, strict=True)
        ) / len(questions)

    def _answers(self, model: Qwen2ForCausalLM, questions: list[HopQuestion], greedy: bool) -> list[str | None]:
        temperature = 0.0 if greedy else 1.0
        agent = Agent(
            lambda stop: TransformersGenerator(model, self.tokenizer, temperature=temperature, stop_strings=stop),
            self.tools,
            self.tokenizer,
            self.protocol,
            self.budget,
        )
        prompts = [agent.script.encode(question.question) for question in questions]
        was_training = model.training
        model.eval()
        try:
            return [trajectory.answer for trajectory in agent.rollout(prompts)]
        finally:
            model.train(was_training)


class DemonstrationTrainer(SFTTrainer):
    """TRL's trainer, with logits at the labelled tokens alone: prompts and passages are most of a row."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))[0]
        targets = inputs["labels"][:, 1:]
        labelled = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][labelled]), targets[labelled])
        return (loss, None) if return_outputs else loss


class StopWhenGood(TrainerCallback):
    """Draws the progress bar and ends training at the first check in which one-hop questions are answered."""

    def __init__(self, args: argparse.Namespace, examination: Examination) -> None:
        self.args = args
        self.examination = examination
        self.score: float | None = None  # of the last check
        self.bar: tqdm  # while it trains

    def on_train_begin(self, args, state, control, **kwargs):
        # Nobody knows how many it will be, so no share of them is shown.
        self.bar = tqdm(desc=f"warm start, {state.max_steps} steps at most", unit=" steps", mininterval=1.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            checked = "" if self.score is None else f", one-hop EM {self.score:.2f} of {self.args.target:.2f}"
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}{checked}", refresh=False)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update(1)
        past = state.global_step - self.args.check_from
        if past >= 0 and past % self.args.check_every == 0:
            self.score = self.examination.exact_match(model, hops=1)
            control.should_training_stop |= self.score >= self.args.target

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def learning_rate_factor(step: int, decay_steps: int) -> float:
    """Warm-up over 50 steps, then linear decay to a twentieth, where it stays for a run that needs longer.

    Copying names without a slip, which is all that is left to learn by then, wants small steps.
    """
    return min((step + 1) / 50, max(0.05, 1 - step / decay_steps))


def batches_of_like_length(rows: list[dict], steps: int, batch_size: int, seed: int) -> list[int]:
    """Indices of rows in the order of `steps` batches, in which rows are about as long: a third less padding.

    Batches are shuffled. transformers' `group_by_length` gives long ones first, again and again; the policy did not
    learn to copy with it (docs/experiments.md, 2026-11-27).
    """
    found: list[list[int]] = []
    draw, group = random.Random(f"batches/{seed}"), 20 * batch_size
    while len(found) < steps:
        order = draw.sample(range(len(rows)), len(rows))
        groups = [order[at : at + group] for at in range(0, len(order), group)]
        batches = []
        for one in groups:
            one.sort(key=lambda index: len(rows[index]["input_ids"]))
            batches += [one[at : at + batch_size] for at in range(0, len(one), batch_size)]
        batches = [batch for batch in batches if len(batch) == min(batch_size, len(rows))]
        draw.shuffle(batches)
        found += batches
    return [index for batch in found[:steps] for index in batch]


def supervise(
    model,
    tokenizer,
    rows: list[dict],
    callback: TrainerCallback,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    decay_steps: int,
    logging_steps: int,
    seed: int,
) -> int:
    """Train on rows of `input_ids` and `labels` on the CPU; returns the steps taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, decay_steps))
    with tempfile.TemporaryDirectory() as scratch:  # nothing is saved there, but the trainer makes it
        trainer = DemonstrationTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                max_grad_norm=1.0,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                train_sampling_strategy="sequential",
                save_strategy="no",
                logging_steps=logging_steps,
                report_to=[],
                disable_tqdm=True,
                seed=seed,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows).select(batches_of_like_length(rows, steps, batch_size, seed)),
            processing_class=tokenizer,
            callbacks=[callback],
            optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.state.global_step


def train(args: argparse.Namespace, model, tokenizer, rows: list[dict], examination: Examination) -> tuple[int, float]:
    """Supervised training; returns the steps taken and the sampled one-hop exact match at the last check."""
    callback = StopWhenGood(args, examination)
    steps = supervise(
        model,
        tokenizer,
        rows,
        callback,
        steps=args.max_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        decay_steps=args.decay_steps,
        logging_steps=25,
        seed=args.seed,
    )
    if callback.score is None or steps == args.max_steps:
        callback.score = examination.exact_match(model, hops=1)
    return steps, callback.score


def save(model, tokenizer, figures: dict, output: Path) -> None:
    """Write everything aside, then rename, so that `output` is never half a model."""
    aside = output.with_name(f".{output.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "warm_start.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        aside.rename(output)
        shutil.rmtree(old)
    else:
        aside.rename(output)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/quickstart/warm_start"), help="directory of model and tokenizer")
    add("--world", type=Path, help="directory of the unseen world (default: `world` beside --output)")
    add("--seed", type=int, default=0, help="seed of the unseen world; training worlds have the seeds after it")
    add("--worlds", type=int, default=8, help="training worlds")
    add("--questions-per-world", type=int, default=3900, help="a third with one hop, two thirds with two")
    add("--train-questions", type=int, nargs=3, default=(400, 800, 0), metavar="N", help="unseen world, by hops")
    add("--test-questions", type=int, nargs=3, default=(100, 100, 100), metavar="N", help="unseen world, by hops")
    add("--wrong-rate", type=float, default=0.9, help="share of two-hop demonstrations that stop at the dead end")
    add("--doubt-rate", type=float, default=0.4, help="share of demonstrations with an exploration prompt in them")
    add("--doubt-wrong-rate", type=float, default=0.5, help="--wrong-rate of the demonstrations with one")
    add("--top-k", type=int, default=1, help="passages a search")
    add(
        "--prompt-template",
        default=QUICKSTART_PROMPT,
        metavar="TEXT",
        help="text with {question}, or a file of it, as in the recipe",
    )
    add("--protocol", default="search_r1", choices=list(PROTOCOLS), help="what calls and answers are written in")
    add("--hidden-size", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--learning-rate", type=float, default=4e-3)
    add("--decay-steps", type=int, default=600, help="steps over which the learning rate falls")
    add("--batch-size", type=int, default=48)
    add("--max-steps", type=int, default=1800, help="end here even if the target is not reached, with a warning")
    add("--target", type=float, default=0.95, help="sampled one-hop exact match that ends training")
    add("--check-from", type=int, default=350, help="first step at which the target is checked")
    add("--check-every", type=int, default=50, help="steps between checks")
    add("--check-questions", type=int, default=128, help="questions a check")
    args = parser.parse_args(argv)
    args.world = args.world or args.output.parent / "world"
    if "{question}" not in args.prompt_template:
        if not Path(args.prompt_template).is_file():
            parser.error(
                f"--prompt-template {args.prompt_template!r} holds no {{question}} and is not a file; give a "
                "text with {question} where the question goes, or the path of a file with one"
            )
        args.prompt_template = Path(args.prompt_template).read_text(encoding="utf-8")
    return args


def run(args: argparse.Namespace) -> dict:
    """Everything; returns the figures that are also saved beside the model."""
    started = time.perf_counter()
    set_seed(args.seed)
    world = build_hopworld(
        HopWorldConfig(
            seed=args.seed, train_questions=tuple(args.train_questions), test_questions=tuple(args.test_questions)
        )
    )
    write_hopworld(world, args.world)
    protocol = make_protocol(args.protocol, template=args.prompt_template)
    tokenizer = build_tokenizer(protocol)
    rows = training_rows(args, tokenizer, protocol)
    model = build_model(tokenizer, args.hidden_size, args.layers)
    begin_by_copying(model)
    examination = Examination(args, world, tokenizer, protocol)
    prepared = time.perf_counter()
    steps, one_hop = train(args, model, tokenizer, rows, examination)
    trained = time.perf_counter()
    figures = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "demonstrations": len(rows),
        "steps": steps,
        "one_hop_em": {"sampled": one_hop, "greedy": examination.exact_match(model, 1, greedy=True)},
        "two_hop_em": {
            "sampled": examination.exact_match(model, 2),
            "greedy": examination.exact_match(model, 2, greedy=True),
        },
        "seconds": {"preparation": round(prepared - started, 1), "training": round(trained - prepared, 1)},
    }
    save(model, tokenizer, figures, args.output)
    figures["seconds"]["total"] = round(time.perf_counter() - started, 1)
    if one_hop < args.target:
        logging.warning(
            "sampled one-hop exact match is %.2f after %d steps, below the target of %.2f: the policy has not learned "
            "to search well, and training it further will be slow. Raise --max-steps or choose another --seed",
            one_hop,
            steps,
            args.target,
        )
    return figures


def _fields(budget: RolloutBudget) -> dict:
    return {name: getattr(budget, name) for name in budget.__dataclass_fields__}


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    print(json.dumps(run(args), indent=2))
    print(f"model and tokenizer: {args.output}\nworld: {args.world}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
