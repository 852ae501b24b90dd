"""A correction form of one's own: every token of a probe weighs half. `correction: own_form:Half`."""

import math

import torch

from rex_rag.correction.forms import CorrectionForm
from rex_rag.types import SegmentKind


class Half(CorrectionForm):
    name = "half"
    summary = "tokens of probes weigh a half"
    expectation = "as none, with half the say for probes"

    def log_weights(self, mixture, args):
        is_probe = (mixture.kinds == SegmentKind.PROBE).any(dim=1, keepdim=True)
        return torch.where(is_probe, math.log(0.5), 0.0).expand_as(mixture.old)
