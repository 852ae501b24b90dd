"""What is logged of a batch of rollouts, and what is said of one that cannot train."""

from __future__ import annotations

import math

from accelerate.logging import get_logger
from accelerate.utils import gather_object

from rex_rag.correction.densities import CLIPPED_LOSSES, clip_bound
from rex_rag.probes.filter import KeepRatio
from rex_rag.probes.mixed_sampling import MixedBatch, MixedSampler
from rex_rag.rollout.agent import Agent
from rex_rag.training.evaluation_log import EvaluationLog
from rex_rag.training.group_rows import Slots
from rex_rag.training.metrics import mixed_counts, rollout_counts, summarize, training_counts

logger = get_logger(__name__)


class RolloutLog(EvaluationLog):
    """A GRPOTrainer that logs search rollouts. Subclasses set `sampler` and `agent`, what has made them."""

    sampler: MixedSampler
    agent: Agent
    _keep_ratio: KeepRatio

    def __init__(self, *args, **kwargs) -> None:
        self._warned: set[str] = set()
        super().__init__(*args, **kwargs)

    def _log_rollouts(self, slots: Slots) -> None:
        """Everything known once the rollouts are done, over the filled rows of all processes."""
        training, filled = self.model.training, slots.filled
        batch = slots.batch if training else self._without_repeats(slots.batch)
        if training:
            counts = training_counts(batch, slots.discarded, self.args.num_originals)
        else:
            counts = rollout_counts(batch.originals) + mixed_counts(batch, self.num_generations_eval)
        lengths = [row.model_length for row in filled]
        tokens = sum(len(row.prompt_ids) + row.model_length for row in slots.sampled)
        seconds = self.agent.seconds
        gathered = gather_object([(counts, lengths, tokens, (seconds.generation, seconds.tools, seconds.driver))])
        lengths = [length for part in gathered for length in part[1]]
        summary = summarize(part[0] for part in gathered)
        if training:
            self.log_metrics(summary)
        else:
            self._evaluated += [part[0] for part in gathered]
        self.log_metric("completions/mean_length", sum(lengths) / len(lengths))
        self.log_metric("completions/min_length", min(lengths))
        self.log_metric("completions/max_length", max(lengths))
        for index, name in enumerate(("generation", "retrieval", "engine")):
            self.log_metric(f"seconds/{name}", sum(part[3][index] for part in gathered) / len(gathered))
        if training:
            self.state.num_input_tokens_seen += sum(part[2] for part in gathered)
            self.log_metric("probes/mixing_share", slots.batch.mixing_share)
            self.log_metric("probes/failure_rate", slots.batch.failure_rate)
            self.log_metric("probes/keep_ratio", self._keep_ratio.value)
            self._watch_probes(slots.batch, int(summary["probes/kept"]), int(summary["probes/dropped"]))
            if not math.isnan(summary["em/probes"]):
                self._keep_ratio.update(summary["em/probes"])
        self.metric_lists["train" if training else "eval"]["num_tokens"] = [self.state.num_input_tokens_seen]

    def _watch_probes(self, batch: MixedBatch, kept: int, dropped: int) -> None:
        """Say once where probes take the originals' gradient away, or where the filter or the form drops them all."""
        widened = self.args.correction_form.in_ratio and self.loss_type in CLIPPED_LOSSES
        if widened and batch.mixing_share > clip_bound(self.epsilon_high):
            self._warn_once(
                f"probes are {batch.mixing_share:.3f} of the batch, beyond the clip bound "
                f"{clip_bound(self.epsilon_high):.3f}: originals start outside the clip range, and those with "
                "positive advantage get no gradient. Lower keep_ratio or use correction='decoupled'",
                key="clip",
            )
        if dropped and not kept:
            self._warn_once(
                f"correction {self.args.correction!r} could train none of the {dropped} probes that the filter kept; "
                "probes/dropped/… counts the causes",
                key="dropped",
            )
        filtered = batch.global_made and not kept + dropped
        if filtered and self._keep_ratio.value < self.args.keep_ratio:
            self._warn_once(
                f"keep_ratio followed probe accuracy down to {self._keep_ratio.value:.4f}, which keeps none of "
                f"{batch.global_made} probes of {batch.global_originals} originals and so stays there. Use "
                "keep_ratio_schedule='constant' or a larger generation batch",
                key="filter",
            )

    def _warn_once(self, message: str, *, key: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(f"step {self.state.global_step}: {message}. Said once")
