"""The order of questions, epoch by epoch, as it is after a resume too."""

import torch
from trl.trainer.utils import RepeatSampler


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
