"""A trainer whose resumed runs equal uninterrupted ones, in every epoch and on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.logging import get_logger

from rex_rag.training.checkpoints import find_checkpoint, other_processes, set_aside_later
from rex_rag.training.grpo_seams import GRPOSeams

logger = get_logger(__name__)


class ResumableTrainer(GRPOSeams):
    """A GRPOTrainer that resumes from whole checkpoints alone and then asks what comes next."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in the parent; `True` takes the newest whole checkpoint, and what lies beyond it is put aside.

        Raises:
            CheckpointError: for a checkpoint that is missing or damaged, and where there is none.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
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
            self.accelerator.wait_for_everyone()  # all have found it before anything is moved
            if self.is_world_process_zero():
                set_aside_later(self.args.output_dir, checkpoint)
            self.accelerator.wait_for_everyone()
        return super().train(checkpoint, *args, **kwargs)
