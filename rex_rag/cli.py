"""The `rex-rag` command. Every command imports what it needs when it runs, so that help is instant.

Training is not a command: it is started by `accelerate launch -m rex_rag.train`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag import __version__
from rex_rag.commands import (
    ask,
    coverage,
    demonstrations,
    doctor,
    evaluate,
    fetch,
    pictures,
    plan,
    recipe,
    report,
    retrieval,
    watch,
)
from rex_rag.commands.terminal import positive
from rex_rag.support.errors import EXPECTED_ERROR, UserError, from_the_user, one_line
from rex_rag.support.hub import bound_hub_requests
from rex_rag.support.logs import start_logging
from rex_rag.support.options import OptionParser
from rex_rag.support.recipes import recipe_path
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    from rex_rag.evaluation.during_training import EvaluationSetArguments
    from rex_rag.retrieval.load import RetrieverArguments
    from rex_rag.training.config import REXRAGConfig

# These take whole dataclasses of options, or a recipe's part; their parsers are made when they run.
_FORWARDED = {
    "index": (retrieval.index, "build an index of a corpus"),
    "serve": (retrieval.serve, "answer searches over HTTP"),
    "evaluate": (evaluate.evaluate, "run a method over benchmarks"),
    "coverage": (coverage.coverage, "how many gold answers a corpus and a retriever hold"),
}

_ASKING_THE_HUB = ("ask", "bench", "demonstrations", "doctor", "fetch", "reliability", "search")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for errors a user can mend (one line on stderr), or its own."""
    parser = _parser()
    options, words = parser.parse_known_args(arguments)
    forwarded = options.command in _FORWARDED
    if options.command in ("check", "demonstrations", "doctor", "plan"):
        options.overrides = words
    elif options.command == "ask" and options.question is None and len(words) == 1 and words[0][:1] != "-":
        options.question = words[0]  # behind an option, where argparse no longer looks for it
    elif words and not forwarded:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    start_logging()
    if forwarded or options.command in _ASKING_THE_HUB:
        bound_hub_requests()
    try:
        code = None
        if forwarded:
            _FORWARDED[options.command][0](words)
        else:
            code = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        print(f"rex-rag {options.command}: {message}", file=sys.stderr)
        return EXPECTED_ERROR
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="rex-rag",
        description="Tools around training search agents with REX-RAG.",
        epilog="Training itself: accelerate launch --config_file recipes/accelerate_configs/NAME.yaml "
        "-m rex_rag.train --config RECIPE.yaml",
    )
    parser.add_argument("--version", action="version", version=f"rex-rag {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    check = commands.add_parser(
        "check",
        help="check a training recipe and say what it would do",
        description="Parse a recipe exactly as training does, overrides (--key value) behind it included, "
        "unknown keys refused, print what it resolves to, and what it lacks on this machine (exit code 1): model, "
        "files, columns, index, servers, GPU. Nothing is downloaded and no model is loaded.",
    )
    check.add_argument("recipe", metavar="RECIPE", help="a file, or a name that `rex-rag recipe` lists")
    check.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="work the batch out for N processes (default: 1)"
    )
    check.set_defaults(run=_check)

    for name, (_, help_text) in _FORWARDED.items():
        commands.add_parser(name, help=help_text, add_help=False)
    ask.add_ask(commands)
    retrieval.add_search(commands)
    retrieval.add_bench(commands)
    fetch.add_fetch(commands)
    demonstrations.add_demonstrations(commands)
    recipe.add_recipe(commands)
    plan.add_plan(commands)
    report.add_report(commands)
    report.add_compare(commands)
    doctor.add_doctor(commands)
    watch.add_watch(commands)
    pictures.add_view(commands)
    pictures.add_curves(commands)
    pictures.add_reliability(commands)

    hopworld = commands.add_parser(
        "hopworld",
        help="write the built-in synthetic world",
        description="Write corpus.jsonl, train.jsonl and test.jsonl of a seeded world with 1-, 2- and 3-hop "
        "questions, in the FlashRAG layout. Whatever is left out takes HopWorldConfig's default.",
    )
    hopworld.add_argument("--output", required=True, metavar="DIR", type=Path, help="directory to write into")
    hopworld.add_argument("--seed", type=int, help="names one world")
    hopworld.add_argument("--overwrite-output-dir", action="store_true", help="replace a world that is there")
    for size in ("people", "cities", "organisations", "countries"):
        hopworld.add_argument(f"--{size}", type=int, metavar="N", help=f"how many {size} the world has")
    for split in ("train", "test"):
        hopworld.add_argument(
            f"--{split}-questions",
            type=int,
            nargs=3,
            metavar=("ONE", "TWO", "THREE"),
            help=f"how many {split} questions with one, two and three hops",
        )
    hopworld.set_defaults(run=_hopworld)

    prompts = commands.add_parser(
        "prompts",
        help="print the built-in exploration prompts",
        description="Print the built-in exploration prompts, one a line: the format that `exploration_prompts` reads. "
        "Redirect them into a file to start a pool of your own.",
    )
    prompts.set_defaults(run=_prompts)
    return parser


