"""`rex-rag view`, `curves` and `reliability`: what a model did, to look at."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.commands.terminal import positive, printable
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from rex_rag.protocols import Protocol
    from rex_rag.retrieval.load import RetrieverArguments
    from rex_rag.types import Trajectory

PAGE_LIMIT = 2000


def add_view(commands: argparse._SubParsersAction) -> None:
    """`rex-rag view`: trajectories as a page."""
    view = commands.add_parser(
        "view",
        help="show a run's trajectories as a page",
        description="Turn what a run left behind into one HTML page in which segment kinds can be told apart: the "
        "completion tables of training (log_completions: true), the predictions of an evaluation, finished or under "
        "way, or both.",
    )
    view.add_argument(
        "source",
        metavar="RUN_DIRECTORY|COMPLETIONS.parquet|PREDICTIONS.jsonl",
        type=Path,
        help="a run's output directory, or one file of it",
    )
    view.add_argument(
        "--output", metavar="PAGE.html", type=Path, help="page to write (default: trajectories.html beside the data)"
    )
    view.add_argument("--step", type=int, metavar="N", help="only this training step (default: all)")
    view.add_argument(
        "--benchmark", "--benchmarks", metavar="NAME", help="only this benchmark of an evaluation (default: all)"
    )
    view.add_argument(
        "--limit",
        type=positive,
        default=PAGE_LIMIT,
        metavar="N",
        help=f"only the first N trajectories, an equal share of each benchmark (default: {PAGE_LIMIT})",
    )
    view.set_defaults(run=_view)


def _view(options: argparse.Namespace) -> None:
    from rex_rag.evaluation.judge import judge_of, read_judge
    from rex_rag.visualization.page import write_trajectory_page
    from rex_rag.visualization.predictions import UNFINISHED, run_facts
    from rex_rag.visualization.records import read_records

    # Before the predictions: a chunk that is finished meanwhile may be shown and not said, never said and not shown.
    known = run_facts(options.source, options.benchmark, judge_of) if options.step is None else []
    records, total = read_records(options.source, options.step, options.benchmark, options.limit, read_judge)
    folder = options.source if options.source.is_dir() else options.source.parent
    output = options.output or folder / "trajectories.html"
    # Pages are passed on: of the path, only the end says what they show.
    source = options.source.resolve()
    title = f"Trajectories of {source.name if source.is_dir() else f'{source.parent.name}/{source.name}'}"
    page = write_trajectory_page(records, output, title, total, known)
    more = f"; --limit {total} shows all" if total > len(records) else ""
    print(f"{page}: {len(records)} of {total} trajectories{_counted(records)}{more}")
    if missing := dict(known).get(UNFINISHED):
        print(f"the evaluation is {UNFINISHED}, {printable(missing)}")


def _counted(records: Sequence[Mapping[str, Any]]) -> str:
    """What a page's records are: of training, how many are probes; of an evaluation, how many are right."""
    from rex_rag.visualization.records import headline

    trained = [record for record in records if not record.get("metric")]
    probes = f"{sum(record['kind'] == 'probe' for record in trained)} of them probes"
    ended = Counter(headline(record) for record in records if record.get("metric"))
    if not ended:
        return f", {probes}"
    answered = f"{ended['right']} right, {ended['wrong']} wrong, {ended['no answer']} without an answer"
    if not trained:
        return f", {answered}"
    return f": {len(trained)} of training, {probes}; {ended.total()} of an evaluation, {answered}"


def add_curves(commands: argparse._SubParsersAction) -> None:
    """`rex-rag curves`: training curves of several runs."""
    curves = commands.add_parser(
        "curves",
        help="draw training curves, several runs in one figure",
        description="Draw one or several training runs in six panels: whether it learns, leaves dead ends, has "
        "something to learn from and is healthy, what it does, and what it costs. docs/health.md says how to read "
        "them. Whatever a run did not log is left out.",
    )
    curves.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN",
        help="output directory of a training run, or a trainer_state.json; the label stands in the legend",
    )
    curves.add_argument("--output", required=True, metavar="CURVES.png|svg", type=Path, help="image to write")
    curves.add_argument("--title", default="Training", help="above all panels")
    curves.add_argument("--all", action="store_true", help="further panels: weights, clipping, lengths, gradient, …")
    curves.set_defaults(run=_curves)


def _curves(options: argparse.Namespace) -> None:
    from rex_rag.visualization.curves import labelled_runs, plot_training_curves, read_log_history

    runs = {label: read_log_history(path) for label, path in labelled_runs(options.runs).items()}
    if not any(runs.values()):
        raise UserError(
            f"no step is logged yet in {', '.join(options.runs)}; the first comes after logging_steps steps"
        )
    picture = plot_training_curves(runs, options.output, options.title, options.all)
    steps = ", ".join(f"{label} {sum('step' in row for row in rows)}" for label, rows in runs.items())
    print(f"{picture}: rows logged: {steps}")


