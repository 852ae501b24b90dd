"""Notices that a policy breaks, and warns, stops, or goes back to the last good checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from rex_rag.support.errors import RunEnded
from rex_rag.support.wording import counted
from rex_rag.training.checkpoints import newest_whole, step_of
from rex_rag.training.health_figures import RECENT, Figures

logger = get_logger(__name__)

MODES = ("off", "warn", "stop", "rollback")
LEARNING_RATE_FACTOR = 0.3  # of a rollback
MOST_ROLLBACKS = 3
FURTHER_BACK = 10  # steps before the checkpoint of the last rollback, where that did not help


class Collapsed(RunEnded):
    """The policy broke; the message says by which figures, and names the last good checkpoint."""


class CollapseGuard(TrainerCallback):
    """Watches what is logged, and acts when a figure has been out of bounds in `PATIENCE` of its logs in a row.

    Args:
        mode: `"warn"` says so once; `"stop"` ends the run; `"rollback"` ends it too, and leaves in `go_back_to` the
            checkpoint from which it goes on with a lower learning rate.
        max_over_ranks: the maximum of an integer over all processes, which have to agree.
    """

    def __init__(self, mode: str, max_over_ranks: Callable[[int], int]) -> None:
        self.mode = mode
        self._max_over_ranks = max_over_ranks
        self.figures = Figures()
        self.learning_rate_scale = 1.0  # of the optimizer as it is, by rollbacks
        self._scale_wanted = 1.0
        self.rollbacks = 0
        self.go_back_to: Path | None = None
        self._went_to: int | None = None
        self.collapsed: Collapsed | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.learning_rate_scale, "first": self.figures.first, "recent": self.figures.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learning_rate_scale = state["scale"]
        self.figures = Figures(dict(state["first"]), dict(state["recent"]))
        if not self.rollbacks:  # another process's rollbacks, of which the optimizer tells
            self._scale_wanted = self.learning_rate_scale

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        self.go_back_to = self.collapsed = None
        factor = self._scale_wanted / self.learning_rate_scale
        if factor == 1.0:
            return
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr"):
                group[name] *= factor
        lr_scheduler.base_lrs = [rate * factor for rate in lr_scheduler.base_lrs]
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged of the next step
        self.learning_rate_scale = self._scale_wanted

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.mode == "off" or "loss" not in (logs or {}):
            return
        if not self._max_over_ranks(int(self.figures.add(state.global_step, logs))):
            return
        what = (
            f"step {state.global_step}: the policy seems to break, since step {self.figures.out_since}: {self.figures}"
        )
        if self.mode == "warn":
            logger.warning(
                f"{what}. Set collapse_guard to stop or rollback to act on it; docs/health.md has the bounds"
            )
            return
        control.should_training_stop = True
        control.should_save = False
        good = self._last_good(args)
        if self.mode == "rollback" and good is not None and self.rollbacks < MOST_ROLLBACKS:
            self.rollbacks += 1
            self._scale_wanted *= LEARNING_RATE_FACTOR
            self.go_back_to, self._went_to = good, step_of(good)
            logger.warning(f"{what}. Going back to {good.name}, with {self._scale_wanted:.2g} of the learning rate")
            return
        tried = f" after {counted(self.rollbacks, 'rollback')}" if self.rollbacks else ""
        named = f"the last good checkpoint is {good}" if good else f"{args.output_dir} holds no checkpoint from before"
        self.collapsed = Collapsed(
            f"{what}. Stopped{tried}; {named}. Start from it (model_name_or_path) with a lower learning_rate, or with "
            "llds_weight 0.1"
        )

    def _last_good(self, args: Any) -> Path | None:
        """The newest whole checkpoint from before the breach; further back where a rollback did not help."""
        # Figures are of rollouts from before an update: the weights of the checkpoint before these are broken already.
        updates = math.ceil(args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps)
        since = self.figures.out_since
        assert since is not None  # there is a breach
        before = since - updates
        if self._went_to is None or since - self._went_to > RECENT:
            return newest_whole(args.output_dir, before=before)
        further = newest_whole(args.output_dir, before=min(before, self._went_to - FURTHER_BACK))
        # With none there, the same one again, at a still lower rate.
        return further or newest_whole(args.output_dir, before=min(before, self._went_to + 1))
