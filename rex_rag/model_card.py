"""What REX-RAG adds to TRL's model card: method settings, recipe, retriever, results."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.card_results import training_results, write_results

if TYPE_CHECKING:
    from rex_rag.config import REXRAGConfig

PAPER = {
    "title": "REX-RAG: Reasoning Exploration with Policy Correction in Retrieval-Augmented Generation",
    "id": "2508.08149",
    "citation": textwrap.dedent("""\
        @article{jiang2025rexrag,
            title  = {{REX-RAG: Reasoning Exploration with Policy Correction in Retrieval-Augmented Generation}},
            author = {Jiang and others},
            year   = 2025,
            eprint = {arXiv:2508.08149},
        }"""),
}

_HEADING = "## Method and results"
_RESULTS = ("em/originals", "em/probes", "dead_end/rate", "dead_end/rescue_rate", "searches/mean", "kl")


def append_method_section(
    path: Path, *, args: REXRAGConfig, retriever: str, recipe: str | None, log_history: list[dict]
) -> None:
    """Append the section to a card just written by TRL, and the last evaluation to its metadata."""
    settings = {
        "Method": "REX-RAG (arXiv 2508.08149)" if args.num_probe_slots else "Search-R1 GRPO (probes off)",
        "Recipe": recipe or "none; built in Python",
        "Retriever": f"{retriever}; top-k {args.retrieval_top_k}",
        "Rollouts per question": f"{args.num_originals} originals, up to {args.num_probe_slots} probes",
        "Probes": f"p = {args.probe_probability}, filter {args.probe_filter}, keep ratio {args.keep_ratio} "
        f"({args.keep_ratio_schedule})",
        "Correction": f"{args.correction}, probe density {args.probe_density}",
        "Budgets": f"{args.max_turns} searches, {args.max_turn_tokens} tokens a turn, "
        f"{args.max_observation_tokens} an observation, {args.max_sequence_length} in all",
    }
    lines = ["", _HEADING, "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    lines += _result_lines(log_history)
    card = path.read_text(encoding="utf-8")
    path.write_text(card.rstrip() + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    if results := training_results(log_history):
        write_results(path, results, model_name=path.resolve().parent.name)


def _result_lines(log_history: list[dict]) -> list[str]:
    """The last logged value of each headline metric, on training questions unless the row is an evaluation."""
    lines = []
    for prefix, where in (("", "training questions, sampled"), ("eval_", "evaluation questions, sampled")):
        rows = [row for row in log_history if f"{prefix}em/originals" in row]
        if not rows:
            continue
        values = {name: rows[-1].get(prefix + name) for name in _RESULTS}
        lines += [f"Last logged values ({where}, step {rows[-1].get('step')}):", "", "| metric | value |", "|---|---|"]
        lines += [
            f"| {name} | {value:.4f} |"
            for name, value in values.items()
            if isinstance(value, int | float) and not math.isnan(value)
        ]
        lines.append("")
    return lines or ["No results were logged before this card was written."]
