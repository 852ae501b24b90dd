"""Originals and probes laid into the fixed rows of a question's group, and the tensors that describe them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rex_rag.correction.densities import PADDING_KIND
from rex_rag.probes.mixed_sampling import MixedBatch
from rex_rag.training.rescue_replay import Imitated, Role
from rex_rag.types import SegmentKind, Trajectory


@dataclass(slots=True)
class Slots:
    """One process's generation batch: a rollout per row, `None` in a probe slot that no probe filled.

    `replayed` holds what is imitated, by row of a probe slot, where the correction form keeps probes out of the loss.
    `live` holds the indices of the rows to score and optimise, equally many on every process; `None` means all.
    `discarded` holds what was sampled for it and replaced by dynamic sampling.
    """

    rows: Sequence[Trajectory | None]
    batch: MixedBatch
    replayed: dict[int, Imitated] | None = None
    live: torch.Tensor | None = None
    discarded: MixedBatch | None = None

    @property
    def filled(self) -> list[Trajectory]:
        return [row for row in self.rows if row is not None]

    @property
    def trained(self) -> list[Trajectory | None]:
        """What enters the loss in the rows' places, `None` where nothing does."""
        if self.replayed is None:
            return [row and (row.trained or row) for row in self.rows]
        originals = [None if row is None or row.is_probe else row for row in self.rows]
        return [
            self.replayed[index].trajectory if index in self.replayed else row for index, row in enumerate(originals)
        ]

    @property
    def roles(self) -> torch.Tensor:
        """(B,) what every row is to the loss."""
        replayed = self.replayed or {}
        return torch.tensor(
            [replayed[index].role if index in replayed else Role.SAMPLED for index in range(len(self.rows))]
        )

    @property
    def sampled(self) -> list[Trajectory]:
        """All that was sampled for the batch."""
        if self.discarded is None:
            return self.filled
        return [*self.filled, *self.discarded.originals, *self.discarded.probes]


def original_rows(num_rows: int, group: int, originals: int) -> list[int]:
    """The rows of originals: the first `originals` of every group of `group` adjacent rows."""
    return [row for row in range(num_rows) if row % group < originals]


def lay_out(batch: MixedBatch, num_rows: int, group: int, originals: int) -> list[Trajectory | None]:
    """Originals first, then the question's kept probes, then empty slots."""
    rows: list[Trajectory | None] = [None] * num_rows
    for row, original in zip(original_rows(num_rows, group, originals), batch.originals, strict=True):
        rows[row] = original
    for probe in batch.probes:
        slot = probe.origin // originals * group + originals
        while rows[slot] is not None:
            slot += 1
        rows[slot] = probe
    return rows


def live_rows(rows: list[Trajectory | None], largest_count: int, steps: int) -> torch.Tensor | None:
    """Filled rows, topped up with empty ones so that every process has equally many and they split evenly.

    Args:
        rows: one process's rows.
        largest_count: the number of filled rows of the process that has most.
        steps: the number of mini-batches that the rows are split into.

    Returns:
        Sorted row indices, or `None` where that would be every row.
    """
    count = -(-largest_count // steps) * steps
    if count >= len(rows):
        return None
    filled = [index for index, row in enumerate(rows) if row is not None]
    empty = [index for index, row in enumerate(rows) if row is None]
    return torch.tensor(sorted(filled + empty[: count - len(filled)]))


def describe_rows(slots: Slots, shape: torch.Size, device: torch.device) -> dict[str, torch.Tensor]:
    """What the correction needs beside log-probabilities.

    Returns:
        `segment_kinds` (B, T) int8 and `pool_logps` (B, T) float32, row by row, and the scalars `failure_rate` (z)
        and `mixing_share` (a) of the global batch.
    """
    kinds = torch.full(shape, PADDING_KIND, dtype=torch.int8)
    pool_logps = torch.zeros(shape, dtype=torch.float32)
    for index, row in enumerate(slots.trained):
        if row is None:
            continue
        row_kinds = torch.tensor(row.kinds, dtype=torch.int8)
        kinds[index, : len(row_kinds)] = row_kinds
        if row.is_probe and row.pool_logprobs is not None:  # a form that reads none takes any explorer
            pool_logps[index, kinds[index] == SegmentKind.PROBE] = torch.tensor(row.pool_logprobs)
    return {
        "segment_kinds": kinds.to(device),
        "pool_logps": pool_logps.to(device),
        "failure_rate": torch.tensor(slots.batch.failure_rate, dtype=torch.float64),
        "mixing_share": torch.tensor(slots.batch.mixing_share, dtype=torch.float64),
    }


def completion_columns(slots: Slots, inputs: Sequence[Mapping], rank: int) -> dict[str, list]:
    """What TRL's completion table says of every row beside its own columns, for `rex-rag view`.

    `rollout` names a row of the step, and `parent` the row that a probe was cut from, behind its first `cut` tokens.
    `segments` and `tool_uses` are JSON.
    """
    rows = slots.rows
    names = {id(row): f"{rank}.{place}" for place, row in enumerate(rows) if row is not None}
    originals = slots.batch.originals
    parents = [None if row is None or row.parent is None else names[id(originals[row.parent])] for row in rows]
    return {
        "rollout": [row and names[id(row)] for row in rows],
        "parent": parents,
        "cut": [row and row.cut for row in rows],
        "tool_uses": [json.dumps(row.search_rows()) if row else None for row in rows],
        "question": [example["question"] for example in inputs],
        "golden_answers": [list(example["golden_answers"]) for example in inputs],
        "trajectory": [row.render() if row else None for row in rows],
        "segments": [json.dumps(row.segment_texts()) if row else None for row in rows],
        "predicted_answer": [row.answer if row else None for row in rows],
    }


def drop_empty_rows(columns: Sequence[deque], empty: Sequence[bool]) -> None:
    """Leave trajectories in the table, and not the slots that no probe filled; in place."""
    for column in columns:
        values = list(column) or [None] * len(empty)  # a reward function may log a column now and then only
        column.clear()
        column.extend(value for value, is_empty in zip(values, empty, strict=True) if not is_empty)
