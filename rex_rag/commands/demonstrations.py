"""`rex-rag demonstrations`: rows for a supervised start, made for a training recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rex_rag.commands.terminal import positive
from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError, from_the_user
from rex_rag.support.recipes import recipe_path
from rex_rag.support.wording import counted

ROWS_FILE = "rows.jsonl"


def add_demonstrations(commands: argparse._SubParsersAction) -> None:
    """`rex-rag demonstrations`: write rows.jsonl, and agent.json for the model that is trained on them."""
    parser = commands.add_parser(
        "demonstrations",
        help="rows for a supervised start, made for a training recipe",
        description="Write demonstrations of how to search and answer as rows of input_ids and labels, which TRL's "
        "SFTTrainer trains on as they are: the recipe's tokenizer, prompt, protocol, retriever and budgets, and no "
        "loss on what the model did not write. They come from the recipe's own questions (one search with the "
        "question, then the gold answer where a passage holds it), or, with --predictions, from what another model "
        "wrote and got right. Beside them agent.json, to be put beside the trained model.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or a name that `rex-rag recipe` lists")
    parser.add_argument(
        "--predictions", nargs="+", metavar="RUN", help="--output of `rex-rag evaluate`; its right answers are shown"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--max_rows", "--max-rows", type=positive, metavar="N", help="write at most so many")
    parser.set_defaults(run=_demonstrations)


def _demonstrations(options: argparse.Namespace) -> None:
    from trl import TrlParser

    from rex_rag.data.qa import load_questions
    from rex_rag.models.adapters import tokenizer_place
    from rex_rag.models.files import explained
    from rex_rag.retrieval.load import load_retriever
    from rex_rag.support.tokenization import open_tokenizer
    from rex_rag.tools import make_tools
    from rex_rag.training.demonstrations import demonstration_rows, look_up, play, right_turns
    from rex_rag.training.recipe import RECIPE_PARTS

    words = ["--config", str(recipe_path(options.recipe)), *options.overrides, "--use_cpu", "true"]
    with from_the_user():
        questions, _, retrieval, config, model = TrlParser(
            RECIPE_PARTS, usage=argparse.SUPPRESS
        ).parse_args_and_config(words)
    if model.model_name_or_path is None:
        raise UserError("model_name_or_path is not set; its tokenizer is what rows are made with")
    with explained(model.model_name_or_path):
        tokenizer = open_tokenizer(*tokenizer_place(model.model_name_or_path, model.model_revision))
    retriever = load_retriever(retrieval)
    retriever.check()
    settings = config.agent_settings()
    protocol = settings.make_protocol()
    if options.predictions:
        turns = [one for run in options.predictions for one in right_turns(run)]
        source = f"right answers of {', '.join(options.predictions)}"
    else:
        asked = load_questions(questions)
        turns = list(look_up(asked, retriever, protocol, config.retrieval_top_k))
        source = f"{counted(len(asked), 'question')}, {len(turns):,} with an answer in what one search finds"
    trajectories = play(
        turns[: options.max_rows],
        make_tools(config.agent_tools, retriever, config.retrieval_top_k),
        tokenizer,
        protocol,
        settings.budget,
        settings.chat_template_kwargs,
    )
    rows, left_out = demonstration_rows(turns[: options.max_rows], trajectories)
    why = "".join(f"; {counted(number, 'was', 'were')} {reason}" for reason, number in left_out.items())
    if not rows:
        raise UserError(f"there is nothing to demonstrate: {source}{why}; look at them with `rex-rag coverage`")
    path = options.output / ROWS_FILE
    with written_whole(path) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    settings.save(options.output)
    longest = max(len(row["input_ids"]) for row in rows)
    print(f"{path}: {counted(len(rows), 'demonstration')} of at most {longest:,} tokens, from {source}{why}")
