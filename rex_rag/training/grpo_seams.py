"""TRL's and Trainer's private names: every override and read of them, here, in `engine_weights` and in `trackers`.

Read with trl 1.16 and transformers 5.17.

What is changed with respect to GRPOTrainer, and why:

- `_generate`: rows come from `sample_rows`. TRL's `rollout_func` would do for neither: it is given prompts without
  their examples, so nothing can be judged while sampling, and it decodes completions from all ids, so that rewards
  would read what was retrieved. `environment_factory` runs TRL's own tool loop, which knows no budgets, no probes and
  no rows that a filter drops.
- `_calculate_rewards`, `_generate_and_score_completions`: hooks before and behind; rows that are not `live` are left
  out of the scoring passes, which take the others by length, and dropped behind them.
- `_get_per_token_logps_and_entropies`: `around_forward` puts a function around the parent's forward pass for the time
  of one call of the parent: while a batch is scored, and while a loss is computed, where the hook `before_loss` has to
  stand between the pass and the parent's reading of `old_per_token_logps` and `advantages`.
- `_get_grad_norm`: a hook between gradients and update.
- `_get_train_sampler`, `_run_epoch`, `_save`: resumed runs equal uninterrupted ones.
- `_save_checkpoint`, `_get_output_dir`: a checkpoint is written aside and takes its place whole.
- `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler`: the state of the hooks' owner goes along.
- `VLLMGeneration`: see `rex_rag.training.engine_weights`.
- `print_prompt_completions_sample`: a few rollouts that can be read; what passages and models write reaches the
  terminal as text alone.

tests/training/test_grpo_seams.py holds what this rests on, and fails with a sentence where a version moves it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import pad

from rex_rag.models.generation import TransformersGenerator, VLLMGenerator
from rex_rag.models.vllm_stream import VLLMStream
from rex_rag.support.stages import STAGES
from rex_rag.training.checkpoints import (
    SAVING,
    STATE_FILE,
    TRAINER_STATE_FILE,
    disk_errors_explained,
    put_in_place,
)
from rex_rag.training.engine_weights import ExactSync
from rex_rag.training.epoch_sampler import EpochSampler
from rex_rag.training.shown_rollouts import print_rollouts
from rex_rag.training.trim import by_length, in_two_buckets, trimmed

REFERENCE_ADAPTER = "ref"  # TRL's name for it

grpo_trainer.print_prompt_completions_sample = print_rollouts


@dataclass(frozen=True, slots=True)
class SampledRows:
    """A generation batch, one entry a row. `mask` is 1 on tokens of loss, KL and entropy. `texts` is what rewards may
    read. `logprobs` are the engine's, `None` where it has none."""

    prompts: list
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    mask: list[list[int]]
    texts: list[str]
    logprobs: list[list[float | None]] | None


grpo_trainer.VLLMGeneration = ExactSync


