"""The model card of training: how to use a search agent, method settings, recipe, retriever, results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.support.log_rows import EXACT_MATCH, UNNAMED_SET, evaluated_sets
from rex_rag.support.model_index import CardResult, training_results, write_results
from rex_rag.support.tables import markdown_text
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    from rex_rag.protocols import Protocol
    from rex_rag.training.config import REXRAGConfig

PAPER = {
    "title": "REX-RAG: Reasoning Exploration with Policy Correction in Retrieval-Augmented Generation",
    "id": "2508.08149",
    "citation": textwrap.dedent("""\
        @article{jiang2025rexrag,
            title  = {{REX-RAG: Reasoning Exploration with Policy Correction in Retrieval-Augmented Generation}},
            author = {Jiang and others},
            year   = 2025,
            eprint = {2508.08149},
            archivePrefix = {arXiv},
        }"""),
}

SEARCH_R1 = {
    "title": "Search-R1: Training LLMs to Reason and Leverage Search Engines with Reinforcement Learning",
    "id": "2503.09516",
    "citation": textwrap.dedent("""\
        @article{jin2025searchr1,
            title  = {{Search-R1: Training LLMs to Reason and Leverage Search Engines with Reinforcement Learning}},
            author = {Jin and others},
            year   = 2025,
            eprint = {2503.09516},
            archivePrefix = {arXiv},
        }"""),
}
_RESULTS = (EXACT_MATCH, "em/probes", "dead_end/rate", "dead_end/rescue_rate", "searches/mean", "kl")
_PACKAGES = ("rex-rag", "trl", "transformers", "torch", "accelerate", "datasets", "peft", "vllm", "deepspeed")


def write_card(
    path: Path,
    *,
    name: str,
    args: REXRAGConfig,
    protocol: Protocol,
    retriever: str,
    recipe: str | None,
    log_history: list[dict],
    evaluation_sets: Mapping[str, tuple[int, str]],
) -> None:
    """Keep the metadata of a card just written by TRL, with the last evaluation added, and describe a search agent.

    TRL's own text shows a chat with a `pipeline`, which would not search.

    Args:
        name: of the model: its repository on the Hub, or its folder.
        protocol: what the model was trained with.
        evaluation_sets: questions of each set that training evaluated on, "" for a nameless one, and which part of a
            benchmark they are, if not all.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    card.data.pop("licence", None)  # TRL's placeholder, which names none
    base = card.data.base_model
    origin = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else "a model that is not on the Hub"
    trained, paper, _ = method_of(args)
    settings = {
        "Recipe": "none; built in Python" if recipe is None else _shareable(recipe),
        "Retriever": f"{_without_addresses(retriever)}; top-k {args.retrieval_top_k}",
        "Rollouts per question": f"{counted(args.num_originals, 'original')}, up to "
        f"{counted(args.num_probe_slots, 'probe')}",
        "Probes": f"p = {args.probe_probability}, filter {args.probe_filter}, keep ratio {args.keep_ratio} "
        f"({args.keep_ratio_schedule})",
        "Correction": args.correction_form.describe(args),
        "Budgets": f"{counted(args.max_turns, 'search', 'searches')}, {args.max_turn_tokens} tokens a turn, "
        f"{args.max_observation_tokens} an observation, {args.max_sequence_length} in all",
    }
    if not args.num_probe_slots:
        del settings["Probes"], settings["Correction"]
    decoded = "greedy" if args.num_generations_eval == 1 else "sampled"
    lines = [
        f"# {markdown_text(name)}",
        "",
        f"A language model that searches: it reasons, calls {' and '.join(protocol.tools)}, reads what comes back, "
        f"and answers (protocol `{protocol.name}`). It was trained from {origin} with {trained} (the "
        f"[paper](https://huggingface.co/papers/{paper['id']})), by the `rex_rag` package on TRL's GRPO trainer.",
        "",
        "## Use",
        "",
        "It answers only within that loop, which `rex_rag` runs over any retriever, as `agent.json` describes it:",
        "",
        "```python",
        "from rex_rag import SearchAgent",
        f'agent = SearchAgent.load({name!r}, retriever="http://127.0.0.1:8000")',
        'print(agent.ask("Where was the author of The Salt Road born?").answer)',
        "```",
        "",
        "`rex-rag ask` and `rex-rag evaluate --model` take the same defaults.",
        "",
        *_shown_text("The prompt that it was trained with", protocol.template),
        *_shown_text("What it was told after an invalid action", protocol.feedback.strip("\n")),
        "## Training",
        "",
        *(f"- {setting}: {markdown_text(value)}" for setting, value in settings.items()),
        f"- Versions: {', '.join(_versions())}",
        "",
        *_result_lines(log_history, evaluation_sets, decoded),
        "## Citation",
        "",
        "```bibtex",
        paper["citation"],
        "```",
    ]
    path.write_text(f"---\n{card.data}\n---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    if results := training_results(log_history, decoded):
        asked = {set_name or UNNAMED_SET: known for set_name, known in evaluation_sets.items()}
        write_results(path, [_with_size(one, asked.get(one.dataset_name)) for one in results], model_name=name)


def method_of(args: REXRAGConfig) -> tuple[str, dict[str, str], list[str]]:
    """What a run trains with: its name, its paper, and the tags of its model."""
    if not args.num_probe_slots:
        return "GRPO over searches (Search-R1)", SEARCH_R1, ["trl", "grpo", "search-r1"]
    name = "rescue replay, a variant of REX-RAG" if args.correction_form.replays else "REX-RAG"
    return name, PAPER, ["trl", "grpo", "rex-rag"]


def _with_size(result: CardResult, known: tuple[int, str] | None) -> CardResult:
    """A figure of a part of a benchmark must not pass for one of the whole."""
    if known is None:
        return result
    questions, part = known
    name = result.metric_name if not part else f"{result.metric_name.removesuffix(')')}; {part})"
    return replace(result, n=questions, metric_name=name)


def _result_lines(log_history: list[dict], evaluation_sets: Mapping[str, tuple[int, str]], decoded: str) -> list[str]:
    """The last logged values of each headline metric, of training questions and of each evaluation set."""
    last: dict[str, tuple[str, dict]] = {}
    for row in log_history:
        if EXACT_MATCH in row:
            last["training questions"] = "", row
        for name, prefix in evaluated_sets(row).items():
            questions, part = evaluation_sets.get(name, (None, ""))
            size = f" ({part or counted(questions, 'question')})" if questions else ""
            last[(name or UNNAMED_SET) + size] = prefix, row
    lines = []
    for where, (prefix, row) in sorted(last.items()):
        how = decoded if prefix else "sampled"
        lines += [f"Last logged of {markdown_text(where)}, {how}, at step {row.get('step')}:", ""]
        lines += ["| metric | value |", "|---|---|"]
        values = {name: row.get(prefix + name) for name in _RESULTS}
        lines += [
            f"| {name} | {value:.4f} |"
            for name, value in values.items()
            if isinstance(value, int | float) and not math.isnan(value)
        ]
        lines.append("")
    return lines or ["No results were logged before this card was written.", ""]


def _shareable(path: str) -> str:
    """Cards are published: where a file lies on somebody's machine is not for them."""
    return Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path


def _without_addresses(description: str) -> str:
    """Where a server stands is not for them either."""
    return re.sub(r"https?://[^\s,;]+", "…", re.sub(r" at https?://[^\s,;]+(, https?://[^\s,;]+)*", "", description))


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return found


def _shown_text(what: str, text: str) -> list[str]:
    """A text in a code fence longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{what}:", "", fence, text.rstrip("\n"), fence, ""]