def _hopworld(options: argparse.Namespace) -> None:
    from rex_rag.quickstart.hopworld import WORLD_FILES, HopWorldConfig, build_hopworld, write_hopworld

    names = ("seed", "people", "cities", "organisations", "countries", "train_questions", "test_questions")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    there = [name for name in WORLD_FILES if (options.output / name).exists()]
    if there and not options.overwrite_output_dir:
        raise UserError(
            f"{options.output} holds {', '.join(there)} already, of this or another world; name another --output, or "
            "replace them with --overwrite_output_dir"
        )
    world = build_hopworld(HopWorldConfig(**given))
    directory = write_hopworld(world, options.output)
    print(
        f"{directory}: world {world.config.seed} with {counted(len(world.passages), 'passage')}, "
        f"{len(world.train):,} train and {counted(len(world.test), 'test question')}"
    )


def _prompts(options: argparse.Namespace) -> None:
    from rex_rag.probes.pool import DEFAULT_POOL

    for prompt in DEFAULT_POOL:
        print(prompt)


def _check(options: argparse.Namespace) -> int:
    options.recipe = recipe_path(options.recipe)
    _refuse_other_recipes(options.recipe)
    from rex_rag.training.preflight import examine, read_settings

    found = examine(read_settings(["--config", str(options.recipe), *options.overrides]))
    if found.settings:
        raise UserError("; ".join(found.settings))

    from trl import TrlParser

    from rex_rag.training.recipe import RECIPE_PARTS

    parser = TrlParser(
        RECIPE_PARTS,
        prog="rex-rag check",
        usage=argparse.SUPPRESS,  # some two hundred options, shown before the one line that matters
    )
    # use_cpu: the recipe is checked, not whether this machine has the GPU that the recipe wants.
    with from_the_user():
        questions, evaluation, retriever, config, model, unknown, words = parser.parse_args_and_config(
            ["--config", str(options.recipe), *options.overrides, "--use_cpu", "true"],
            return_remaining_strings=True,
            separate_remaining_strings=True,
        )
    if unknown or words:
        raise UserError(f"words without a key: {' '.join([*unknown, *words])}; write --key value")
    sources = [" ".join(filter(None, (entry.path, entry.name, entry.split))) for entry in questions.datasets]
    lines = {
        "model": str(model.model_name_or_path),
        "questions": "; ".join(sources),
        **_evaluation_lines(evaluation, config),
        **_retriever_lines(retriever, config.retrieval_top_k),
        **_method_lines(config),
        **_batch_lines(config, options.processes),
    }
    width = shutil.get_terminal_size((119, 24)).columns
    lacking = found.here + found.waiting
    print(f"{options.recipe} is valid{', but this machine lacks what it needs' if lacking else ''}")
    for name, value in [*lines.items(), *(("lacking", problem) for problem in lacking)]:
        print(_wrapped(name, value, width))
    return int(bool(lacking))


