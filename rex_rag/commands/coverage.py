"""`rex-rag coverage`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rex_rag.commands.sections import parse_section
from rex_rag.support.errors import UserError

DESCRIPTION = (
    "Count the questions of which a gold answer stands in the corpus at all, and in the first passages that the "
    "retriever finds for the question: the ceiling of any agent over that corpus, and what one search reaches of it. "
    "`--corpus FILE` looks through a file and searches it by BM25; `--retriever DIR` does both with an index; with a "
    "server, `--passages` names the corpus."
)


@dataclass
class CoverageArguments:
    """What is covered, and by what.

    Raises:
        ValueError: for no benchmark.
    """

    benchmarks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle; NAME=FILE.jsonl; a file; a "
            ".yaml description. Several with commas or blanks between them."
        },
    )
    passages: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Corpus files or index directories to look through, where the retriever's own are not here."
        },
    )
    search: bool = field(default=True, metadata={"help": "Search too; --no_search only looks through the corpus."})
    top_k: list[int] = field(default_factory=lambda: [1, 3, 5, 10], metadata={"help": "Ranks to count within."})
    subset: int | None = field(
        default=None,
        metadata={"help": "Only so many questions of each benchmark, chosen by hash of seed and question."},
    )
    subset_seed: int = field(default=0, metadata={"help": "Names one subset."})
    benchmark_revision: str | None = field(
        default=None, metadata={"help": "Revision of the Hub's repository of the seven benchmarks."}
    )
    json: str | None = field(default=None, metadata={"help": "Write figures, and each question's own, to this file."})
    write_answerable: str | None = field(
        default=None,
        metadata={
            "help": "Write the questions of which a gold answer stands in the corpus to this new .jsonl file, to be "
            "named under `datasets:` in a recipe."
        },
    )

    def __post_init__(self) -> None:
        from rex_rag.evaluation.benchmarks import benchmark_specs

        self.benchmarks = benchmark_specs(self.benchmarks)
        self.passages = [self.passages] if isinstance(self.passages, str) else self.passages
        self.top_k = [self.top_k] if isinstance(self.top_k, int) else self.top_k
        # Not found out after hours over a large corpus.
        for name in ("json", "write_answerable"):
            value = getattr(self, name)
            if value is not None and not Path(value).absolute().parent.is_dir():
                raise UserError(
                    f"{name}={value!r}: there is no such folder (working directory: {Path.cwd()}); make it"
                )
        if not self.benchmarks:
            raise UserError("no benchmark was given; name one, for example --benchmarks bamboogle=FILE.jsonl")
        if self.write_answerable is None:
            return
        if len(self.benchmarks) > 1:
            raise UserError(
                f"write_answerable={self.write_answerable!r} takes the questions of one set, but "
                f"{len(self.benchmarks)} were given; run the command once for each, to a file of its own"
            )
        if Path(self.write_answerable).suffix != ".jsonl":
            raise UserError(
                f"write_answerable={self.write_answerable!r} is written as JSON lines, and a recipe knows them by "
                "their name; let it end in .jsonl"
            )
        if Path(self.write_answerable).exists():
            raise UserError(
                f"write_answerable={self.write_answerable!r} exists, and runs may have been trained on it; remove it "
                "or name another file"
            )


def coverage(words: Sequence[str]) -> None:
    """Print a table of coverage."""
    from rex_rag.evaluation.benchmarks import OPEN, load_benchmark, subset
    from rex_rag.evaluation.coverage import coverage_table, measure_coverage, open_corpus, write_answerable
    from rex_rag.retrieval.load import RetrieverArguments, load_retriever
    from rex_rag.support.durable import write_json
    from rex_rag.support.wording import counted

    arguments, retrieval, _ = parse_section(
        "coverage", DESCRIPTION, "coverage", (CoverageArguments, RetrieverArguments), words
    )
    benchmarks = [load_benchmark(spec, revision=arguments.benchmark_revision) for spec in arguments.benchmarks]
    if arguments.subset is not None:
        benchmarks = [subset(one, arguments.subset, arguments.subset_seed) for one in benchmarks]
    sources = arguments.passages or retrieval.kind.passages(retrieval)
    if not sources and not arguments.search:
        raise UserError("there is nothing to look through; name --corpus, --passages or an index, or search")
    if arguments.write_answerable is not None:
        if not sources:
            raise UserError("write_answerable needs a corpus to look through; name --corpus, --passages or an index")
        if benchmarks[0].kind != OPEN:
            raise UserError(
                f"write_answerable writes open questions, as training reads them, but {benchmarks[0].name} is "
                f"{benchmarks[0].kind}"
            )
    retriever = load_retriever(retrieval) if arguments.search else None
    if retriever is not None:
        # A server that is away should not be found out after hours over a large corpus.
        retriever.check()
    passages, total = open_corpus(sources) if sources else (None, None)
    measured = measure_coverage(benchmarks, passages, retriever, arguments.top_k, total=total)
    if sources:
        print(f"{counted(measured[0].passages or 0, 'passage')}: {', '.join(sources)}")
    if retriever is not None:
        print(f"searched: {retriever.description}")
    print(coverage_table(measured))
    if arguments.json:
        rows = [{**one.as_row(), "benchmark": bench.as_row()} for one, bench in zip(measured, benchmarks, strict=True)]
        write_json(Path(arguments.json), rows)
    if arguments.write_answerable is not None:
        path = Path(arguments.write_answerable)
        kept = write_answerable(path, benchmarks[0], measured[0])
        print(f"{path}: {kept:,} of {counted(len(benchmarks[0]), 'question')} have an answer in the corpus")
