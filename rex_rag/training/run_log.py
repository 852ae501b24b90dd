"""Writes `log.jsonl` beside a run's checkpoints, as it goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from rex_rag.support.durable import written_whole
from rex_rag.support.run_log import LOG_FILE, append_row


class RunLog(TrainerCallback):
    """Appends every logged row, with the time and the steps of the whole run, on the main process.

    A run that begins, or goes on from a checkpoint, begins with the rows of the steps before: none is an empty file,
    which says that a run is under way.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        path = Path(args.output_dir) / LOG_FILE
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.writelines((json.dumps(row) + "\n").encode() for row in state.log_history)

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and state.log_history:
            append_row(
                args.output_dir, {**state.log_history[-1], "time": round(time.time(), 1), "max_steps": state.max_steps}
            )
