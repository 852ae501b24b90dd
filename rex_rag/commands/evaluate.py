"""`rex-rag evaluate`, and what `accelerate launch -m rex_rag.evaluate` starts in every process."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.commands.sections import parse_section
from rex_rag.support.errors import UserError, refuse
from rex_rag.support.hub import bound_hub_requests
from rex_rag.support.logs import start_logging
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    from rex_rag.evaluation.arguments import EvaluationArguments, SearchArguments
    from rex_rag.evaluation.benchmarks import Benchmark
    from rex_rag.evaluation.run import Shard
    from rex_rag.evaluation.scores import BenchmarkScores
    from rex_rag.models.language_model import ModelOptions
    from rex_rag.retrieval.base import Retriever

DESCRIPTION = (
    "Run a method with a model over benchmarks and score what it answers. The output directory holds the protocol "
    "card (run.json), every prediction and the scores; a run that was killed goes on where it stood. Several "
    "processes share the work under `accelerate launch -m rex_rag.evaluate`, or each with a --shard of its own."
)


def main() -> int:
    """Evaluate as this process's command line says; returns the exit code: 0, 2 for errors a user can mend, 130 after
    Ctrl-C."""
    start_logging()
    bound_hub_requests()
    try:
        evaluate(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return refuse(error)
    return 0


def evaluate(words: Sequence[str]) -> None:
    """Evaluate a model on benchmarks."""
    from rex_rag.evaluation.arguments import EvaluationArguments, SearchArguments
    from rex_rag.evaluation.run import Shard

    def switches(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--shard", metavar="I/N", help="run part I of N (from 0) and wait for nobody; the last one to end merges"
        )

    arguments, search, options = parse_section(
        "evaluate", DESCRIPTION, "evaluate", (EvaluationArguments, SearchArguments), words, switches
    )
    shard = Shard.parse(options.shard) if options.shard else launched_shard(os.environ)
    logging.getLogger("rex_rag").setLevel(logging.INFO)
    speaks = shard.index == 0 or not shard.helps
    with _stop_is_said(say=_say_stopped if speaks else lambda: None):
        run_evaluation(arguments, search, shard, process=int(os.environ.get("LOCAL_RANK", 0)), say=print)


def _say_stopped() -> None:
    # A progress bar may stand in the last line. Not by `print`, which a signal may have interrupted; and a terminal
    # that is gone keeps nothing from ending.
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopped; the same command goes on where it stood\n")


@contextlib.contextmanager
def _stop_is_said(say: Callable[[], object]) -> Iterator[None]:
    """Say that the run is stopped, on Ctrl-C and before SIGTERM ends this process as it always does.

    Nothing is cleaned up on SIGTERM: schedulers give little time, and a run bears a kill at any moment.
    """

    owner = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() == owner:  # not in processes that an engine forked
            say()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # A handler of somebody else's is theirs, and only the main thread may set one.
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        say()
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def launched_shard(environment: Mapping[str, str]) -> Shard:
    """The part of a process that `accelerate launch` or torchrun started; everything for a lone one."""
    from rex_rag.evaluation.run import Shard

    return Shard(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))


def run_evaluation(
    arguments: EvaluationArguments,
    search: SearchArguments,
    shard: Shard,
    *,
    process: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, BenchmarkScores] | None:
    """Run this process's part of an evaluation.

    Args:
        process: number of this process on its machine, which chooses its GPU.
        say: takes the lines meant for people.

    Returns:
        Benchmark -> scores once the whole run is finished, to the process that reports it, else `None`.

    Raises:
        ValueError: for arguments, benchmarks, a model or a directory that do not go together.
        RetrievalError, OSError: when searches or completions failed; what is finished stays for the next start.
    """
    from rex_rag.evaluation.methods import make_method
    from rex_rag.evaluation.run import EvaluationRun
    from rex_rag.evaluation.run_card import describe_retriever, protocol_card
    from rex_rag.models.language_model import check_files, check_name, open_model, stored_max_length
    from rex_rag.protocols.chat import warn_of_unread

    method = make_method(
        arguments.method, arguments.prompt_text(), arguments.further_texts(), **arguments.method_options()
    )
    if method.uses_retriever and not search.is_given:
        raise UserError(
            f"the method {method.name} searches, but no retriever is named; set retriever (an index directory, a "
            "server's URL) or corpus (JSON lines files, searched with BM25)"
        )
    options = arguments.model_options(process)
    check_name(options)
    check_files(options)
    is_first = shard.index == 0
    if arguments.differences and is_first:
        say(f"not as the model was trained (agent.json): {'; '.join(arguments.differences)}")
    benchmarks = load_benchmarks(arguments, say if is_first else lambda line: None)
    output = Path(arguments.output)
    make_card = partial(
        protocol_card,
        method=method,
        benchmarks=benchmarks,
        budget=arguments.budget(),
        temperature=arguments.temperature,
        samples=arguments.samples,
        seed=arguments.seed,
        chunk_size=arguments.batch_size,
    )
    # What would be refused, and what is finished, needs no model: loading one may take minutes.
    found = _finished_card(output, options, search, make_card)
    if found is not None:
        if shard.helps and not is_first:
            return None
        say(f"{output} holds this run, finished: all {sum(map(len, benchmarks)):,} questions were answered before")
        return _scored(output, found, arguments, say)
    # Weights take minutes to load, so what they are not needed for comes before them.
    _check_length(stored_max_length(options), arguments)
    goes_first = method.uses_retriever and _may_go_first(search, options)
    retriever = _checked_retriever(search) if goes_first else None
    model = open_model(options)
    warn_of_unread(model.tokenizer, options.chat_template_kwargs)
    _check_length(model.max_length, arguments)
    if method.uses_retriever and retriever is None:
        retriever = _checked_retriever(search)
    description = None if retriever is None else describe_retriever(search, retriever.description, retriever)
    card = make_card(model=model.describe(), retriever=description)
    run = EvaluationRun(
        output,
        card,
        benchmarks,
        method,
        model,
        retriever,
        budget=arguments.budget(),
        samples=arguments.samples,
        chunk_size=arguments.batch_size,
        patience=60 * arguments.wait_minutes,
    )
    if is_first or not shard.helps:
        part = "" if shard.helps else f"part {shard.index}/{shard.count} of: "
        questions = counted(sum(map(len, benchmarks)), "question")
        sets = counted(len(benchmarks), "benchmark")
        say(f"{part}{method.title} with {card['model']['name']}: {questions} of {sets}")
    try:
        finished = run.run(shard, show_progress=is_first or not shard.helps)
    finally:
        model.close()
    if not finished:
        say(f"part {shard.index}/{shard.count} is done; others are not: the last to end merges and scores")
        return None
    if shard.helps and not is_first:
        return None
    return _scored(output, card, arguments, say)


def _finished_card(
    output: Path, options: ModelOptions, search: SearchArguments, make_card: Callable[..., dict[str, Any]]
) -> dict[str, Any] | None:
    """The card of this run if it is finished; held against as much of this one's card as is known without its model.

    Of an unfinished run weights and corpus are left out, which take time to hash: it will load them, and then looks.

    Raises:
        RunError: for another run's.
    """
    from rex_rag.evaluation.records import RUN_FILE
    from rex_rag.evaluation.run import check_same_run, is_finished
    from rex_rag.evaluation.run_card import describe_retriever, read_card

    if not (output / RUN_FILE).is_file():
        return None
    found = read_card(output)
    finished = is_finished(output, found)
    known = _known_identity(options, found["model"].get("tokenizer_sha256"), with_weights=finished)
    card = make_card(model={**found["model"], **known}, retriever=found["retriever"])
    if finished and found["retriever"] is not None and card["method"]["uses_retriever"]:
        said = describe_retriever(search, found["retriever"]["description"])
        # A server that is away now says nothing, and a finished run does not need it.
        if said["fingerprint"] is not None or not search.kind.is_served:
            card["retriever"] = said
    check_same_run(output, card)
    return found if finished else None


def _known_identity(options: ModelOptions, tokenizer: str | None, with_weights: bool) -> dict[str, Any]:
    """What the card will say of a model, as far as its folder, its name and its tokenizer tell.

    tokenizer: what the card there says of it.
    """
    from rex_rag.models.identity import model_identity
    from rex_rag.models.language_model import ENDPOINT, confirmed_tokenizer_sha256

    known = {
        "backend": options.backend,
        "tokenizer_sha256": confirmed_tokenizer_sha256(options, tokenizer),
        "chat_template_kwargs": options.chat_template_kwargs,
    }
    if options.backend == ENDPOINT:
        return {**known, "name": options.name}
    if with_weights:
        known |= model_identity(options.name, options.revision)
    if options.dtype != "auto":
        known["dtype"] = options.dtype
    if options.device is not None:
        known["device"] = options.device.partition(":")[0]
    return known


def _scored(
    output: Path, card: Mapping[str, Any], arguments: EvaluationArguments, say: Callable[[str], object]
) -> dict[str, BenchmarkScores]:
    from rex_rag.evaluation.judge import judge_run
    from rex_rag.evaluation.run import score_run

    judge = arguments.judge_options()
    if judge is not None:
        unread = judge_run(output, card["benchmark_order"], judge)
        if unread:
            say(f"{unread:,} verdicts of {judge.model} say neither correct nor incorrect; they count as incorrect")
    scores = score_run(output, card)
    say(score_table(scores))
    say(f"results: {output}")
    return scores


def load_benchmarks(
    arguments: EvaluationArguments, say: Callable[[str], object] = lambda line: None
) -> list[Benchmark]:
    """The benchmarks that the arguments name, cut to the subset asked for; those that are smaller are told.

    Raises:
        QuestionError: for one that cannot be loaded.
        ValueError: for two of the same name.
    """
    from rex_rag.evaluation.benchmarks import load_benchmark, subset

    benchmarks = [load_benchmark(entry, revision=arguments.benchmark_revision) for entry in arguments.benchmarks]
    if arguments.subset is not None:
        small = [f"all {len(one):,} questions of {one.name}" for one in benchmarks if len(one) < arguments.subset]
        if small:
            say(f"subset={arguments.subset}: {', '.join(small)}, which {'has' if len(small) == 1 else 'have'} no more")
        benchmarks = [subset(benchmark, arguments.subset, arguments.subset_seed) for benchmark in benchmarks]
    names = [benchmark.name for benchmark in benchmarks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"two benchmarks are called {', '.join(repeated)}; give one another name: NAME=FILE.jsonl")
    return benchmarks


def score_table(scores: Mapping[str, BenchmarkScores]) -> str:
    """Scores as a table for the terminal; the main metric in per cent with its 95 % interval."""
    attempts = max((one.samples for one in scores.values()), default=1)
    # Of the ks the largest alone: the table is wide, and results.json holds them all.
    several = [f"pass@{attempts}", "majority"] if attempts > 1 else []
    head = ["benchmark", "n", "EM/accuracy", "95 %", *several, "F1", "searches", "tokens", "unanswered", "seconds"]
    judged = any("judge" in one.metrics for one in scores.values())
    if judged:
        head.insert(head.index("F1") + 1, "judged")
    recalled = any("document_recall" in one.metrics for one in scores.values())
    if recalled:
        head.insert(head.index("searches"), "documents")
    choosing = any("accuracy" in one.metrics for one in scores.values())
    if choosing:
        head.insert(-1, "unreadable")
    rows = [head]
    for name, one in scores.items():
        f1, judge, documents = (one.metrics.get(name) for name in ("f1", "judge", "document_recall"))
        rows.append(
            [
                name,
                f"{one.n:,}",
                f"{100 * one.main.mean:.1f}",
                f"{100 * one.main.low:.1f} to {100 * one.main.high:.1f}",
                *_of_several(one, attempts),
                f"{100 * f1.mean:.1f}" if f1 else "",
                *([f"{100 * judge.mean:.1f}" if judge else ""] if judged else []),
                *([f"{100 * documents.mean:.1f}" if documents else ""] if recalled else []),
                f"{one.searches:.2f}",
                f"{one.tokens:.0f}",
                f"{100 * one.unanswered:.1f} %",
                *([f"{100 * one.unreadable:.1f} %" if "accuracy" in one.metrics else ""] if choosing else []),
                "" if one.seconds is None else f"{one.seconds:.1f}",
            ]
        )
    if len(scores) > 1:
        mean = sum(one.main.mean for one in scores.values()) / len(scores)
        rows.append(["mean", "", f"{100 * mean:.1f}", *[""] * (len(head) - 3)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _of_several(scores: BenchmarkScores, attempts: int) -> list[str]:
    """The cells of a set's pass@`attempts` and majority vote; none for one attempt."""
    if attempts == 1:
        return []
    found = (scores.pass_at_k.get(attempts), scores.majority)
    return ["" if one is None else f"{100 * one.mean:.1f}" for one in found]


def _may_go_first(search: SearchArguments, options: ModelOptions) -> bool:
    """Whether a retriever may be opened before the model; of those beside vLLM, only what loads no engine here.

    vLLM's CPU build cannot start once llvmlite is loaded (bm25s and dense encoders may bring it), and its GPUs are
    chosen before torch has looked at them.
    """
    from rex_rag.models.language_model import VLLM

    return options.backend != VLLM or not (search.kind.loads_engine or search.rerank_model)


def _checked_retriever(search: SearchArguments) -> Retriever:
    from rex_rag.retrieval.load import load_retriever

    retriever = load_retriever(search)
    retriever.check()
    return retriever


def _check_length(longest: int | None, arguments: EvaluationArguments) -> None:
    if longest is not None and arguments.max_sequence_length > longest:
        raise UserError(
            f"max_sequence_length={arguments.max_sequence_length} is more than the {longest} tokens that "
            f"{arguments.model} takes; lower it"
        )