class GRPOSeams(GRPOTrainer):
    """A GRPOTrainer with hooks in the place of its private names. Subclasses define those that raise."""

    _train_sampler: EpochSampler | None = None  # a stream has none
    _forward: Callable[..., tuple] | None = None
    _is_saving = False
    live: torch.Tensor | None = None  # rows of the batch to score and optimise; None means all

    def describe_method(self, name: str, paper: dict[str, str], tags: list[str]) -> None:
        """What the model card calls the method, cites, and tags the model with."""
        self._name, self._paper, self._tag_names = name, paper, tags

    # Hooks

    def sample_rows(self, examples: list[dict], prompts: list) -> SampledRows:
        """The rows of a generation batch. `examples` are this process's rows of the dataset, and may be replaced."""
        raise NotImplementedError

    def before_batch(self) -> None:
        """A generation batch is about to be sampled and scored."""

    def before_rewards(self, examples: list[dict]) -> None:
        """Add to the rows what reward functions are to be given beside the dataset's columns."""

    def rewarded(self, examples: list[dict], rewards_per_func: torch.Tensor) -> torch.Tensor:
        """The rewards that advantages are made of, from those of the global batch, (B, R)."""
        return rewards_per_func

    def scored_batch(self, output: dict[str, Any]) -> dict[str, Any]:
        """The batch as TRL scored it, with whatever is to be there in the loss; rows may be left out."""
        return output

    def has_long_rows(self, inputs: dict[str, Any]) -> bool:
        """Whether a few rows of a mini-batch are much longer than the others."""
        return False

    def before_loss(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> None:
        """Change the loss's inputs in place. per_token_logps: (B, T) log pi_theta, with its gradient."""

    def before_update(self, gradient_norm: float | torch.Tensor | None) -> None:
        """Gradients are whole and weights not yet changed, but under DeepSpeed, which has changed them already."""

    def before_save(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Weights are about to be written; called on the process that writes them."""

    def own_state(self) -> dict[str, Any]:
        """What goes into checkpoints beside TRL's."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The inverse of `own_state`."""

    # Generation

    def _generate(self, prompts: list):
        rows = self.sample_rows(self._examples, prompts)
        prompts[:] = rows.prompts  # the parent's own list, of what was asked
        completions = [[{"role": "assistant", "content": text}] for text in rows.texts]
        logprobs = rows.logprobs if self.use_vllm else None
        return rows.prompt_ids, rows.completion_ids, rows.mask, completions, logprobs, {}, None, []

    @property
    def tokenizer(self):
        return self._tokenizer

    @property
    def shares_engine(self) -> bool:
        """Whether generate calls are collective: every process must send equally many rows."""
        return self.use_vllm and (self.vllm_mode == "server" or self.vllm_tensor_parallel_size > 1)

    def make_generator(
        self, stop: tuple[str, ...], end_ids: Sequence[int], temperature: float
    ) -> TransformersGenerator | VLLMGenerator:
        """The backend that ends a row behind one of these strings, or with one of these ids; greedy at 0."""
        if not self.use_vllm:
            return TransformersGenerator(
                None,
                self._tokenizer,
                temperature=temperature,
                eos_token_ids=end_ids,
                model_context=self.generation_model,
                stop_strings=stop,
            )

        def set_limits(count: int) -> None:
            self.vllm_generation.max_completion_length = count
            self.vllm_generation.temperature = temperature
            ending = {"stop": list(stop), "include_stop_str_in_output": True}
            self.vllm_generation.generation_kwargs = ending if stop else {"stop_token_ids": list(end_ids)}

        return VLLMGenerator(
            single_turn=lambda prompt_ids: self._generate_single_turn(prompt_ids, None, {}, 1),
            set_max_tokens=set_limits,
            equal_rows=self.shares_engine,
        )

    def make_stream(self, end_ids: Sequence[int], temperature: float) -> VLLMStream | None:
        """The engine to stream through, where it is this process's own; `None` for lock-step."""
        if not self.use_vllm or self.shares_engine:
            return None
        return VLLMStream(
            self.vllm_engine,
            temperature=temperature,
            max_length=self.args.vllm_max_model_length,
            end_ids=end_ids,
            with_logprobs=True,
        )

    @contextmanager
    def vllm_engine(self) -> Iterator[Any]:
        """The colocated engine, awake and with the policy's weights; what TRL does around its own generate call."""
        generation, step = self.vllm_generation, self.state.global_step
        sleeping = generation.enable_sleep_mode and generation._llm_weights_sleeping
        if step != self._last_loaded_step or sleeping:
            generation.sync_weights()
            self._last_loaded_step: int = step
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["kv_cache"])
        try:
            yield generation.llm
        finally:
            if generation.enable_sleep_mode:
                generation.llm.sleep(level=2)
                generation._llm_weights_sleeping = True

    @contextmanager
    def generation_model(self) -> Iterator[Any]:
        """The unwrapped policy, ready to generate: the same contexts as TRL's own transformers path."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    # Scoring

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.before_rewards(inputs)
        with STAGES.inside("rewards"):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self.rewarded(inputs, rewards_per_func)

    def _generate_and_score_completions(self, inputs):
        self._examples, self.live = inputs, None
        self.before_batch()
        with self.around_forward(self._score_live_rows), STAGES.inside("generation batch"):
            output = super()._generate_and_score_completions(inputs)
        return self.scored_batch(output)

    def _score_live_rows(
        self,
        forward: Callable[..., tuple],
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        **others,
    ):
        """Rows that are not live are not sent through the model; their log-probabilities are 0.

        More rows than a pass takes are scored in the order of their lengths, each pass without the others' padding.
        """
        live = slice(None) if self.live is None else self.live
        ids, mask = input_ids[live], attention_mask[live]
        if batch_size is None or len(ids) <= batch_size or any(value is not None for value in others.values()):
            logps, *rest = forward(model, ids, mask, logits_to_keep, batch_size=batch_size, **others)
        else:
            logps = by_length(forward, model, ids, mask, logits_to_keep, batch_size, self.pad_to_multiple_of)
            rest = [None, None]
        unpacked = logps.new_zeros(input_ids.size(0), logps.size(1))
        unpacked[live] = logps
        return unpacked, *rest

    def log_probs(self, contexts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """log pi_theta of ids behind contexts, row by row. A collective: processes score equally many rows."""
        count = self.max_over_ranks(len(ids))
        if count == 0:
            return []
        dummies = [[self._tokenizer.pad_token_id]] * (count - len(ids))
        context_ids, context_mask = self._padded([*contexts, *dummies], "left")
        scored_ids, scored_mask = self._padded([*ids, *dummies], "right")
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([context_ids, scored_ids], dim=1),
                torch.cat([context_mask, scored_mask], dim=1),
                scored_ids.size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        return [row[: len(own)].tolist() for row, own in zip(logps.float(), ids, strict=False)]

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row) for row in rows]
        device = self.accelerator.device
        ids = pad(tensors, padding_value=self._tokenizer.pad_token_id, padding_side=side).to(device)
        mask = pad([torch.ones_like(row) for row in tensors], padding_value=0, padding_side=side).to(device)
        return ids, mask

    def max_over_ranks(self, count: int) -> int:
        """The maximum of an integer over all processes."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The parent's loss on inputs without padding that no row needs, as `before_loss` has changed them.

        Raises:
            RuntimeError: where the parent took another way to log pi_theta than the one that the hook stands behind.
        """
        # A copy: the buffered batch keeps what it holds.
        own, passed = trimmed(inputs, self.pad_to_multiple_of), []
        # Two forward passes in one backward are not for wrappers that count them (DDP, FSDP, DeepSpeed).
        alone = self.accelerator.num_processes == 1 and model is self.accelerator.unwrap_model(model)
        apart = alone and self.has_long_rows(own) and not (self.aux_loss_enabled or self.pad_to_multiple_of)

        def hooked(forward: Callable[..., tuple], *args, **kwargs):
            output = in_two_buckets(forward, *args, **kwargs) if apart else forward(*args, **kwargs)
            self.before_loss(own, output[0])
            passed.append(True)
            return output

        with self.around_forward(hooked), STAGES.inside("loss"):
            loss = super().compute_loss(model, own, return_outputs, num_items_in_batch)
        if not passed:
            raise RuntimeError(
                "the loss was computed without _get_per_token_logps_and_entropies, where the policy correction takes "
                "place, so this batch would be trained uncorrected. Install the TRL version that setup.cfg names"
            )
        return loss

    @contextmanager
    def around_forward(self, function: Callable[..., tuple]) -> Iterator[None]:
        """For the time of one call of the parent, have `function(forward, ...)` in the place of its forward pass."""
        self._forward = function
        try:
            yield
        finally:
            self._forward = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        forward = super()._get_per_token_logps_and_entropies
        with STAGES.inside("log-probabilities"):
            return forward(*args, **kwargs) if self._forward is None else self._forward(forward, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.before_update(norm)
        return norm

    # Metrics and completion table

    @property
    def metric_lists(self) -> dict[str, dict[str, list[float]]]:
        """What is logged next: "train" or "eval" -> name -> the values whose mean it will be."""
        return self._metrics

    def log_metric(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.log_metric(name, value)

    @property
    def completion_table(self) -> dict[str, Any]:
        """TRL's completion table: prompts, completions, rewards by function, advantages, further columns."""
        return self._logs

    @completion_table.setter
    def completion_table(self, table: dict[str, Any]) -> None:
        self._logs = table

    @property
    def table_columns(self) -> list[deque]:
        """The columns of the completion table, whose rows are those of the newest generation batch."""
        table = self._logs
        columns = [table["prompt"], table["completion"], table["advantages"]]
        return [*columns, *table["rewards"].values(), *table["extra"].values()]

    def log_column(self, name: str, values: Sequence[Any]) -> None:
        """A further column of the completion table, one value a row of this process."""
        self._log_completion_extra(name, values)

    # Checkpoints

    def save_final(self) -> None:
        """The model into the output directory; as `save_model`, which would push it at once."""
        self.save_model(self.args.output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in the parent, plus `agent.json`, without TRL's frozen copy of an adapter that goes on being trained.

        Every run makes that copy from what it starts with; a resume would load it and not the adapter.
        """
        with STAGES.inside("saving"):
            self._save_whole(output_dir, state_dict)

    def _save_whole(self, output_dir: str | None, state_dict: dict | None) -> None:
        self.before_save(self.model.named_parameters() if state_dict is None else state_dict.items())
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if REFERENCE_ADAPTER in getattr(self.accelerator.unwrap_model(self.model), "peft_config", ()):
            shutil.rmtree(folder / REFERENCE_ADAPTER, ignore_errors=True)
        self.args.agent_settings().save(folder)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING) if self._is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """As in the parent, into a folder aside that takes its place once every process has written its part.

        So a checkpoint is there whole or not at all. Older ones are removed, and the new one is pushed, behind that.
        """
        folder = Path(super()._get_output_dir(trial))
        aside, name = folder / SAVING, f"checkpoint-{self.state.global_step}"
        args, limit, pushes = self.args, self.args.save_total_limit, self.args.push_to_hub
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self._is_saving, args.save_total_limit, args.push_to_hub = True, None, False
        try:
            with disk_errors_explained(folder / name):
                super()._save_checkpoint(model, trial)
        finally:
            self._is_saving, args.save_total_limit, args.push_to_hub = False, limit, pushes
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(aside / name):
            self.state.best_model_checkpoint = str(folder / name)
            if args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_FILE))
        if args.should_save:
            put_in_place(aside / name, folder / name)
        self.accelerator.wait_for_everyone()
        if pushes:
            self._push_from_checkpoint(str(folder / name))
        if args.should_save:
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in the parent, plus the own state, written before the checkpoint can be pushed."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(self.own_state()))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_own_state(json.loads((Path(checkpoint) / STATE_FILE).read_text()))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """As in the parent, but for the sampler's class."""
        parent = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        self._train_sampler = EpochSampler(**{name: getattr(parent, name) for name in names})
        return self._train_sampler

    def _run_epoch(self, *, epoch: int, epochs_trained: int, steps_trained_in_current_epoch: int, **others: Any):
        """As in the parent, with the sampler told its epoch, and micro-batches counted on from the checkpoint's.

        Told here, since accelerate's `set_epoch` does not reach a sampler behind skipped batches on several processes.
        TRL counts micro-batches from 0 in a resumed run: resumed within a generation batch, it would for good ask
        each question some steps late.
        """
        if self._train_sampler is not None:
            self._train_sampler.epoch = epoch
        if epoch == epochs_trained:
            self._step = epoch * others["steps_in_epoch"] + steps_trained_in_current_epoch
            self._buffered_inputs = None  # an earlier call of `train` may have left some
        return super()._run_epoch(
            epoch=epoch,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            **others,
        )


@contextmanager
def timed(log: Callable[[str, float], None], name: str) -> Iterator[None]:
    """Log the seconds of what stands inside, a stage of its own."""
    started = time.perf_counter()
    with STAGES.inside(name):
        yield
    log(f"seconds/{name}", time.perf_counter() - started)
