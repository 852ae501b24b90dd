"""Build a tiny policy that speaks the search protocol on real text: enough to run a recipe on a CPU, not to answer.

A tiny Qwen2 with a byte-level tokenizer trained on the corpus learns from scripted demonstrations over real questions
and real search results: it searches for words of the question, sometimes for the title that it found as well, and
answers with the title of the first passage, or with a coin's yes or no where the question asks for one. Most of these
answers are wrong, so that a run has failed originals to probe.

    python -m rex_rag.quickstart.tiny_model --questions data/hotpotqa_sample/other_questions.jsonl

Prompt, passages and token budgets are those of `--recipe`, and model and tokenizer are written where it will look for
them. The demonstrations are run through the rollout engine itself, so their ids are the ones it builds in training.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from tokenizers import AddedToken
from tqdm.auto import tqdm
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer, TrainerCallback, set_seed
from trl import ModelConfig, TrlParser

from rex_rag.data.corpus import read_corpus
from rex_rag.data.qa import QuestionArguments, load_questions
from rex_rag.probes.pool import DEFAULT_POOL
from rex_rag.protocols import Protocol
from rex_rag.protocols.inert import SEARCH_TAGS
from rex_rag.quickstart.warm_start import CHAT_TEMPLATE, build_model, build_tokenizer, save, supervise
from rex_rag.retrieval.base import Retriever, checked_search
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.support.options import OptionParser
from rex_rag.support.recipes import FOLDER
from rex_rag.tools import SearchTool
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.demonstrations import Turns, play, row_of
from rex_rag.types import Trajectory

RECIPE = FOLDER / "hotpotqa_sample" / "rex_rag.yaml"
SECOND_SEARCH_RATE = 0.25
QUERY_WORDS = 16
YES_NO_OPENINGS = ("Are ", "Is ", "Was ", "Were ", "Do ", "Does ", "Did ", "Have ", "Has ")
LOOK_UP = "<think> I do not know this yet, so I look it up.</think><search> {query}</search>"
LOOK_AGAIN = "<think> I found {title}. I look for more.</think><search> {title}</search>"
ANSWER = "<think> I found {title}. I can answer.</think><answer> {answer}</answer>"
DEMONSTRATED_TURNS = (LOOK_UP, LOOK_AGAIN, ANSWER)


def train_tokenizer(corpus: Sequence[str], questions: Sequence[str], protocol: Protocol, size: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (byte-level BPE) trained on real text, in which every tag is one token."""
    said = [protocol.template, protocol.default_feedback(), *DEFAULT_POOL, *DEMONSTRATED_TURNS]
    for tag in protocol.marks:
        said = [text.replace(tag, "") for text in said]
    # The protocol's own words recur in every rollout, so they are made to count.
    texts = [*corpus, *(questions[:2000]), *said * 50]
    tokenizer = build_tokenizer(protocol).train_new_from_iterator(
        texts, size - len(protocol.marks), show_progress=False
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in protocol.marks])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True, slots=True)
class DemonstrationRows:
    """Demonstrations as rows of `input_ids` and `labels`, -100 on all but model-written tokens.

    `openings` are the first turns alone, with labels on the query and its closing tag. `left_out` counts questions
    that gave no row, since a turn of theirs is beyond the budget.
    """

    rows: list[dict[str, list[int]]]
    openings: list[dict[str, list[int]]]
    left_out: int


def demonstrate(
    questions: Sequence[str], retriever: Retriever, tokenizer: Qwen2Tokenizer, config: REXRAGConfig, seed: int
) -> DemonstrationRows:
    """Scripted rollouts over questions, in an order drawn from the seed."""
    draw = random.Random(f"tiny model/{seed}")
    queries = [" ".join(question.rstrip(" ?").split()[:QUERY_WORDS]) for question in questions]
    found = [ranking[0].title for ranking in checked_search(retriever, queries, 1)]
    scripts: dict[int, list[Turns]] = {2: [], 3: []}
    for question, query, title in zip(questions, queries, found, strict=True):
        turns = [LOOK_UP.format(query=query)]
        if draw.random() < SECOND_SEARCH_RATE:
            turns.append(LOOK_AGAIN.format(title=title))
        answer = draw.choice(("yes", "no")) if question.startswith(YES_NO_OPENINGS) else title
        turns.append(ANSWER.format(title=title, answer=answer))
        scripts[len(turns)].append(Turns(question, (), tuple(turns)))
    tools = [SearchTool(retriever, config.retrieval_top_k)]
    played = play([*scripts[2], *scripts[3]], tools, tokenizer, config.agent_protocol(), config.rollout_budget())
    trajectories = [trajectory for trajectory in played if trajectory is not None]
    draw.shuffle(trajectories)
    search_id = tokenizer.convert_tokens_to_ids(SEARCH_TAGS[0])
    return DemonstrationRows(
        rows=[row_of(trajectory) for trajectory in trajectories],
        openings=[_opening(trajectory, search_id) for trajectory in trajectories],
        left_out=len(questions) - len(trajectories),
    )


