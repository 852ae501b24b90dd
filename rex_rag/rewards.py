"""Rewards with TRL's reward-function signature. They read model-written text alone.

The trainer adds to the dataset's columns `predicted_answer` (parsed while the rollout ran, from the model's own turn)
and `trajectory`; `completions` hold the `POLICY` and `PROBE` text, never a passage.
"""

from __future__ import annotations

from collections.abc import Sequence

from rex_rag.answers import exact_match
from rex_rag.types import Trajectory


def exact_match_reward(
    completions: Sequence, *, predicted_answer: Sequence[str | None], golden_answers: Sequence[Sequence[str]], **_
) -> list[float]:
    """1.0 where the answer equals a gold answer after SQuAD normalisation, else 0.0 (paper section 3.2)."""
    return [float(exact_match(answer, golds)) for answer, golds in zip(predicted_answer, golden_answers, strict=True)]


def format_reward(completions: Sequence, *, trajectory: Sequence[Trajectory | None], **_) -> list[float]:
    """1.0 for a rollout that answered and in which every turn was a valid action, else 0.0."""
    return [float(item is not None and item.answer is not None and item.invalid_actions == 0) for item in trajectory]
