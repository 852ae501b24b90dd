"""What a batch is reported as: sums on each process, rates over the global batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from rex_rag.probes.mixed_sampling import MixedBatch
from rex_rag.types import SegmentKind, Trajectory, Truncation

_DROPPED = "probes/dropped/"  # and the cause


def rollout_counts(trajectories: Sequence[Trajectory]) -> Counter:
    """Sums over trajectories, to be added up over processes."""
    counts: Counter = Counter(rollouts=len(trajectories))
    for trajectory in trajectories:
        counts["generated"] += trajectory.generated_length
        counts["searches"] += len(trajectory.searches)
        counts["invalid_actions"] += trajectory.invalid_actions
        counts["unanswered"] += trajectory.answer is None
        counts["out_of_tokens"] += trajectory.answer is None and trajectory.truncations[Truncation.SEQUENCE] > 0
        counts["repetitive"] += is_repetitive(trajectory)
        counts["garbled"] += is_garbled(trajectory)
        for cause in Truncation:
            counts[f"truncations/{cause.value}"] += trajectory.truncations[cause]
    return counts


def is_repetitive(trajectory: Trajectory) -> bool:
    """Whether fewer than half of the runs of four tokens that the model wrote are different; of 16 or more."""
    written = [segment.ids for segment in trajectory.segments if segment.kind is SegmentKind.POLICY]
    runs = [tuple(ids[start : start + 4]) for ids in written for start in range(len(ids) - 3)]
    return len(runs) >= 16 and len(set(runs)) < len(runs) / 2


def is_garbled(trajectory: Trajectory) -> bool:
    """Whether the model wrote bytes that are no text, or control characters other than white space."""
    return any(
        character == "\ufffd" or (not character.isprintable() and not character.isspace())
        for segment in trajectory.segments
        if segment.kind is SegmentKind.POLICY
        for character in segment.text
    )


def mixed_counts(batch: MixedBatch, originals_per_question: int) -> Counter:
    """Sums for exact match, dead ends and rescues. A question's originals are adjacent."""
    counts: Counter = Counter(
        originals=len(batch.originals),
        originals_correct=sum(batch.correct),
        probes_made=batch.probes_made,
        probes_kept=len(batch.probes),
        probes_correct=sum(batch.probe_correct),
        probes_dropped=sum(batch.dropped.values()),
    )
    counts.update({f"{_DROPPED}{cause}": count for cause, count in batch.dropped.items()})
    probed: dict[int, bool] = {}
    for probe, right in zip(batch.probes, batch.probe_correct, strict=True):
        question = probe.origin // originals_per_question
        probed[question] = probed.get(question, False) or right
    for question in range(len(batch.originals) // originals_per_question):
        first, last = question * originals_per_question, (question + 1) * originals_per_question
        dead = not any(batch.correct[first:last])
        counts["questions"] += 1
        counts["with_signal"] += probed.get(question, False) if dead else not all(batch.correct[first:last])
        counts["dead_ends"] += dead
        counts["dead_ends_probed"] += dead and question in probed
        counts["dead_ends_rescued"] += dead and probed.get(question, False)
    return counts


def training_counts(batch: MixedBatch, discarded: MixedBatch | None, originals_per_question: int) -> Counter:
    """Sums over all that was sampled for a batch, the groups that dynamic sampling discarded included.

    So the rates are of questions as they were drawn; `trained` counts the groups that are left for the optimiser.
    """
    counts = rollout_counts([*batch.originals, *batch.probes]) + mixed_counts(batch, originals_per_question)
    counts += Counter(trained=counts["questions"], trained_with_signal=counts["with_signal"])
    if discarded is not None:
        counts += rollout_counts([*discarded.originals, *discarded.probes])
        counts += mixed_counts(discarded, originals_per_question)
    return counts


def summarize(counts: Iterable[Counter]) -> dict[str, float]:
    """Rates of the global batch from every process's counts; NaN where there was nothing to rate."""
    total: Counter = Counter()
    for part in counts:
        total.update(part)
    metrics = {
        "searches/mean": _rate(total["searches"], total["rollouts"]),
        "invalid_actions/mean": _rate(total["invalid_actions"], total["rollouts"]),
        "unanswered/rate": _rate(total["unanswered"], total["rollouts"]),
        "repetitive/rate": _rate(total["repetitive"], total["rollouts"]),
        "garbled/rate": _rate(total["garbled"], total["rollouts"]),
        "completions/clipped_ratio": _rate(total["out_of_tokens"], total["rollouts"]),
    }
    for cause in Truncation:
        metrics[f"truncations/{cause.value}"] = _rate(total[f"truncations/{cause.value}"], total["rollouts"])
    if total["originals"]:
        metrics |= {
            "em/originals": _rate(total["originals_correct"], total["originals"]),
            "em/probes": _rate(total["probes_correct"], total["probes_kept"]),
            "dead_end/rate": _rate(total["dead_ends"], total["questions"]),
            "dead_end/rescue_rate": _rate(total["dead_ends_rescued"], total["dead_ends_probed"]),
            "tokens/generated": float(total["generated"]),
            "probes/made": float(total["probes_made"]),
            "probes/kept": float(total["probes_kept"]),
            "probes/dropped": float(total["probes_dropped"]),
        }
        metrics |= {name: float(count) for name, count in sorted(total.items()) if name.startswith(_DROPPED)}
    if total["trained"]:
        metrics |= {
            "signal/asked": _rate(total["with_signal"], total["questions"]),
            "signal/trained": _rate(total["trained_with_signal"], total["trained"]),
        }
    return metrics


def _rate(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


_SEGMENTS = (("policy", SegmentKind.POLICY), ("probe", SegmentKind.PROBE))


def segment_sums(
    kinds: torch.Tensor, mask: torch.Tensor, clipped: torch.Tensor, kl: torch.Tensor, kl_bounded: torch.Tensor
) -> torch.Tensor:
    """Count, clipped, KL and KL bounded, of sampled and of inserted tokens, to be added up over processes.

    Args:
        kinds, mask, clipped, kl, kl_bounded: (B, T).

    Returns:
        (8,) float32.
    """
    chosen = [(kinds == kind) & mask.bool() for _, kind in _SEGMENTS]
    return torch.stack(
        [
            value.float()
            for where in chosen
            for value in (where.sum(), *(part[where].sum() for part in (clipped, kl, kl_bounded)))
        ]
    )


def segment_metrics(totals: torch.Tensor, *, clip_ratio: bool, kl: bool) -> dict[str, float]:
    """Clip fraction and KL per segment kind, of what applies, for the kinds that occur."""
    metrics = {}
    for (name, _), (count, clipped, divergence, bounded) in zip(_SEGMENTS, totals.view(-1, 4).tolist(), strict=True):
        if count and clip_ratio:
            metrics[f"clip_ratio/{name}"] = clipped / count
        if count and kl:
            metrics[f"kl/{name}"] = divergence / count
            metrics[f"kl_bounded/{name}"] = bounded / count
    return metrics


def ratio_statistics(ratio: torch.Tensor) -> torch.Tensor:
    """Sum, count, minimum and maximum of some rows' importance-sampling ratios, (B, 1) -> (4,) float32."""
    ratio = ratio.float()
    return torch.stack([ratio.sum(), torch.tensor(ratio.size(0), device=ratio.device), ratio.min(), ratio.max()])


def ratio_metrics(statistics: torch.Tensor) -> dict[str, float]:
    """What TRL logs of the ratios between trainer and engine, from every process's `ratio_statistics`, (ranks, 4)."""
    total, count = statistics[:, :2].sum(dim=0).tolist()
    return {
        "sampling/importance_sampling_ratio/min": statistics[:, 2].min().item(),
        "sampling/importance_sampling_ratio/mean": total / count,
        "sampling/importance_sampling_ratio/max": statistics[:, 3].max().item(),
    }


def weight_metrics(statistics: torch.Tensor) -> dict[str, float]:
    """Mean, maximum and effective sample size (as a share) from every process's `weight_statistics`, (ranks, 4)."""
    total, squares, count = statistics[:, :3].sum(dim=0).tolist()
    if not count:
        return {}
    return {
        "importance_weight/mean": total / count,
        "importance_weight/max": statistics[:, 3].max().item(),
        "importance_weight/ess": total**2 / (squares * count),
    }
