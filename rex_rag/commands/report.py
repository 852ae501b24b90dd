"""`rex-rag report` and `compare`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rex_rag.commands.terminal import printable


def add_report(commands: argparse._SubParsersAction) -> None:
    """`rex-rag report`: a table over runs."""
    parser = commands.add_parser(
        "report",
        help="put evaluation runs into one table",
        description="One row a run: exact match with its 95 % interval for every set, and the mean with and without "
        "Bamboogle. Published rows, the paper's and later ones, stand below, marked. Runs of different protocols and "
        "runs that are not whole are refused unless --mark is given.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="DIR",
        help="a run's directory, or one that holds several runs; whatever else outputs/* finds is left out",
    )
    parser.add_argument(
        "--format", choices=("markdown", "csv", "latex"), default="markdown", help="default: %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table there instead of printing it")
    parser.add_argument(
        "--columns",
        type=_names,
        default=[],
        metavar="NAME,…",
        help="more columns: f1, sub_match, judge, document_recall, pass_at_k, majority, searches, tokens, seconds, "
        "invalid, truncations, unanswered, unreadable",
    )
    parser.add_argument(
        "--published",
        type=_sizes,
        metavar="SIZE,…",
        help="sizes of the published rows: 3B, 7B or none (default: those in the models' names, or both)",
    )
    parser.add_argument(
        "--mark", action="store_true", help="show runs that cannot be compared, with footnotes that say why"
    )
    parser.add_argument(
        "--model-card",
        metavar="README.md",
        type=Path,
        help="also write the results into this model card, in the Hub's evaluation-results format; what else it says "
        "stays",
    )
    _add_bootstrap(parser)
    parser.set_defaults(run=report)


def report(options: argparse.Namespace) -> None:
    """Print or write the table, and the model card if one is asked for."""
    from rex_rag.evaluation.report import build_report, check_choices, load_runs
    from rex_rag.evaluation.report_formats import FORMATS

    check_choices(options.columns, options.published)  # before runs are read, which takes a while
    runs = load_runs(
        options.runs,
        resamples=options.resamples,
        seed=options.seed,
        say=lambda line: print(f"note: {printable(line)}", file=sys.stderr),
    )
    table = build_report(
        runs,
        extras=options.columns,
        published=options.published,
        mark=options.mark,
        resamples=options.resamples,
        seed=options.seed,
    )
    text = FORMATS[options.format](table)
    if options.model_card:
        from rex_rag.evaluation.publish import write_model_card

        write_model_card(options.model_card, runs)
    _show(text, options.output)


def add_compare(commands: argparse._SubParsersAction) -> None:
    """`rex-rag compare`: two runs, paired."""
    parser = commands.add_parser(
        "compare",
        help="compare two evaluation runs question by question",
        description="The paired difference B - A of every set and overall, with its 95 % bootstrap interval and an "
        "exact sign test (McNemar), and the questions on which the runs differ. Runs over different questions are "
        "refused.",
    )
    parser.add_argument("a", metavar="A", help="directory of the first run")
    parser.add_argument("b", metavar="B", help="directory of the second run")
    parser.add_argument(
        "--metric",
        choices=("main", "f1", "sub_match", "judge"),
        default="main",
        help="main: exact match, or accuracy for multiple choice (default: %(default)s)",
    )
    parser.add_argument(
        "--benchmarks", type=_names, nargs="+", default=[], metavar="SET", help="the sets to compare (default: all)"
    )
    parser.add_argument(
        "--mark", action="store_true", help="compare runs of different protocols, and say how they differ"
    )
    parser.add_argument(
        "--ids", type=_count, default=10, metavar="N", help="ids to print a set and side (default: 10)"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write the comparison there instead of printing it"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures and ids there too")
    parser.add_argument(
        "--changed", metavar="FILE.jsonl", type=Path, help="write every question on which the runs differ there"
    )
    _add_bootstrap(parser)
    parser.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> None:
    """Print or write the comparison, its figures and the questions that changed."""
    from rex_rag.evaluation.compare import as_markdown, changed_rows, compare_runs
    from rex_rag.evaluation.finished import read_run
    from rex_rag.support.durable import write_json, written_whole

    first, second = (read_run(path, resamples=options.resamples, seed=options.seed) for path in (options.a, options.b))
    found = compare_runs(
        first,
        second,
        metric=options.metric,
        benchmarks=[name for part in options.benchmarks for name in part],
        mark=options.mark,
        resamples=options.resamples,
        seed=options.seed,
    )
    if options.json:
        write_json(options.json, found.as_row())
    if options.changed:
        with written_whole(options.changed) as file:
            for row in changed_rows(found):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
    _show(as_markdown(found, options.ids), options.output)


def _add_bootstrap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--resamples", type=_resamples, default=10_000, metavar="N", help="of the bootstrap (default: 10000)"
    )


def _show(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    from rex_rag.support.durable import written_whole

    with written_whole(output) as file:
        file.write(text.encode())


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} holds no name; separate several with commas")
    return names


def _sizes(text: str) -> list[str]:
    return [] if text.strip().lower() == "none" else [name.upper() for name in _names(text)]


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _resamples(text: str) -> int:
    value = int(text)
    if value < 100:
        raise argparse.ArgumentTypeError(f"{value} resamples are too few for a 95 % interval; take at least 100")
    return value
