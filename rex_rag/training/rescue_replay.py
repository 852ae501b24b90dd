"""Rescue replay: rescues of dead ends, and right originals, of the newest steps, imitated beside GRPO on originals.

In a dead end every advantage of GRPO is 0, and a right importance weight takes nearly all gradient from a probe: what
is learnt there is learnt by a bias. This one is chosen and bounded. The loss is

    GRPO's on the originals + mean NLL of rescues + hold_weight * mean NLL of right originals,

where a rescue is a right probe of a dead end without its inserted thought, the means run over the tokens of the rows
drawn at a step, and the last term keeps the policy from forgetting the questions that it answers. Rows are drawn
uniformly from those of the last `MAX_AGE` steps. So a run without rescues is plain GRPO, to the bit, and becomes it
again `MAX_AGE` steps after its last dead end. See docs/reproduction.md for what was measured; relatives are
self-imitation learning (arXiv 1806.05635) and context distillation (arXiv 2209.15189).

Invariant: every process holds the same rows and draws the same ones, from (seed, step) and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from rex_rag.probes.mixed_sampling import MixedBatch
from rex_rag.types import Segment, SegmentKind, Trajectory

MAX_AGE = 50  # steps that a row is drawn from
KEPT = 8  # rows kept, in multiples of those drawn at a step


class Role(IntEnum):
    """What a row is to the loss; the values stand in tensors."""

    SAMPLED = 0  # this step's, by its advantage
    RESCUE = 1
    RIGHT = 2  # a right original


@dataclass(frozen=True, slots=True)
class Imitated:
    """A row to be imitated: its tokens alone, without texts and log-probabilities. `step` is its own."""

    step: int
    role: Role
    trajectory: Trajectory

    @classmethod
    def of(cls, step: int, role: Role, trajectory: Trajectory) -> Imitated:
        segments = [replace(segment, text="", logprobs=None) for segment in trajectory.segments]
        return cls(step, role, Trajectory(list(trajectory.prompt_ids), segments))

    @property
    def tokens(self) -> int:
        """Trained ones."""
        return sum(self.trajectory.trained_mask)

    def state(self) -> list:
        segments = [[int(segment.kind), segment.ids] for segment in self.trajectory.segments]
        return [self.step, int(self.role), self.trajectory.prompt_ids, segments]

    @classmethod
    def from_state(cls, state: list) -> Imitated:
        step, role, prompt_ids, segments = state
        trajectory = Trajectory(prompt_ids, [Segment(SegmentKind(kind), ids, "") for kind, ids in segments])
        return cls(step, Role(role), trajectory)


class RescueReplay:
    """The rows that are imitated.

    Args:
        rows: how many are drawn at a step, over all processes: a third of them rescues, where there are so many.
        seed: of the draws.
        gather: one object per process -> the list of all processes' objects, in rank order.
    """

    def __init__(self, rows: int, seed: int, gather: Callable[[object], list] = lambda item: [item]) -> None:
        self._shares = {Role.RESCUE: max(1, rows // 3), Role.RIGHT: rows - max(1, rows // 3)}
        self._kept: dict[Role, deque[Imitated]] = {
            role: deque(maxlen=KEPT * share) for role, share in self._shares.items()
        }
        self._seed = seed
        self._gather = gather

    def add(self, batches: Iterable[MixedBatch], originals: int, step: int) -> None:
        """Keep what this process sampled at a step, and what the others did. A collective.

        Args:
            batches: this process's, `originals` adjacent originals a question.
        """
        found: list[Imitated] = []
        for batch in batches:
            dead = [
                not any(batch.correct[first : first + originals]) for first in range(0, len(batch.correct), originals)
            ]
            found += [
                Imitated.of(step, Role.RIGHT, original)
                for original, right in zip(batch.originals, batch.correct, strict=True)
                if right
            ]
            found += [
                Imitated.of(step, Role.RESCUE, probe.trained or probe)
                for probe, right in zip(batch.probes, batch.probe_correct, strict=True)
                if right and dead[probe.origin // originals]
            ]
        for row in (row for part in self._gather(found) for row in part):
            self._kept[row.role].append(row)
        for rows in self._kept.values():
            while rows and rows[0].step <= step - MAX_AGE:
                rows.popleft()

    def draw(self, step: int) -> list[Imitated]:
        """The rows of a step, over all processes; none while there is no rescue."""
        if not self._kept[Role.RESCUE]:
            return []
        # The last number tells this use of the seed from others; numpy takes missing trailing numbers for zeros.
        generator = np.random.default_rng([self._seed, step, 4])
        drawn = []
        for role, rows in self._kept.items():
            chosen = generator.permutation(len(rows))[: self._shares[role]]
            drawn += [rows[index] for index in chosen]
        return [drawn[index] for index in generator.permutation(len(drawn))]  # spread over processes

    def state_dict(self) -> dict[str, Any]:
        return {role.name.lower(): [row.state() for row in rows] for role, rows in self._kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for role, rows in self._kept.items():
            rows.clear()
            rows.extend(Imitated.from_state(row) for row in state[role.name.lower()])


def imitation_advantages(drawn: Sequence[Imitated], all_tokens: float, hold_weight: float) -> dict[Role, float]:
    """What stands in the place of advantages, by role, so that the loss holds the mean NLL of the rows drawn.

    At a ratio of 1 the gradient of a token's loss is -advantage * grad log pi, and the loss is the mean over the
    tokens of the batch.

    Args:
        drawn: the rows of the step, over all processes.
        all_tokens: trained tokens of the batch, these rows' included.
        hold_weight: of the mean NLL of right originals; that of rescues counts 1.
    """
    weights = {Role.RESCUE: 1.0, Role.RIGHT: hold_weight}
    tokens = {role: sum(row.tokens for row in drawn if row.role is role) for role in weights}
    return {role: weight * all_tokens / tokens[role] if tokens[role] else 0.0 for role, weight in weights.items()}


def without_ratio(old: torch.Tensor, per_token_logps: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
    """log pi_old under which imitated rows have a ratio of 1 at every update: imitation knows no clip.

    Args:
        old: (B, T).
        per_token_logps: (B, T) log pi_theta.
        roles: (B,) of `Role`.
    """
    return torch.where(roles.unsqueeze(1) == Role.SAMPLED, old, per_token_logps.detach())


def nll_sums(per_token_logps: torch.Tensor, mask: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
    """Sum of -log pi and count of trained tokens, of rescues and of right originals, (4,) float32."""
    chosen = [(roles == role).unsqueeze(1) & mask.bool() for role in (Role.RESCUE, Role.RIGHT)]
    return torch.stack(
        [value for where in chosen for value in (-per_token_logps[where].float().sum(), where.sum().float())]
    )