def add_reliability(commands: argparse._SubParsersAction) -> None:
    """`rex-rag reliability`: how sure models are of each token they write."""
    parser = commands.add_parser(
        "reliability",
        help="draw how reliable each token of a model's answer is",
        description="Let one or several models answer a question, greedily, and draw every token they wrote in the "
        "colour of its reliability (LogTokU, arXiv 2502.00290), with bars for aleatoric and epistemic uncertainty.",
    )
    add = parser.add_argument
    several = {"action": "extend", "nargs": "+"}
    add("--model", **several, required=True, metavar="MODEL", help="folder or Hub name of each model")
    add("--question", required=True, help="what to ask")
    add("--retriever", **several, default=[], metavar="R", help="index directory or URLs (default: nothing to search)")
    add(
        "--corpus",
        **several,
        default=[],
        metavar="FILE",
        help="search these passages with BM25 in memory",
    )
    add("--output", required=True, metavar="PICTURE.png|svg", type=Path, help="image to write")
    add("--page", metavar="PAGE.html", type=Path, help="write the trajectories with their tokens as a page, too")
    add("--prompt-template", metavar="FILE", type=Path, help="text with {question} in it (default: the built-in one)")
    add("--chat-template-kwargs", metavar="JSON", help="what the chat templates are rendered with, as in training")
    add("--k", type=positive, default=2, metavar="K", help="largest logits taken as evidence (default: 2)")
    add("--top-k", type=positive, default=3, metavar="K", help="passages a search (default: 3)")
    add("--max-turns", type=positive, default=5, metavar="N", help="turns that may search (default: 5)")
    add("--max-turn-tokens", type=positive, default=500, metavar="N", help="tokens a turn (default: 500)")
    add("--inserted", action="store_true", help="draw the tokens of retrieved text as well")
    add("--device", help="where the models run (default: the first GPU, or else the CPU)")
    parser.set_defaults(run=_reliability)


def _reliability(options: argparse.Namespace) -> None:
    from rex_rag.models.files import check_model
    from rex_rag.protocols import make_protocol
    from rex_rag.protocols.chat import read_settings
    from rex_rag.retrieval.load import BM25, RetrieverArguments
    from rex_rag.visualization.curves import labelled_runs
    from rex_rag.visualization.files import picture_format
    from rex_rag.visualization.page import write_trajectory_page
    from rex_rag.visualization.records import trajectory_record
    from rex_rag.visualization.reliability_picture import draw_reliability, summary, with_shared_scale

    # What is wrong with the request is said before any model is loaded.
    picture_format(options.output)
    if not options.question.strip():
        raise UserError("the question is empty; give --question words")
    if options.k < 2:
        raise UserError(f"--k is {options.k}; uncertainty between candidates needs 2 or more")
    read_settings(options.chat_template_kwargs)
    template = options.prompt_template.read_text(encoding="utf-8") if options.prompt_template else None
    protocol = make_protocol("search_r1", template=template)
    for model in options.model:
        check_model(model)
    retrieval = None
    if options.retriever or options.corpus:
        retrieval = RetrieverArguments(retriever=options.retriever or [BM25], corpus=options.corpus)
    # A picture is passed on: of a folder's path, only the end that tells models apart stands in it.
    folders = [model for model in dict.fromkeys(options.model) if Path(model).is_dir()]
    names = dict(zip(folders, labelled_runs(folders), strict=True))
    answered = [_answer(model, names.get(model, model), protocol, retrieval, options) for model in options.model]
    pictures = with_shared_scale([picture for _, picture in answered])
    print(draw_reliability(pictures, options.output, f"Question: {options.question.strip()}"))
    for picture, (trajectory, _) in zip(pictures, answered, strict=True):
        print(f"  {picture['model']}: {summary(picture)}; answer: {printable(trajectory.answer or '(none)')}")
    if options.page:
        records = [
            trajectory_record(trajectory, options.question.strip(), [], None)
            | {"model": picture["model"], "reliability": picture, "beside": 0}
            for picture, (trajectory, _) in zip(pictures, answered, strict=True)
        ]
        print(write_trajectory_page(records, options.page, "Token reliability"))


def _answer(
    path: str,
    name: str,
    protocol: Protocol,
    retrieval: RetrieverArguments | None,
    options: argparse.Namespace,
) -> tuple[Trajectory, dict[str, Any]]:
    """One model's greedy trajectory and the picture of it. Models are loaded one after the other."""
    import torch

    from rex_rag.evaluation.token_reliability import score_trajectory
    from rex_rag.models.files import explained, load_causal_lm
    from rex_rag.models.generation import TransformersGenerator
    from rex_rag.retrieval.load import load_retriever
    from rex_rag.rollout.agent import Agent
    from rex_rag.rollout.script import RolloutBudget
    from rex_rag.support.tokenization import open_tokenizer
    from rex_rag.tools import make_tools
    from rex_rag.visualization.reliability_picture import reliability_record

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with explained(path):
        tokenizer = open_tokenizer(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_causal_lm(path, dtype="auto").to(device).eval()
    budget = RolloutBudget(
        # Without a retriever the first turn is the last, in which a search is not executed.
        max_turns=options.max_turns if retrieval else 0,
        max_turn_tokens=options.max_turn_tokens,
        top_k=options.top_k,
    )
    retriever = load_retriever(retrieval) if retrieval else None
    agent = Agent(
        lambda stop: TransformersGenerator(model, tokenizer, temperature=0.0, stop_strings=stop),
        make_tools(["search"], retriever, budget.top_k) if retriever else [],
        tokenizer,
        protocol,
        budget,
        chat_template_kwargs=options.chat_template_kwargs,
    )
    if tokenizer.chat_template:
        prompt = agent.script.encode(options.question)
    else:
        prompt = tokenizer(protocol.messages(options.question)[0]["content"])["input_ids"]
    [trajectory] = agent.rollout([prompt])
    tokens = score_trajectory(model, tokenizer, trajectory, options.k)
    return trajectory, reliability_record(name, tokens, options.k, inserted=options.inserted)
