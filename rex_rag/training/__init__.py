"""Training: the trainer, its configuration, and `train`, which takes a recipe."""

from __future__ import annotations

from typing import Any

__all__ = ["train"]


def train(recipe: str, **overrides: Any) -> Any:
    """`rex_rag.training.launch.train`, loaded when it is called: torch and TRL take seconds."""
    from rex_rag.training.launch import train

    return train(recipe, **overrides)