def _refuse_other_recipes(recipe: Path) -> None:
    """Raise `ValueError` for a recipe of another command, naming that command."""
    import yaml

    with recipe.open(encoding="utf-8") as file:  # a file, so that an error in it names it
        content = yaml.safe_load(file)
    parts = [name for name in _FORWARDED if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if parts:
        commands = " and ".join(f"`rex-rag {name} --config {recipe}`" for name in parts)
        dry_run = "; `--dry-run` behind the first says what it would take" if parts[0] == "index" else ""
        raise UserError(
            f"{recipe} is no training recipe: it has the part{'s' * (len(parts) > 1)} "
            f"{' and '.join(f'`{name}:`' for name in parts)}, for {commands}{dry_run}"
        )


def _retriever_lines(retriever: RetrieverArguments, top_k: int) -> dict[str, str]:
    said = f"{retriever.name}, top {top_k}"
    if retriever.rerank_model is None:
        return {"retriever": said}
    return {
        "retriever": said,
        "re-ranking": f"the first {counted(retriever.rerank_candidates, 'passage')} by {retriever.rerank_model}",
    }


def _method_lines(config: REXRAGConfig) -> dict[str, str]:
    budget = (
        f"at most {counted(config.max_turns, 'search', 'searches')}; tokens: prompt {config.max_prompt_length}, turn "
        f"{config.max_turn_tokens}, observation {config.max_observation_tokens}, {config.max_sequence_length} in all"
    )
    if not config.num_probe_slots:
        return {
            "rollout": budget,
            "group": f"{counted(config.num_originals, 'original')} a question",
            "probes": "off: Search-R1's GRPO",
        }
    if config.probe_filter == "none":
        kept = "all kept"
    else:
        ranking = "best by prompt likelihood" if config.probe_filter == "likelihood" else "drawn at random"
        kept = f"at most {config.keep_ratio:g} x originals kept, {ranking}"
    if config.keep_ratio_schedule != "constant":
        kept += f" ({config.keep_ratio_schedule})"
    return {
        "rollout": budget,
        "group": f"{counted(config.num_originals, 'original')} + "
        f"{counted(config.num_probe_slots, 'probe slot')} a question",
        "probes": f"of failed originals with probability {config.probe_probability:g}, {kept}; pool of "
        f"{counted(len(config.exploration_pool()), 'prompt')}",
        "correction": config.correction_form.describe(config),
    }


def _evaluation_lines(evaluation: EvaluationSetArguments, config: REXRAGConfig) -> dict[str, str]:
    from rex_rag.evaluation.during_training import check_strategy

    check_strategy(evaluation, config.eval_strategy)
    if not evaluation.eval_benchmarks:
        return {}
    part = "" if evaluation.eval_subset is None else f", {counted(evaluation.eval_subset, 'question')} of each"
    strategy = config.eval_strategy.value
    when = f"every {counted(config.eval_steps, 'step')}" if strategy == "steps" else f"every {strategy}"
    names = ", ".join(map(str, evaluation.eval_benchmarks))
    return {"evaluation": f"{names}{part}; {when}, {counted(config.num_generations_eval, 'rollout')} a question"}


def _batch_lines(config: REXRAGConfig, processes: int) -> dict[str, str]:
    """The arithmetic between TRL's micro-batches and the paper's generation steps."""
    rows = config.per_device_train_batch_size * config.steps_per_generation * processes
    questions = rows // config.num_generations
    updates = config.steps_per_generation * config.num_iterations / config.gradient_accumulation_steps
    originals = questions * config.num_originals
    kept = _most_probes(config, questions)
    trajectories = f"{originals * config.num_iterations / updates:,.0f}"
    beside = questions * config.num_probe_slots if config.correction_form.replays else kept
    if beside:
        trajectories += f" to {(originals + beside) * config.num_iterations / updates:,.0f}"
    dropping = " (fewer once empty probe slots are dropped)" if config.num_probe_slots else ""
    lines = {
        "generation": f"{counted(questions, 'question')} x {counted(config.num_generations, 'row')} = "
        f"{counted(rows, 'row')} over {counted(processes, 'process', 'processes')}",
        "optimisation": f"{counted(updates, 'update')} a generation, "
        f"each of {trajectories} trajectories (reference: 256), that is "
        f"{counted(questions * config.num_iterations / updates, 'question')}, in micro-batches of "
        f"{counted(config.per_device_train_batch_size, 'row')}{dropping}",
    }
    if config.num_probe_slots and config.probe_filter != "none":
        lines["filter"] = f"at most {counted(kept, 'probe')} kept of {counted(originals, 'original')} a generation" + (
            "" if kept else ": NONE, enlarge the generation batch"
        )
    if config.max_steps > 0:
        lines["training"] = (
            f"{counted(config.max_steps, 'update')} = {counted(config.max_steps / updates, 'generation')}"
        )
    else:
        lines["training"] = counted(config.num_train_epochs, "epoch")
    lines["training"] += f", learning rate {config.learning_rate:g}, KL {config.beta:g}, output {config.output_dir}"
    return lines


def _most_probes(config: REXRAGConfig, questions: int) -> int:
    """The largest number of probes that a generation of so many questions can keep."""
    from rex_rag.probes.filter import keep_count

    slots = questions * min(config.num_probe_slots, config.num_originals)
    if config.probe_filter == "none":
        return slots
    return min(slots, keep_count(config.keep_ratio, questions * config.num_originals))


def _wrapped(name: str, value: str, width: int) -> str:
    import textwrap

    return textwrap.fill(value, max(width, 40), initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)


if __name__ == "__main__":
    raise SystemExit(main())
