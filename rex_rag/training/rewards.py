"""Rewards with TRL's reward-function signature. They read model-written text alone.

The trainer adds to the dataset's columns `predicted_answer` (parsed while the rollout ran, from the model's own turn)
and `trajectory`; `completions` hold the `POLICY` and `PROBE` text, never a passage.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence

from rex_rag.answers import exact_match
from rex_rag.support.errors import UserError
from rex_rag.types import Trajectory


def exact_match_reward(
    completions: Sequence, *, predicted_answer: Sequence[str | None], golden_answers: Sequence[Sequence[str]], **_
) -> list[float]:
    """1.0 where the answer equals a gold answer after SQuAD normalisation, else 0.0 (paper section 3.2)."""
    return [float(exact_match(answer, golds)) for answer, golds in zip(predicted_answer, golden_answers, strict=True)]


def shaping(function: Callable) -> Callable:
    """Mark a reward function as shaping: it counts only in groups that hold a right answer."""
    function.is_shaping = True  # type: ignore[attr-defined]  # a mark on the user's own function
    return function


@shaping
def format_reward(completions: Sequence, *, trajectory: Sequence[Trajectory | None], **_) -> list[float]:
    """1.0 for a rollout that answered and in which every turn was a valid action, else 0.0."""
    return [float(item is not None and item.answer is not None and item.invalid_actions == 0) for item in trajectory]


def compose_rewards(
    further: Callable | str | list | None, weights: list[float] | None, format_weight: float
) -> tuple[list, list[float]]:
    """Exact match first, then the format reward where it is on, then the user's functions; and their weights."""
    functions: list = [exact_match_reward, *([format_reward] if format_weight else [])]
    further = [] if further is None else list(further) if isinstance(further, list | tuple) else [further]
    if weights is None:
        weights = [1.0, *([format_weight] if format_weight else []), *[1.0] * len(further)]
    return functions + [on_filled_rows(item) if _is_plain_callable(item) else item for item in further], weights


def _is_plain_callable(item: object) -> bool:
    """A function object of the user's, not a model (which TRL calls with token ids)."""
    return callable(item) and not hasattr(item, "forward")


def on_filled_rows(function: Callable) -> Callable:
    """Call a reward function on the rows that hold a trajectory; empty probe slots get `None`, TRL's 'not applicable'.

    A user's function therefore never sees an empty row, and a paid judge is never asked about one.
    """

    def chosen(kwargs: dict) -> tuple[list[int], dict]:
        trajectories, log_extra = kwargs["trajectory"], kwargs["log_extra"]
        filled = [row for row, trajectory in enumerate(trajectories) if trajectory is not None]
        return filled, {
            key: [value[row] for row in filled]
            if isinstance(value, list) and len(value) == len(trajectories)
            else value
            for key, value in kwargs.items()
        } | {"log_extra": lambda column, values: log_extra(column, spread(filled, values, len(trajectories)))}

    def spread(filled: list[int], values: Sequence, count: int) -> list:
        if len(values) != len(filled):
            raise UserError(
                f"the reward function {function_name} gave {len(values)} values for {len(filled)} completions; it "
                "must return, and log, one for each"
            )
        by_row = dict(zip(filled, values, strict=True))
        return [by_row.get(row) for row in range(count)]

    def rewards(filled: list[int], values: Sequence, count: int) -> list:
        endless = [value for value in values if value is not None and math.isinf(value)]
        if endless:
            raise UserError(
                f"the reward function {function_name} gave {endless[0]}, of which no advantage can be made; return "
                "finite numbers, or None where a completion cannot be judged"
            )
        return spread(filled, values, count)

    # TRL names metrics after the function, which functools.wraps keeps.
    function_name = getattr(function, "__name__", type(function).__name__)
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped_async(**kwargs):
            filled, arguments = chosen(kwargs)
            return rewards(filled, await function(**arguments), len(kwargs["trajectory"]))

        return wrapped_async

    @functools.wraps(function)
    def wrapped(**kwargs):
        filled, arguments = chosen(kwargs)
        return rewards(filled, function(**arguments), len(kwargs["trajectory"]))

    return wrapped
