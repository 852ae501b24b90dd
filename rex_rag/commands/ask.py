"""`rex-rag ask`: put a question to a trained agent, and watch it work."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rex_rag.commands.terminal import printable
from rex_rag.support.announce import announce
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from rex_rag.agent import SearchAgent


def add_ask(commands: argparse._SubParsersAction) -> None:
    """`rex-rag ask`: one question, or a prompt to type at."""
    ask = commands.add_parser(
        "ask",
        help="put a question to a trained agent",
        description="Ask a model that was trained with this package, and print its turns as they come. Without a "
        "question it is a prompt to type at; an empty line ends it.",
    )
    ask.add_argument("model", metavar="MODEL", help="folder of a trained model, or its name on the Hub")
    ask.add_argument("question", nargs="?", metavar="QUESTION", help="what to ask")
    ask.add_argument(
        "--retriever", action="append", metavar="R", help="an index directory, a server's URL; may be given again"
    )
    ask.add_argument(
        "--corpus", action="append", default=[], metavar="FILE", help="JSON lines file that bm25 searches"
    )
    ask.add_argument("--revision", help="of the model's repository on the Hub")
    ask.add_argument("--backend", default="transformers", choices=("transformers", "vllm"), help="what runs the model")
    ask.add_argument("--device", help="for transformers: cpu, cuda:0, …; by default a GPU if there is one")
    ask.add_argument("--temperature", type=float, default=0.0, help="0, the default, decodes greedily")
    ask.add_argument("--seed", type=int, default=0, help="of what is drawn above temperature 0")
    ask.set_defaults(run=_ask)


def _ask(options: argparse.Namespace) -> None:
    from rex_rag.agent import SearchAgent

    if options.question is not None and not options.question.strip():
        raise UserError("the question is blank; write one, or leave it out to be asked for it")
    announce(f"loading {options.model} and what it searches")
    agent = SearchAgent.load(
        options.model,
        options.retriever,
        corpus=options.corpus,
        revision=options.revision,
        backend=options.backend,
        device=options.device,
        temperature=options.temperature,
        seed=options.seed,
    )
    try:
        if options.question is not None:
            _answer(agent, options.question)
        else:
            while question := _typed():
                _answer(agent, question)
    finally:
        agent.close()


def _typed() -> str:
    try:
        return input("question> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(agent: SearchAgent, question: str) -> None:
    from rex_rag.types import Segment

    for step in agent.turns(question):
        if isinstance(step, Segment):
            print(f"[{step.kind.name}]")
            print("\n".join(f"    {printable(line)}" for line in step.text.strip().splitlines()), flush=True)
            continue
        print(f"answer: {printable(step.answer) if step.answer is not None else '(none)'}")
        for passage in step.sources:
            print(f"source: {printable(passage.title)} ({printable(passage.id)})")
