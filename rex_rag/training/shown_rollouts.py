"""A few rollouts of a step on screen (`log_completions`), in place of TRL's table of columns two letters wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from rex_rag.support.numbers import is_number
from rex_rag.support.wording import visible

_CHARACTERS = 2000  # of a trajectory; the whole of it is on disk, under completions/


def print_rollouts(
    prompts: Sequence,
    completions: Sequence,
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float] | None,
    step: int,
    num_samples: int | None = None,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Write rollouts from all of the completion table's length; called with TRL's arguments, by TRL.

    Args:
        num_samples: how many; `None` means all.
        extra: the table's further columns.
    """
    count, columns = len(prompts), extra or {}
    shown = count if num_samples is None else min(num_samples, count)

    def cell(name: str, row: int) -> Any:
        column = columns.get(name)
        return column[row] if column is not None and row < len(column) else None

    for row in (place * count // shown for place in range(shown)):
        kind = "probe" if cell("is_probe", row) else "original"
        figures = {name: values[row] for name, values in rewards.items()} | {
            "advantage": advantages and advantages[row]
        }
        said = [
            f"gold: {' | '.join(cell('golden_answers', row) or [])}",
            f"answer: {cell('predicted_answer', row) or '(none)'}",
            *(f"{name} {value:.2f}" for name, value in figures.items() if is_number(value)),
        ]
        text = str(cell("trajectory", row) or completions[row])
        more = f"\n… and {len(text) - _CHARACTERS:,} characters: rex-rag view" if len(text) > _CHARACTERS else ""
        head = f"--- step {step}, rollout {row + 1} of {count}, {kind}: {cell('question', row)}"
        body = textwrap.indent(f"{'  '.join(said)}\n{text[:_CHARACTERS].strip()}{more}", "    ")
        tqdm.write(visible(f"{head}\n{body}"))
