"""A trainer whose resumed runs equal uninterrupted ones, in every epoch and on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from rex_rag.training.checkpoints import find_checkpoint, other_processes, refuse_other_engine, set_aside_later
from rex_rag.training.collapse_guard import CollapseGuard
from rex_rag.training.grpo_seams import GRPOSeams
from rex_rag.training.interruption import StopOnSignal
from rex_rag.training.progress_line import ProgressLine
from rex_rag.training.run_log import RunLog
from rex_rag.training.run_settings import changed_settings, recorded_settings
from rex_rag.training.trackers import guard_trackers
from rex_rag.training.watchdog import watched

logger = get_logger(__name__)


class ResumableTrainer(GRPOSeams):
    """A GRPOTrainer that resumes from whole checkpoints alone and then asks what comes next.

    Subclasses set `run_settings`, what the run is made of, and put it into their own state.
    """

    run_settings: Mapping[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_on_signal = StopOnSignal(self.max_over_ranks)
        self.collapse_guard = CollapseGuard(self.args.collapse_guard, self.max_over_ranks)
        for printed in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # every metric of every log
            self.remove_callback(printed)
        for callback in (RunLog(), ProgressLine(), self.stop_on_signal, self.collapse_guard):
            self.add_callback(callback)
        guard_trackers(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in the parent; `True` takes the newest whole checkpoint, and what lies beyond it is put aside.

        Raises:
            CheckpointError: for a checkpoint that is missing, damaged or another engine's, and where there is none.
            ValueError: for a setting that changed and could have no effect.
            RunEnded: where a signal ended the run, numbers that are none, or a policy that breaks.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            refuse_other_engine(checkpoint, self.args)
            if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                logger.warning(
                    "the questions are a stream, of which a resumed run finds its place in the first pass only: later "
                    "it begins a pass anew, and asks other questions than an uninterrupted run. Use a Dataset"
                )
            if count := other_processes(checkpoint, self.args.world_size):
                logger.warning(
                    f"{checkpoint} was written by {count} process(es) and is resumed by {self.args.world_size}: "
                    "batches and draws differ from those of an uninterrupted run"
                )
            for change in changed_settings(recorded_settings(checkpoint) or self.run_settings, self.run_settings):
                logger.warning(f"since {Path(checkpoint).name} was written, a setting changed: {change}")
            self._put_aside(checkpoint)
        while True:
            output = self._train_watched(checkpoint, *args, **kwargs)
            back = self.collapse_guard.go_back_to
            if back is None:
                return output
            checkpoint = str(back)
            self._put_aside(checkpoint)

    def _train_watched(self, checkpoint: str | None, *args: Any, **kwargs: Any):
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        with (
            watched(self.args.watchdog_seconds, rank, processes, lambda: self.state.global_step + 1),
            self.stop_on_signal.listening(),
        ):
            output = super().train(checkpoint, *args, **kwargs)
        for ended in (self.stop_on_signal.stopped, self.collapse_guard.collapsed):
            if ended is not None:
                raise ended
        return output

    def _put_aside(self, checkpoint: str) -> None:
        self.accelerator.wait_for_everyone()  # all have found it before anything is moved
        if self.is_world_process_zero():
            set_aside_later(self.args.output_dir, checkpoint)
        self.accelerator.wait_for_everyone()
