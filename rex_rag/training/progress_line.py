"""Progress on screen: one readable line a logged step instead of the whole metrics dictionary."""

from __future__ import annotations

import time
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

from rex_rag.support.log_rows import EXACT_MATCH, evaluated_sets
from rex_rag.support.numbers import clock, is_number
from rex_rag.support.run_log import LOG_FILE
from rex_rag.support.wording import counted

_SHOWN = (
    ("EM", EXACT_MATCH),
    ("probe EM", "em/probes"),
    ("dead ends", "dead_end/rate"),
    ("rescued", "dead_end/rescue_rate"),
    ("kept", "probes/kept"),
    ("searches", "searches/mean"),
    ("KL", "kl"),
)
_OF_PROBES = ("probe EM", "rescued", "kept")


class ProgressLine(TrainerCallback):
    """Writes, on the main process, what begins, and on every log steps done, rate, time left and headline metrics."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started = time.perf_counter()
        self._first_step = state.global_step
        if state.is_world_process_zero:
            after = f" from step {state.global_step}" if state.global_step else ""
            questions = counted(args.generation_batch_size // args.num_generations, "question")
            often = "step" if state.logging_steps == 1 else f"{state.logging_steps:g} steps"
            tqdm.write(
                f"training{after}: {counted(state.max_steps, 'step')}, {questions} a generation; "
                f"a line every {often}, all figures in {Path(args.output_dir) / LOG_FILE}"
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Say how long a step takes, once, where the first line is some steps away."""
        is_first = state.global_step == self._first_step + 1
        if is_first and state.logging_steps > 1 and state.is_world_process_zero:
            tqdm.write(f"the first step took {time.perf_counter() - self._started:.0f} s")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        at = f"step {state.global_step}/{state.max_steps}"
        for name, prefix in evaluated_sets(logs).items():
            where = f"evaluation of {name}" if name else "evaluation"
            tqdm.write(f"{at}  {where}: {_values(logs, probes=False, prefix=prefix)}")
        if EXACT_MATCH not in logs:
            return
        elapsed = time.perf_counter() - self._started
        done = max(state.global_step - self._first_step, 1)
        left = elapsed / done * (state.max_steps - state.global_step)
        figures = _values(logs, probes=args.num_probe_slots > 0)
        tqdm.write(f"{at}  {figures}  {elapsed / done:.1f} s/step  {clock(left)} left")


def _values(logs: dict, *, probes: bool, prefix: str = "") -> str:
    shown = [(label, logs.get(prefix + key)) for label, key in _SHOWN if probes or label not in _OF_PROBES]
    return "  ".join(f"{label} {value:.2f}" for label, value in shown if is_number(value))
