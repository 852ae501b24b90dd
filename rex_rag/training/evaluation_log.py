"""What TRL's trainer logs of an evaluation, told apart by evaluation set and weighed by question."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Sized
from dataclasses import replace
from typing import Any

from datasets import Dataset

from rex_rag.probes.mixed_sampling import MixedBatch
from rex_rag.training.grpo_seams import GRPOSeams
from rex_rag.training.metrics import summarize


class EvaluationLog(GRPOSeams):
    """A GRPOTrainer whose evaluations can be read: one set does not pass for another, nor for training.

    Subclasses leave what they count of evaluation rollouts, over all processes, in `_evaluated`.
    """

    def __init__(self, *args, **kwargs) -> None:
        self._evaluated_as = "eval"
        self._evaluated: list[Counter] = []
        self._rows_seen = 0  # of the evaluation set, over all processes
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in the parent, which calls it again for each of several sets, with its name behind the prefix.

        Completions of an evaluation stay out of TRL's completion tables: they would replace those of training's
        rollouts of the same step, and stand in the next step's.
        """
        outer, self._evaluated_as = self._evaluated_as, metric_key_prefix
        completions, self.completion_table = self.completion_table, copy.deepcopy(self.completion_table)
        self._forget_evaluated()  # what `predict`, or an evaluation that failed, has left
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated_as, self.completion_table = outer, completions
            self._forget_evaluated()

    def _evaluation_sets(self) -> dict[str, tuple[int, str]]:
        """Questions of each set, "" for a nameless one, and what it says of itself; streams are left out."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return {name: (len(part), part.info.description) for name, part in sets.items() if isinstance(part, Dataset)}

    def _forget_evaluated(self) -> None:
        self._evaluated.clear()
        self._rows_seen = 0

    def _without_repeats(self, batch: MixedBatch) -> MixedBatch:
        """A batch of evaluation without the rows that fill up the last one, so that every process has equally many.

        They are the first of the set once more, behind its end (accelerate's `even_batches`). Processes take turns:
        what is before a row in the set is before it in an earlier step, or on a process of lower number.
        """
        rows, processes = len(batch.originals), self.accelerator.num_processes
        start = self._rows_seen + self.accelerator.process_index * rows
        self._rows_seen += processes * rows
        dataset = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        if not isinstance(dataset, Sized):
            return batch
        fresh = min(rows, max(0, len(dataset) * self.num_generations_eval - start))
        return replace(batch, originals=batch.originals[:fresh], correct=batch.correct[:fresh])

    def _log_of_weights(self) -> list[dict[str, Any]]:
        """What was logged up to the step whose weights the model holds: training may end by loading the best ones."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if self.is_in_train or not best:
            return self.state.log_history
        return [row for row in self.state.log_history if row["step"] <= self.state.best_global_step]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent, but for evaluations: metrics carry the set's name, as its loss does, and figures that are
        counted per question are worked out over all of them; the parent calls them all `eval_…`, and takes the mean
        over batches, of which the last can be smaller. A figure that nothing was counted for (exact match of probes
        where there were none) is left out; the parent logs `None`, of which tensorboard warns."""
        for metrics in self.metric_lists.values():
            for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
                del metrics[name]
        if self.model.training:
            printed = self.args.num_completions_to_print
            if "train_runtime" in logs:  # the last step's rollouts were shown with its own log
                self.num_completions_to_print = 0
            super().log(logs, start_time)
            self.num_completions_to_print = printed
            return
        for name, value in summarize(self._evaluated).items():
            if not math.isnan(value) and not name.startswith("probes/"):  # evaluation never probes
                self.metric_lists["eval"][name] = [value]
        if name := "" if self._evaluated_as == "eval" else self._evaluated_as.removeprefix("eval_"):
            named = {f"{name}_{key}": values for key, values in self.metric_lists["eval"].items()}
            self.metric_lists["eval"] = defaultdict(list, named)
        wanted: bool = self.log_completions
        self.log_completions: bool = False
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
