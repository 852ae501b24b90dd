"""Evaluation sets that training looks at while it runs: the same benchmarks and subsets as a `rex-rag evaluate` takes.

What training reports of them (`eval_<name>_em/originals`) is of sampled rollouts at the training temperature, so it is
a view of how training goes; the figure to publish is a `rex-rag evaluate` run's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rex_rag.data.qa import check_count
from rex_rag.data.question_rows import QuestionError
from rex_rag.evaluation.benchmarks import MULTIPLE_CHOICE, benchmark_specs, load_benchmark, subset

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class EvaluationSetArguments:
    """Which benchmarks training evaluates on, every `eval_steps`.

    Raises:
        QuestionError: for a subset below 1.
    """

    eval_benchmarks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Open benchmarks to evaluate on while training, as `rex-rag evaluate` takes them: names of the "
            "seven, NAME=FILE.jsonl, a file, a .yaml description. Needs eval_strategy."
        },
    )
    eval_subset: int | None = field(
        default=None,
        metadata={"help": "Only so many questions of each, the same ones as `rex-rag evaluate --subset` asks."},
    )
    eval_subset_seed: int = field(default=0, metadata={"help": "Names one subset."})

    def __post_init__(self) -> None:
        self.eval_benchmarks = benchmark_specs(self.eval_benchmarks)
        if self.eval_benchmarks == ["none"]:  # a command line has no other word for leaving out what a recipe names
            self.eval_benchmarks = []
        check_count(self.eval_subset, "eval_subset")


def check_strategy(arguments: EvaluationSetArguments, eval_strategy: str) -> None:
    """Raise `QuestionError` for benchmarks that would never be looked at, and for an evaluation with none to see."""
    if arguments.eval_benchmarks and eval_strategy == "no":
        raise QuestionError(
            f"eval_benchmarks is {arguments.eval_benchmarks}, but eval_strategy is 'no', so that they would never be "
            "looked at; set eval_strategy: steps and eval_steps, or leave eval_benchmarks out (--eval_benchmarks none "
            "where a recipe names it)"
        )
    if not arguments.eval_benchmarks and eval_strategy != "no":
        shown = getattr(eval_strategy, "value", eval_strategy)  # the trainer's arguments hold an enumeration
        raise QuestionError(
            f"eval_strategy is '{shown}', but eval_benchmarks names nothing to evaluate on; name benchmarks, "
            "or set eval_strategy to 'no'"
        )


def check_best_metric(names: Collection[str], metric: str | None) -> None:
    """Raise `QuestionError` for a metric to choose the best model by that is of none of the evaluation sets.

    The trainer would notice after its first evaluation. Its default, `loss`, is of a nameless set.
    """
    if metric is None or any(metric.removeprefix("eval_").startswith(f"{name}_") for name in names):
        return
    raise QuestionError(
        f"metric_for_best_model is {metric!r}, which no evaluation set has ({', '.join(names)}); "
        f"name the set and the metric, such as {' or '.join(f'eval_{name}_em/originals' for name in names)}"
    )


def load_evaluation_sets(arguments: EvaluationSetArguments, eval_strategy: str) -> dict[str, Dataset] | None:
    """The benchmarks by name, with the columns id, question, golden_answers, as `REXRAGTrainer` takes them.

    A set's `info.description` says which part of the benchmark it is; nothing for all of it.

    Args:
        eval_strategy: of the trainer's arguments.

    Returns:
        `None` where no benchmark is named.

    Raises:
        QuestionError: for a benchmark that cannot be loaded, is multiple choice (its reward is not exact match), or
            stands there twice; see also `check_strategy`.
    """
    from datasets import Dataset, DatasetInfo

    check_strategy(arguments, eval_strategy)
    if not arguments.eval_benchmarks:
        return None
    sets: dict[str, Dataset] = {}
    for spec in arguments.eval_benchmarks:
        benchmark = load_benchmark(spec)
        if benchmark.kind == MULTIPLE_CHOICE:
            raise QuestionError(
                f"{benchmark.name} is multiple choice, which training's reward, exact match, does not measure; leave "
                "it to `rex-rag evaluate`"
            )
        if benchmark.name in sets:
            raise QuestionError(f"two of eval_benchmarks are called {benchmark.name!r}; name one as NAME=FILE")
        if arguments.eval_subset is not None:
            benchmark = subset(benchmark, arguments.eval_subset, arguments.eval_subset_seed)
        sets[benchmark.name] = Dataset.from_list(
            [
                {"id": question.id, "question": question.question, "golden_answers": list(question.golden_answers)}
                for question in benchmark.questions
            ],
            info=DatasetInfo(description=benchmark.subset or ""),
        )
    return sets