def _opening(trajectory: Trajectory, search_id: int) -> dict[str, list[int]]:
    context, turn = trajectory.prompt_ids, trajectory.segments[0].ids
    query = turn.index(search_id) + 1
    return {"input_ids": context + turn, "labels": [-100] * (len(context) + query) + turn[query:]}


class ProgressBar(TrainerCallback):
    """One bar with the loss, in the place of the trainer's dictionaries."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loss = float("nan")

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", mininterval=1.0, dynamic_ncols=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self.bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of supervised training."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float


def train(args: argparse.Namespace, model: Qwen2ForCausalLM, tokenizer, rows: list[dict], phase: Phase) -> float:
    """Supervised training on model-written tokens; returns the last logged loss."""
    progress = ProgressBar(phase.name)
    supervise(
        model,
        tokenizer,
        rows,
        progress,
        steps=phase.steps,
        batch_size=phase.batch_size,
        learning_rate=phase.learning_rate,
        decay_steps=phase.steps,
        logging_steps=min(10, phase.steps),
        seed=args.seed,
    )
    return progress.loss


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--recipe", type=Path, default=RECIPE, help="the run that the model is for")
    add("--questions", nargs="+", metavar="FILE", help="questions to demonstrate on (default: the recipe's)")
    add("--corpus", nargs="+", metavar="FILE", help="passages to search and to train the tokenizer on (as above)")
    add("--output", type=Path, help="directory of model and tokenizer (default: the recipe's model_name_or_path)")
    add("--seed", type=int, default=0)
    add("--max-steps", type=int, default=1440, help="supervised steps; the first five sixths on opening turns alone")
    add("--max-questions", type=int, default=4000, help="use at most so many questions")
    add("--vocabulary", type=int, default=4000, help="tokens of the tokenizer, tags included")
    add("--hidden-size", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--learning-rate", type=float, default=4e-3)
    return parser.parse_args(argv)


def read_recipe(args: argparse.Namespace) -> tuple[QuestionArguments, RetrieverArguments, REXRAGConfig]:
    """What the run will use, with the files named on the command line in the place of the recipe's."""
    parser = TrlParser((QuestionArguments, RetrieverArguments, REXRAGConfig, ModelConfig))
    questions, retrieval, config, model = parser.parse_args_and_config(
        ["--config", str(args.recipe), "--use_cpu", "true"]
    )
    args.output = args.output or Path(model.model_name_or_path)
    if args.questions:
        questions = replace(questions, datasets=args.questions)
    if args.corpus:
        retrieval = replace(retrieval, corpus=args.corpus)
    return questions, retrieval, config


def run(args: argparse.Namespace) -> dict:
    """Everything; returns the figures that are also saved beside the model."""
    started = time.perf_counter()
    set_seed(args.seed)
    question_arguments, retrieval, config = read_recipe(args)
    questions = load_questions(question_arguments)["question"][: args.max_questions]
    retriever = load_retriever(retrieval)
    passages = [f"{passage.title}\n{passage.text}" for passage in read_corpus(retrieval.corpus)]
    tokenizer = train_tokenizer(passages, questions, config.agent_protocol(), args.vocabulary)
    demonstrations = demonstrate(questions, retriever, tokenizer, config, args.seed)
    model = build_model(tokenizer, args.hidden_size, args.layers)
    prepared = time.perf_counter()
    # A model this small learns to copy words, which is all there is to it, from many short rows first.
    whole = max(1, args.max_steps // 6)
    opening_turns = Phase("opening turns", max(1, args.max_steps - whole), 16, args.learning_rate)
    whole_rollouts = Phase("whole rollouts", whole, 8, args.learning_rate / 2)
    losses = {
        phase.name: train(args, model, tokenizer, rows, phase)
        for phase, rows in ((opening_turns, demonstrations.openings), (whole_rollouts, demonstrations.rows))
    }
    figures = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "demonstrations": len(demonstrations.rows),
        "left_out": demonstrations.left_out,
        "steps": args.max_steps,
        "loss": losses,
        "seconds": {
            "preparation": round(prepared - started, 1),
            "training": round(time.perf_counter() - prepared, 1),
        },
    }
    save(model, tokenizer, figures, args.output)
    return figures


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    print(json.dumps(run(args), indent=2))
    print(f"model and tokenizer: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
