"""The loss's part of the trainer: TRL's loss on inputs realigned to the mixture, and what is logged of it."""

from __future__ import annotations

import time
from typing import Any

import torch

from rex_rag.correction.densities import CLIPPED_LOSSES, weight_statistics
from rex_rag.correction.kl import bounded_reference
from rex_rag.correction.realignment import Realignment, loss_mask, realign
from rex_rag.training.evaluation_log import EvaluationLog
from rex_rag.training.metrics import segment_metrics, segment_sums, weight_metrics
from rex_rag.types import SegmentKind


class CorrectedLoss(EvaluationLog):
    """A GRPOTrainer whose loss takes the mixture that produced a batch into account, by `args.correction_form`."""

    def __init__(self, *args, **kwargs) -> None:
        self._loss_inputs: dict[str, Any] | None = None
        self._realigned = False
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The parent's loss with pi_theta / mu in the place of pi_theta / pi_old (paper eq. 8), or weighted.

        The ratio's denominator and the weights are set by `_realign`; without probes (a = 0) nothing is changed and
        the loss equals the parent's bit for bit.

        Raises:
            RuntimeError: where the parent took another way to log pi_theta than the one that is realigned.
        """
        self._loss_inputs, self._realigned = dict(inputs), False  # a copy: the buffered batch keeps log pi_old
        try:
            loss = super().compute_loss(model, self._loss_inputs, return_outputs, num_items_in_batch)
        finally:
            self._loss_inputs = None
        if not self._realigned:
            raise RuntimeError(
                "the loss was computed without _get_per_token_logps_and_entropies, where the policy correction takes "
                "place, so this batch would be trained uncorrected. Install the TRL version that setup.cfg names"
            )
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        """As in the parent. While the loss is computed, the realignment happens behind it: between the forward pass
        that yields log pi_theta (which is log pi_old when generation and optimisation are aligned) and the parent
        reading `old_per_token_logps` and `advantages`.
        """
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_inputs is not None:
            self._bound_kl(output[0])
            self._realign(output[0].detach())
        return output

    def _bound_kl(self, per_token_logps: torch.Tensor) -> None:
        """Replace the reference log-probabilities where a token's KL is bounded, or left out.

        Args:
            per_token_logps: (B, T) log pi_theta, with its gradient.
        """
        inputs, args = self._loss_inputs, self.args
        if "ref_per_token_logps" not in inputs:
            return
        if args.kl_token_max is not None:
            bounded, over = bounded_reference(inputs["ref_per_token_logps"], per_token_logps, args.kl_token_max)
            inputs["ref_per_token_logps"], inputs["kl_bounded"] = bounded, over
        if not args.kl_on_probe_tokens:
            inserted = inputs["segment_kinds"] == SegmentKind.PROBE
            if inserted.any():
                inputs["ref_per_token_logps"] = torch.where(inserted, per_token_logps, inputs["ref_per_token_logps"])
                if "kl_bounded" in inputs:
                    inputs["kl_bounded"] = inputs["kl_bounded"] & ~inserted

    def _realign(self, per_token_logps: torch.Tensor) -> None:
        """Replace what the correction form replaces in the loss's inputs, and log what it did.

        Args:
            per_token_logps: (B, T) log pi_theta, detached.
        """
        started = time.perf_counter()
        inputs = self._loss_inputs
        realignment = realign(inputs, per_token_logps, self.args.correction_form, self.args)
        self._log_loss(realignment, per_token_logps)
        inputs |= realignment.inputs
        self._realigned = True
        self._log("seconds/realignment", time.perf_counter() - started)

    def _log_loss(self, realignment: Realignment, per_token_logps: torch.Tensor) -> None:
        """Importance weights; clip fraction and KL of sampled and of inserted tokens apart."""
        inputs, log_weights = self._loss_inputs, realignment.log_weights
        mask = loss_mask(inputs)
        if log_weights is not None:
            counted = mask if log_weights.size(1) == mask.size(1) else mask.any(dim=1, keepdim=True)
            statistics = self.accelerator.gather(weight_statistics(log_weights, counted).unsqueeze(0))
            self._log_all(weight_metrics(statistics))
        ratio, signs = torch.exp(per_token_logps - realignment.denominator), inputs["advantages"].unsqueeze(1)
        clipped = ((ratio < 1 - self.epsilon_low) & (signs < 0)) | ((ratio > 1 + self.epsilon_high) & (signs > 0))
        log_ratio = inputs.get("ref_per_token_logps", per_token_logps).detach() - per_token_logps
        per_token_kl = log_ratio.exp() - log_ratio - 1
        bounded = inputs.get("kl_bounded", torch.zeros_like(clipped))
        sums = segment_sums(inputs["segment_kinds"], mask, clipped, per_token_kl, bounded)
        totals = self.accelerator.reduce(sums, reduction="sum")
        clips = self.loss_type in CLIPPED_LOSSES and self.importance_sampling_level == "token"
        self._log_all(segment_metrics(totals, clip_ratio=clips, kl="ref_per_token_logps" in inputs))
