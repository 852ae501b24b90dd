"""Trackers (`report_to`): one that fails does not end a run, and the table of trajectories that it is given is small.

Read with transformers 5.17, trl 1.16 and trackio 0.43.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import Trainer, TrainerCallback
from transformers.integrations import TrackioCallback, get_reporting_integration_callbacks
from trl.extras.profiling import ProfilingContext
from trl.trainer import grpo_trainer

from rex_rag.support.wording import visible

if TYPE_CHECKING:
    import pandas

logger = get_logger(__name__)

_FAILURES = 3  # behind which a tracker is left alone: one that waits for a server would slow every step down
_ROWS = 16  # of a table: the whole of a generation is on disk, under completions/
# Columns that a reader looks for, those that only `rex-rag view` reads, or that the rendered trajectory says too.
_FIRST = ("question", "golden_answers", "predicted_answer", "is_probe")
_HIDDEN = ("step", "prompt", "completion", "rollout", "parent", "cut", "tool_uses", "segments")

# TRL gives trackers a row for every call of its slower functions, several a micro-batch, and one that they do not take
# ends training. `seconds/…` has these times, once a step.
ProfilingContext._log_metrics = lambda self, duration: None


class Survived:
    """Makes a tracker's functions such that what they raise is one warning, and nothing is called after three."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0

    def __call__(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.failures == _FAILURES:
                return None
            try:
                return function(*args, **kwargs)
            except Exception as error:  # whatever a tracker's library raises
                self.failures += 1
                if self.failures == 1:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    logger.warning(
                        f"the tracker {self.name} failed in {function.__name__}: {type(error).__name__}: {error} "
                        f"({Path(place.filename).name}:{place.lineno} {place.name}). Training goes on, log.jsonl has "
                        f"every figure, and after {_FAILURES} failures {self.name} is asked no more. Said once"
                    )
                return None

        return called


class TableLog:
    """A tracker's module, as TRL gives its completion table to it."""

    def __init__(self, module: Any, survived: Survived) -> None:
        self._module = module
        self.Table = survived(self._table)
        self.log = survived(self._log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _table(self, dataframe: pandas.DataFrame) -> Any:
        return self._module.Table(dataframe=shown_rows(dataframe))

    def _log(self, values: dict[str, Any]) -> None:
        self._module.log(values)


class TrackioRun(TableLog):
    """The module `trackio` for one trainer, whose steps are the run's and whose runs go on as the trainer's do.

    Left to itself trackio counts calls, of which a table is one, and takes a run of a name for the earlier one.
    """

    def __init__(self, module: Any, survived: Survived, trainer: Trainer) -> None:
        super().__init__(module, survived)
        self._trainer = trainer

    def init(self, **settings: Any) -> Any:
        grpo_trainer.trackio = self  # and no other trainer's of this process
        return self._module.init(**settings | {"resume": "allow" if self._trainer.state.global_step else "never"})

    def _log(self, values: dict[str, Any]) -> None:
        self._module.log(values, step=self._trainer.state.global_step)


def shown_rows(table: pandas.DataFrame) -> pandas.DataFrame:
    """At most so many rows of a completion table, half of them probes where there are such, from all of its length."""
    is_probe = table["is_probe"].astype(bool)
    chosen: list[int] = []
    for part, most in ((table[is_probe], _ROWS // 2), (table[~is_probe], _ROWS)):
        chosen.extend(part.index[:: max(-(-len(part) // (most - len(chosen))), 1)])
    others = [name for name in table if name not in (*_FIRST, *_HIDDEN, "trajectory")]
    shown = table.loc[sorted(chosen), [*_FIRST, *others, "trajectory"]].map(_as_text).astype(object)
    return shown.where(shown.notna(), None)  # pandas makes NaN of an answer that is not there


def _as_text(value: Any) -> Any:
    """Text, and lists of it, without control characters: a tracker's page need not show them as such."""
    text = "; ".join(map(str, value)) if isinstance(value, list) else value
    return visible(text) if isinstance(text, str) else text


def guard_trackers(trainer: Trainer) -> None:
    """Whatever `report_to` names, for one trainer."""
    names = {get_reporting_integration_callbacks([name])[0]: name for name in trainer.args.report_to}
    for callback in trainer.callback_handler.callbacks:
        if type(callback) not in names:
            continue
        name = names[type(callback)]
        survived = Survived(name)
        if isinstance(callback, TrackioCallback):
            callback._trackio = TrackioRun(callback._trackio, survived, trainer)
        elif name == "wandb":
            grpo_trainer.wandb = TableLog(callback._wandb, survived)
        for event in (event for event in dir(TrainerCallback) if event.startswith("on_")):
            setattr(callback, event, survived(getattr(callback, event)))
