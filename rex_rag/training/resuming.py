"""A trainer whose resumed runs equal uninterrupted ones, in every epoch and on any number of processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from rex_rag.training.checkpoints import find_checkpoint, other_processes, set_aside_later

logger = get_logger(__name__)

REFERENCE_ADAPTER = "ref"  # TRL's name for it


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order follows from (seed, epoch) and not from how often it was iterated over.

    The only change w.r.t. [`~trl.trainer.utils.RepeatSampler`] is that epoch e has the e-th permutation of the seed's
    generator, which is what an uninterrupted run gets there; a resumed one would begin with the first again.
    """

    epoch = 0

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class ResumableTrainer(GRPOTrainer):
    """A GRPOTrainer that resumes from whole checkpoints alone and then asks what comes next."""

    _train_sampler: EpochSampler | None = None  # a stream has none

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in the parent, without TRL's frozen copy of an adapter that goes on being trained.

        Every run makes it from what it starts with; a resume would load the copy and not the adapter.
        """
        super()._save(output_dir, state_dict)
        if REFERENCE_ADAPTER in getattr(self.accelerator.unwrap_model(self.model), "peft_config", ()):
            shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE_ADAPTER, ignore_errors=True)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """As in the parent, but for the sampler's class."""
        parent = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        self._train_sampler = EpochSampler(**{name: getattr(parent, name) for name in names})
        return self._train_sampler

    def _run_epoch(self, *, epoch: int, epochs_trained: int, steps_trained_in_current_epoch: int, **others: Any):
        """As in the parent, with the sampler told its epoch, and micro-batches counted on from the checkpoint's.

        Told here, since accelerate's `set_epoch` does not reach a sampler behind skipped batches on several processes.
        TRL counts micro-batches from 0 in a resumed run: resumed within a generation batch, it would for good ask
        each question some steps late.
        """
        if self._train_sampler is not None:
            self._train_sampler.epoch = epoch
        if epoch == epochs_trained:
            self._step = epoch * others["steps_in_epoch"] + steps_trained_in_current_epoch
            self._buffered_inputs = None  # an earlier call of `train` may have left some
        return super()._run_epoch(
            epoch=epoch,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            **others,
        )
