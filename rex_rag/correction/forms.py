"""The correction forms: how probes enter the loss (METHOD 4.3). One object is one form.

To add a form, write one class and `register` an instance of it; config choices, their help, `rex-rag check`, the model
card and the config's checks ask the object. From outside the package it is the same call, made before the config is.
docs/correction.md holds the table of forms.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from rex_rag.correction.densities import decoupled_log_weights, sequence_log_weights
from rex_rag.rollout.cuts import without_thought
from rex_rag.support.errors import UserError
from rex_rag.types import Trajectory

if TYPE_CHECKING:
    from rex_rag.correction.realignment import Mixture
    from rex_rag.rollout.agent import AgentScript
    from rex_rag.training.config import REXRAGConfig

# Settings that only some forms read.
FORM_SETTINGS = ("probe_density", "correction_weight_min", "correction_weight_max", "hold_weight")

FORMS: dict[str, CorrectionForm] = {}


class CorrectionForm:
    """How probes enter the loss. This base class lets them in as if the policy had written them.

    Attributes:
        name: the value of the setting `correction`.
        summary: what stands in the loss, in one line.
        expectation: what the form optimises and with what bias, in one line.
        in_ratio: whether the weights divide the clipped ratio (pi_theta / mu in the place of pi_theta / pi_old), where
            originals start at 1/(1-a). Otherwise they multiply the advantages, detached.
        reads: those of `FORM_SETTINGS` that it reads.
        replays: whether probes stay out of loss and group, and rescues are imitated from a replay
            (`rex_rag.training.rescue_replay`).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    expectation: ClassVar[str]
    in_ratio: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    replays: ClassVar[bool] = False

    def trained(self, probe: Trajectory, script: AgentScript) -> Trajectory | str:
        """The trajectory that enters the loss in the place of a probe, or one word on why the probe is dropped.

        Its segments may be fewer (they keep their token ids), or context, which is out of loss, KL and weights. The
        probe itself is left as it is: it is rewarded, counted and shown.
        """
        return probe

    def log_weights(self, mixture: Mixture, args: REXRAGConfig) -> torch.Tensor | None:
        """log(pi_old / mu), (B, T) or (B, 1) float32, or `None` where the form weighs nothing.

        Called on every mini-batch of a generation batch that holds probes.
        """
        return None

    def problems(self, args: REXRAGConfig) -> list[str]:
        """Why the other settings cannot go with this form: value, reason, way out. Asked where probes are on."""
        if not self.in_ratio:
            return []
        problems = []
        if args.loss_type == "vespo":
            problems.append(
                f"loss_type is 'vespo' with correction {self.name!r}: TRL weighs a trajectory by the product of "
                "pi_theta / mu over its tokens, (1-a)^-T for an original of T tokens, where the gradient vanishes; "
                "use loss_type 'dapo', or correction 'decoupled'"
            )
        if args.importance_sampling_level == "sequence":
            problems.append(
                f"importance_sampling_level is 'sequence' with correction {self.name!r}: the mean of log(pi_theta / "
                "mu) over a probe is far below the clip range, since the policy seldom writes the inserted prompt by "
                "itself, and every probe with negative advantage loses its gradient before the first update. Use "
                "'token', or correction 'decoupled'"
            )
        return problems

    def warnings(self, args: REXRAGConfig) -> list[str]:
        """What is worth saying of the other settings under this form. Asked where probes are on."""
        defaults = type(args).__dataclass_fields__
        warnings = [
            f"{name} is {getattr(args, name)!r}, which correction {self.name!r} does not read; leave it out"
            for name in FORM_SETTINGS
            if name not in self.reads and getattr(args, name) != defaults[name].default
        ]
        if args.use_bias_correction_kl and args.beta:
            ratio, kl = ("mu", "the policy") if self.in_ratio else ("pi_old", "the batch, probes as they come")
            warnings.append(
                f"use_bias_correction_kl is on: under correction {self.name!r} it weighs the KL term by pi_theta / "
                f"{ratio}, the KL of {kl}, and other forms weigh it otherwise, so runs of different forms differ in "
                "their objective too. Switch it off to compare them"
            )
        return warnings

    def describe(self, args: REXRAGConfig) -> str:
        """The form and the settings that it reads, in one line."""
        settings = [f"{name} {getattr(args, name)}" for name in self.reads if getattr(args, name) is not None]
        return "; ".join([f"{self.name}: {self.summary}", *settings])


def register(form: CorrectionForm) -> None:
    """Make a form a value of the setting `correction`.

    Raises:
        ValueError: where the name is taken.
    """
    if form.name in FORMS:
        raise UserError(f"there is a correction form named {form.name!r} already; choose another name than {[*FORMS]}")
    FORMS[form.name] = form


