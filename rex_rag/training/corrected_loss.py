"""The loss's part of the trainer: TRL's loss on inputs realigned to the mixture, and what is logged of it."""

from __future__ import annotations

from typing import Any

import torch

from rex_rag.correction.densities import CLIPPED_LOSSES, weight_statistics
from rex_rag.correction.kl import bounded_reference
from rex_rag.correction.llds import llds
from rex_rag.correction.realignment import Realignment, loss_mask, realign
from rex_rag.training.evaluation_log import EvaluationLog
from rex_rag.training.grpo_seams import timed
from rex_rag.training.metrics import segment_metrics, segment_sums, weight_metrics
from rex_rag.training.rescue_replay import nll_sums, without_ratio
from rex_rag.types import SegmentKind


class CorrectedLoss(EvaluationLog):
    """A GRPOTrainer whose loss takes the mixture that produced a batch into account, by `args.correction_form`."""

    _llds: torch.Tensor | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in the parent, plus LLDS where it is on."""
        self._llds = None
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._llds is not None and self.model.training:
            loss = loss + self.args.llds_weight * self._llds / self.current_gradient_accumulation_steps
        return loss

    def has_long_rows(self, inputs: dict[str, Any]) -> bool:
        """Probes are; without them the loss is computed as the parent does, to the last bit."""
        return float(inputs["mixing_share"]) > 0

    def before_loss(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> None:
        """pi_theta / mu in the place of pi_theta / pi_old (paper eq. 8), or weights; without probes (a = 0) nothing is
        changed and the loss equals the parent's bit for bit."""
        self._bound_kl(inputs, per_token_logps)
        if "roles" in inputs:
            self._let_imitate(inputs, per_token_logps)
        if self.args.llds_weight:
            kinds, mask = inputs["segment_kinds"], loss_mask(inputs)
            old = inputs.get("old_per_token_logps", per_token_logps.detach())
            self._llds = llds(per_token_logps, old, kinds, mask, inputs["advantages"])
            self.log_metric("llds", self.accelerator.gather(self._llds.detach()).mean().item())
        with timed(self.log_metric, "realignment"):
            detached = per_token_logps.detach()
            realignment = realign(inputs, detached, self.args.correction_form, self.args)
            self._log_loss(inputs, realignment, detached)
            inputs |= realignment.inputs

    def _bound_kl(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> None:
        """Replace the reference log-probabilities where a token's KL is bounded, or left out.

        Args:
            per_token_logps: (B, T) log pi_theta, with its gradient.
        """
        args = self.args
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

    def _let_imitate(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> None:
        roles = inputs["roles"]
        if "old_per_token_logps" in inputs:
            inputs["old_per_token_logps"] = without_ratio(inputs["old_per_token_logps"], per_token_logps, roles)
        sums = nll_sums(per_token_logps.detach(), loss_mask(inputs), roles)
        rescue, rescue_tokens, right, right_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        if rescue_tokens:
            self.log_metric("replay/rescue_nll", rescue / rescue_tokens)
        if right_tokens:
            self.log_metric("replay/right_nll", right / right_tokens)

    def _log_loss(self, inputs: dict[str, Any], realignment: Realignment, per_token_logps: torch.Tensor) -> None:
        """Importance weights; clip fraction and KL of sampled and of inserted tokens apart."""
        log_weights = realignment.log_weights
        mask = loss_mask(inputs)
        if log_weights is not None:
            counted = mask if log_weights.size(1) == mask.size(1) else mask.any(dim=1, keepdim=True)
            statistics = self.accelerator.gather(weight_statistics(log_weights, counted).unsqueeze(0))
            self.log_metrics(weight_metrics(statistics))
        ratio, signs = torch.exp(per_token_logps - realignment.denominator), inputs["advantages"].unsqueeze(1)
        clipped = ((ratio < 1 - self.epsilon_low) & (signs < 0)) | ((ratio > 1 + self.epsilon_high) & (signs > 0))
        log_ratio = inputs.get("ref_per_token_logps", per_token_logps).detach() - per_token_logps
        per_token_kl = log_ratio.exp() - log_ratio - 1
        bounded = inputs.get("kl_bounded", torch.zeros_like(clipped))
        sums = segment_sums(inputs["segment_kinds"], mask, clipped, per_token_kl, bounded)
        good = mask.bool() & (inputs["advantages"].unsqueeze(1) > 0)
        good_sums = torch.stack([per_token_logps[good].sum().float(), good.sum().float()])
        totals, good_totals = self.accelerator.reduce(torch.cat([sums, good_sums]), reduction="sum").split([8, 2])
        likelihood, tokens = good_totals.tolist()
        if tokens:
            self.log_metric("likelihood/good", likelihood / tokens)
        clips = self.loss_type in CLIPPED_LOSSES and self.importance_sampling_level == "token"
        self.log_metrics(segment_metrics(totals, clip_ratio=clips, kl="ref_per_token_logps" in inputs))