class Token(CorrectionForm):
    name = "token"
    summary = "token by token, pi_theta / mu in the clip (paper, equation 7)"
    expectation = (
        "towards the policy's own objective; biased, since densities of single tokens are mixed and not those of "
        "trajectories, and since the clip acts on pi_theta / mu"
    )
    in_ratio = True
    reads = ("probe_density",)

    def log_weights(self, mixture: Mixture, args: REXRAGConfig) -> torch.Tensor:
        return decoupled_log_weights(mixture.old, mixture.behavior)


class Decoupled(CorrectionForm):
    name = "decoupled"
    summary = "token by token, pi_theta / pi_old in the clip, times the detached weight pi_old / mu"
    expectation = (
        "as token at the first update; from then on the clip acts on pi_theta / pi_old, and no original starts outside"
    )
    reads: ClassVar[tuple[str, ...]] = ("probe_density", "correction_weight_max")

    def log_weights(self, mixture: Mixture, args: REXRAGConfig) -> torch.Tensor:
        return _truncated(decoupled_log_weights(mixture.old, mixture.behavior), args)


class Sequence(CorrectionForm):
    name = "sequence"
    summary = "whole trajectories, balance heuristic, detached from the clip"
    expectation = (
        "the policy's own objective, without bias where the prefix decides the answer, the filter is off and no "
        "original writes a pool prompt by itself; a probe that the policy would hardly write weighs next to nothing"
    )
    reads = ("probe_density", "correction_weight_max")

    def log_weights(self, mixture: Mixture, args: REXRAGConfig) -> torch.Tensor:
        return _truncated(sequence_log_weights(mixture.old, mixture.probe_density, mixture.mask, mixture.share), args)


class Uncorrected(CorrectionForm):
    name = "none"
    summary = "none (ablation): probes are treated as if the policy had written them"
    expectation = (
        "(1-a) of the policy's own objective and a of the probe policy's log-likelihood weighed by advantage: prefix, "
        "prompt and continuation of good probes are imitated"
    )


class Floor(Decoupled):
    name = "floor"
    summary = "as decoupled, with the weights held in [correction_weight_min, correction_weight_max]"
    expectation = (
        "between decoupled (floor 0) and none (both bounds 1): a token that the policy would not write by itself is "
        "still imitated, with at least the lower weight"
    )
    reads = ("probe_density", "correction_weight_min", "correction_weight_max")

    def log_weights(self, mixture: Mixture, args: REXRAGConfig) -> torch.Tensor:
        return super().log_weights(mixture, args).clamp(min=math.log(args.correction_weight_min))

    def problems(self, args: REXRAGConfig) -> list[str]:
        problems = super().problems(args)
        if not 0.0 < args.correction_weight_min <= 1.0:
            problems.append(
                f"correction_weight_min is {args.correction_weight_min}; above 1 it would lift the weights of tokens "
                "that need no correction, and at 0 it holds nothing: give a value in (0, 1]"
            )
        return problems


class Continuation(CorrectionForm):
    name = "continuation"
    summary = "prefix and prompt of a probe are context; its continuation is trained on-policy behind them"
    expectation = (
        "(1-a) of the policy's own objective and a of the value of going on from prefix and prompt, without bias; "
        "nothing teaches the policy to doubt by itself"
    )

    def trained(self, probe: Trajectory, script: AgentScript) -> Trajectory:
        end = probe.probe_segment + 1
        context = [replace(segment, is_context=True) for segment in probe.segments[:end]]
        return replace(probe, segments=[*context, *probe.segments[end:]])


class Unprompted(CorrectionForm):
    name = "unprompted"
    summary = "the inserted prompt and the thought that it opened are cut out; the rest is trained as the policy's own"
    expectation = (
        "(1-a) of the policy's own objective and a of the log-likelihood, weighed by advantage, of going on without "
        "the thought: biased towards what is written behind it, which the policy alone may hardly ever write"
    )

    def trained(self, probe: Trajectory, script: AgentScript) -> Trajectory | str:
        return without_thought(probe, script)


class ImitatedRescues(Unprompted):
    name = "rescue_replay"
    summary = (
        "GRPO on originals alone; beside it rescues, without the inserted thought, and right originals are imitated, "
        "drawn from a replay of the newest steps (ours)"
    )
    expectation = (
        "the policy's own objective, and the log-likelihood of rescues and of right originals; plain GRPO while there "
        "are no rescues"
    )
    reads = ("hold_weight",)
    replays = True

    def problems(self, args: REXRAGConfig) -> list[str]:
        problems = super().problems(args)
        if args.hold_weight < 0:
            problems.append(
                f"hold_weight is {args.hold_weight}, which would drive right answers away; give 0 or more (10 by "
                "default)"
            )
        return problems


def _truncated(log_weights: torch.Tensor, args: REXRAGConfig) -> torch.Tensor:
    return (
        log_weights
        if args.correction_weight_max is None
        else log_weights.clamp(max=math.log(args.correction_weight_max))
    )


for _form in (
    Token(),
    Decoupled(),
    Sequence(),
    Uncorrected(),
    Floor(),
    Continuation(),
    Unprompted(),
    ImitatedRescues(),
):
    register(_form)
