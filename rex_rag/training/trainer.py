"""REXRAGTrainer: TRL's GRPOTrainer with search rollouts, mixed probe sampling and policy correction.

A question's group has `num_generations` rows: n originals and m probe slots. A slot that stays empty is a row of one
masked token whose every reward is NaN, which TRL leaves out of the group's mean and std; it is dropped again before
optimisation. So every process holds equally many rows and TRL does the rest. Data flows one way: `_generate` ->
`_calculate_rewards` -> `_generate_and_score_completions` -> `compute_loss`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from rex_rag.answers import exact_match
from rex_rag.correction.densities import CLIPPED_LOSSES, clip_bound
from rex_rag.models.chat import carry_settings, policy_tokenizer, template_settings, warn_of_unread
from rex_rag.models.generation import TransformersGenerator, VLLMGenerator
from rex_rag.probes.filter import KeepRatio
from rex_rag.probes.mixed_sampling import MixedBatch, MixedSampler
from rex_rag.probes.pool import ExplorationPool
from rex_rag.protocols.search_r1 import control_tokens
from rex_rag.retrieval.base import Retriever, as_retriever
from rex_rag.rollout.engine import RolloutEngine, RolloutSeconds
from rex_rag.training.checkpoints import STATE_FILE
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.corrected_loss import CorrectedLoss
from rex_rag.training.dynamic_sampling import DynamicSampler, fresh_questions
from rex_rag.training.group_rows import (
    Slots,
    completion_columns,
    describe_rows,
    drop_empty_rows,
    lay_out,
    live_rows,
    table_columns,
)
from rex_rag.training.grpo_options import refuse_short_server, training_problems, training_warnings
from rex_rag.training.metrics import (
    mixed_counts,
    ratio_metrics,
    ratio_statistics,
    rollout_counts,
    summarize,
    training_counts,
)
from rex_rag.training.model_card import PAPER, write_card
from rex_rag.training.questions import add_prompts, checked_questions, refuse_long_prompt, refuse_long_prompts
from rex_rag.training.resuming import ResumableTrainer
from rex_rag.training.reward_shaping import gate_shaping, log_given_rewards
from rex_rag.training.rewards import compose_rewards
from rex_rag.types import Segment, SegmentKind, Trajectory

logger = get_logger(__name__)


class REXRAGTrainer(CorrectedLoss, ResumableTrainer):
    """
    Trainer for REX-RAG, introduced in [REX-RAG: Reasoning Exploration with Policy Correction in Retrieval-Augmented
    Generation](https://huggingface.co/papers/2508.08149). It differs from [`~trl.GRPOTrainer`] in that generation is
    a multi-turn search rollout with mixed probe sampling, and that the loss corrects for the mixture.

    Example:

    ```python
    >>> from rex_rag import REXRAGConfig, REXRAGTrainer
    >>> from rex_rag.retrieval.bm25.retriever import BM25Retriever
    >>> from datasets import load_dataset

    >>> trainer = REXRAGTrainer(
    ...     model="Qwen/Qwen2.5-3B",
    ...     args=REXRAGConfig(output_dir="rex-rag"),
    ...     train_dataset=load_dataset("RUC-NLPIR/FlashRAG_datasets", "nq", split="train"),
    ...     retriever=BM25Retriever.from_corpus(["corpus.jsonl"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, as for [`~trl.GRPOTrainer`].
        retriever ([`~rex_rag.retrieval.base.Retriever`]):
            Answers the searches. It is asked whether it can before the model is loaded.
        args ([`REXRAGConfig`], *optional*):
            Configuration; defaults are the paper's.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Questions: columns `question` (`str`) and `golden_answers` (`list[str]`, or `str` for one). A `prompt`
            column is added.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            The same; evaluation samples `num_generations_eval` rollouts per question and never probes.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Further TRL reward functions, added to exact match. They receive model-written text as `completions`, and
            `predicted_answer`, `golden_answers` and `trajectory` beside TRL's arguments. `args.reward_weights` counts
            exact match first, then the format reward where it is on, then these. One that only shapes answers is
            marked by `rex_rag.training.rewards.shaping`, and then counts where a question was answered right.
        recipe (`str`, *optional*):
            Where the settings came from, for the model card.

    The remaining arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: for a dataset without the columns, with a row whose question or answers are not such, or with a
            prompt beyond `max_prompt_length`.
        RetrievalError: when the retriever cannot answer.
    """

    _tag_names = ["trl", "grpo", "rex-rag"]  # noqa: RUF012 (TRL's contract)
    _name = "REX-RAG"
    _paper = PAPER

    def __init__(
        self,
        model,
        retriever: Retriever,
        args: REXRAGConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        reward_funcs: Callable | str | list | None = None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        recipe: str | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = REXRAGConfig(output_dir=f"{name.split('/')[-1]}-REX-RAG")
        self.retriever = as_retriever(retriever)
        self.retriever.check()
        self.recipe = recipe
        self._keep_ratio = KeepRatio(args.keep_ratio, args.keep_ratio_schedule)
        self._slots: Slots | None = None
        self._warned: set[str] = set()
        self._prompt_template = template = args.prompt_text()
        train_dataset = checked_questions(train_dataset, "train_dataset")
        eval_dataset = checked_questions(eval_dataset, "eval_dataset")
        if problems := training_problems(args, train_dataset):
            raise ValueError("; ".join(problems))
        processing_class = processing_class or policy_tokenizer(model, args)
        forbidden = control_tokens(processing_class)
        train_dataset = add_prompts(train_dataset, template, forbidden)
        fresh = fresh_questions(train_dataset, args)
        given_weights = args.reward_weights
        functions, args.reward_weights = compose_rewards(reward_funcs, given_weights, args.format_reward_weight)
        self._is_shaping = [getattr(function, "is_shaping", False) for function in functions]
        super().__init__(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=add_prompts(eval_dataset, template, forbidden),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        args.reward_weights = given_weights  # `args` is the caller's, and may serve another trainer
        self.chat_template_kwargs = template_settings(args.chat_template_kwargs)
        warn_of_unread(self._tokenizer, args.chat_template_kwargs)
        carry_settings(self._tokenizer, args.chat_template_kwargs)
        self._refuse_long_prompts()
        for warning in training_warnings(args, self.train_dataset, self.model):
            logger.warning(warning)
        pool = ExplorationPool(args.exploration_pool(), self._tokenizer, args.probe_density)
        engine = RolloutEngine(
            generator=self._make_generator(),
            retriever=retriever,
            tokenizer=self._tokenizer,
            budget=args.rollout_budget(),
            max_over_ranks=self._max_over_ranks,
            feedback=args.feedback(),
            context_length=args.vllm_max_model_length,
        )
        ranks = {"gather": lambda item: gather_object([item]), "rank": self.accelerator.process_index}
        self.sampler = MixedSampler(
            engine,
            pool,
            args.mixed_sampling(),
            score_probes=self._score_probes,
            trained=lambda probe: args.correction_form.trained(probe, engine.decode),
            **ranks,
        )
        self.dynamic_sampler = DynamicSampler(
            self.sampler,
            encode=lambda prompt: self._tokenize_prompts([prompt])[0][0],
            group=self.num_generations,
            fresh=fresh,
            rounds=args.dynamic_sampling_rounds,
            rest_after=args.rest_after,
            **ranks,
        )

    def _refuse_long_prompts(self) -> None:
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in (self.train_dataset, *evaluated):
            if isinstance(dataset, Dataset):  # a stream's prompts are checked as they come, in `_generate`
                refuse_long_prompts(dataset, lambda prompt: self._tokenize_prompts([prompt])[0][0], self.args)

    # Generation

    def _make_generator(self) -> TransformersGenerator | VLLMGenerator:
        if self.use_vllm:
            if self.vllm_mode == "server" and self.accelerator.is_main_process:
                refuse_short_server(self.vllm_generation.vllm_client, self.args)
            return VLLMGenerator(
                single_turn=lambda prompt_ids: self._generate_single_turn(prompt_ids, None, {}, 1),
                set_max_tokens=lambda count: setattr(self.vllm_generation, "max_completion_length", count),
                equal_rows=self.vllm_mode == "server" or self.vllm_tensor_parallel_size > 1,
            )
        return TransformersGenerator(
            None,
            self._tokenizer,
            temperature=self.temperature,
            eos_token_ids=self.eos_token_ids,
            model_context=self._generation_model,
        )

    @contextmanager
    def _generation_model(self):
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

    def _max_over_ranks(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _sample(self, prompt_ids: list[list[int]]) -> Slots:
        """Run the rollouts of this process's rows and lay the trajectories into the rows."""
        if not self.model.training:
            rows = self.sampler.engine.rollout(prompt_ids)
            asked = zip(rows, self._batch_inputs, strict=True)
            correct = [exact_match(row.answer, example["golden_answers"]) for row, example in asked]
            return Slots(rows, MixedBatch(rows, correct, [], [], 0, len(rows), 0, 0, 0))
        sampled = self.dynamic_sampler.sample(
            self._batch_inputs, prompt_ids, step=self.state.global_step, keep_ratio=self._keep_ratio.value
        )
        self._log_all(sampled.metrics)
        rows = lay_out(sampled.batch, len(prompt_ids), self.num_generations, self.args.num_originals)
        slots = Slots(rows, sampled.batch, discarded=sampled.discarded)
        largest = self._max_over_ranks(len(slots.filled))
        slots.live = live_rows(slots.rows, largest, self.args.steps_per_generation)
        return slots

    def _generate(self, prompts: list):
        """Search rollouts instead of single completions; the one change to what TRL expects back is empty slots.

        Like the parent it returns prompt ids, completion ids, tool mask, completions, sampling log-probs, extra
        fields and images, one entry per row. The tool mask is 0 on inserted passages and feedback. `completions`
        hold model-written text only, since that is what reward functions may read. Ids and mask are those that the
        correction form trains, everything else is of the rollout.
        """
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        for ids, prompt in zip(prompt_ids, prompts, strict=True):
            refuse_long_prompt(len(ids), prompt, self.args)
        engine = self.sampler.engine
        engine.seconds = RolloutSeconds()
        slots = self._slots = self._sample(prompt_ids)
        prompts[:] = [example["prompt"] for example in self._batch_inputs]  # the parent's own list, of what was asked
        self._log_rollouts(slots)
        pad_id = self._tokenizer.pad_token_id
        completion_ids = [row.completion_ids if row else [pad_id] for row in slots.trained]
        tool_mask = [row.trained_mask if row else [0] for row in slots.trained]
        texts = [row.model_text if row else "" for row in slots.rows]
        logprobs = [row.sampling_logprobs if row else [None] for row in slots.trained] if self.use_vllm else None
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, {}, None, []

    def _score_probes(self, probes: Sequence[Trajectory]) -> list[float]:
        """Mean log pi_old over the `PROBE` tokens of started probes. A collective: ranks score equally many rows."""
        count = self._max_over_ranks(len(probes))
        if count == 0:
            return []
        pad_id = self._tokenizer.pad_token_id
        dummy = Trajectory([pad_id], [Segment(SegmentKind.PROBE, [pad_id], "")])
        rows = [*probes, *[dummy] * (count - len(probes))]
        started = time.perf_counter()
        contexts = [torch.tensor(row.prompt_ids + row.completion_ids[: -len(row.segments[-1].ids)]) for row in rows]
        inserted = [torch.tensor(row.segments[-1].ids) for row in rows]
        context_ids, context_mask = self._padded(contexts, "left")
        inserted_ids, inserted_mask = self._padded(inserted, "right")
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([context_ids, inserted_ids], dim=1),
                torch.cat([context_mask, inserted_mask], dim=1),
                inserted_ids.size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        scores = (logps.float() * inserted_mask).sum(dim=1) / inserted_mask.sum(dim=1)
        result = scores[: len(probes)].tolist()
        self._log("seconds/scoring", time.perf_counter() - started)
        return result

    def _padded(self, rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.accelerator.device
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side=side).to(device)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side=side).to(device)
        return ids, mask

    # Scoring

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """As in the parent, with the parsed answers as further columns; empty slots get NaN, TRL's 'unscorable'."""
        rows = self._slots.rows
        for example, row in zip(inputs, rows, strict=True):
            example["predicted_answer"] = row.answer if row else None
            example["trajectory"] = row
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        empty = torch.tensor([row is None for row in rows], device=self.accelerator.device)
        rewards_per_func[self.accelerator.gather(empty)] = torch.nan
        is_probe = torch.tensor([bool(row and row.is_probe) for row in rows], device=self.accelerator.device)
        if self.log_completions:  # every column is gathered from all processes
            for name, column in completion_columns(rows, inputs).items():
                self._log_completion_extra(name, column)
            self._log_completion_extra("is_probe", is_probe.tolist())
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        all_empty, all_probe = self.accelerator.gather(empty), self.accelerator.gather(is_probe)
        self._log("reward/originals", rewards[~all_empty & ~all_probe].mean().item())
        self._log("reward/probes", rewards[all_probe].mean().item())
        gated = self.model.training and self.args.shaping_needs_right_answer and any(self._is_shaping)
        self._given_rewards = rewards_per_func if gated else None
        return gate_shaping(rewards_per_func, self._is_shaping, self.num_generations) if gated else rewards_per_func

    def _generate_and_score_completions(self, inputs):
        """As in the parent, plus what the correction needs, minus the empty slots."""
        self._batch_inputs = inputs
        has_slots = self.model.training and self.args.num_probe_slots
        if has_slots:
            for column in table_columns(self._logs):
                column.clear()  # TRL's table holds the newest generation batch, which is rid of empty slots below
        output = super()._generate_and_score_completions(inputs)
        if self._given_rewards is not None:
            log_given_rewards(
                self._given_rewards, self.reward_func_names, self.reward_weights, self._metrics["train"], self._logs
            )
        slots = self._slots
        started = time.perf_counter()
        output |= describe_rows(slots, output["completion_ids"].shape, self.accelerator.device)
        self._count_no_empty_slots(output.get("importance_sampling_ratio"))
        if slots.live is not None:
            height = len(slots.rows)
            output = {
                key: value[slots.live] if isinstance(value, torch.Tensor) and value.shape[:1] == (height,) else value
                for key, value in output.items()
            }
        if has_slots:
            drop_empty_rows(table_columns(self._logs), gather_object([row is None for row in slots.rows]))
        self._log("seconds/correction", time.perf_counter() - started)
        return output

    def _count_no_empty_slots(self, ratio: torch.Tensor | None) -> None:
        """Log the ratios between trainer and engine anew: of whole sequences, TRL counts empty slots too, as 1."""
        if ratio is None or not self.vllm_importance_sampling_mode.startswith("sequence"):
            return
        filled = torch.tensor([row is not None for row in self._slots.rows], device=ratio.device)
        statistics = self.accelerator.gather(ratio_statistics(ratio[filled]).unsqueeze(0))
        for name, value in ratio_metrics(statistics).items():
            self._metrics["train" if self.model.training else "eval"][name][-1] = value

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """As in the parent, but empty slots are not sent through the model while a generation batch is scored."""
        live = self._slots.live if self._slots is not None and self._loss_inputs is None else None
        if live is None or input_ids.size(0) != len(self._slots.rows):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, input_ids[live], attention_mask[live], logits_to_keep, *args, **kwargs
        )
        unpacked = logps.new_zeros(input_ids.size(0), logps.size(1))
        unpacked[live] = logps
        return unpacked, entropies, aux_loss

    # Metrics

    def _log_rollouts(self, slots: Slots) -> None:
        """Everything known once the rollouts are done, over the filled rows of all processes."""
        training, filled = self.model.training, slots.filled
        batch = slots.batch if training else self._without_repeats(slots.batch)
        if training:
            counts = training_counts(batch, slots.discarded, self.args.num_originals)
        else:
            counts = rollout_counts(batch.originals) + mixed_counts(batch, self.num_generations_eval)
        lengths = [row.model_length for row in filled]
        tokens = sum(len(row.prompt_ids) + row.model_length for row in slots.sampled)
        seconds = self.sampler.engine.seconds
        gathered = gather_object([(counts, lengths, tokens, (seconds.generation, seconds.retrieval, seconds.engine))])
        lengths = [length for part in gathered for length in part[1]]
        summary = summarize(part[0] for part in gathered)
        if training:
            self._log_all(summary)
        else:
            self._evaluated += [part[0] for part in gathered]
        self._log("completions/mean_length", sum(lengths) / len(lengths))
        self._log("completions/min_length", min(lengths))
        self._log("completions/max_length", max(lengths))
        for index, name in enumerate(("generation", "retrieval", "engine")):
            self._log(f"seconds/{name}", sum(part[3][index] for part in gathered) / len(gathered))
        if training:
            self.state.num_input_tokens_seen += sum(part[2] for part in gathered)
            self._log("probes/mixing_share", slots.batch.mixing_share)
            self._log("probes/failure_rate", slots.batch.failure_rate)
            self._log("probes/keep_ratio", self._keep_ratio.value)
            self._watch_probes(slots.batch, int(summary["probes/kept"]), int(summary["probes/dropped"]))
            if not math.isnan(summary["em/probes"]):
                self._keep_ratio.update(summary["em/probes"])
        self._metrics["train" if training else "eval"]["num_tokens"] = [self.state.num_input_tokens_seen]

    def _watch_probes(self, batch: MixedBatch, kept: int, dropped: int) -> None:
        """Say once where probes take the originals' gradient away, or where the filter or the form drops them all."""
        widened = self.args.correction_form.in_ratio and self.loss_type in CLIPPED_LOSSES
        if widened and batch.mixing_share > clip_bound(self.epsilon_high):
            self._warn_once(
                f"probes are {batch.mixing_share:.3f} of the batch, beyond the clip bound "
                f"{clip_bound(self.epsilon_high):.3f}: originals start outside the clip range, and those with "
                "positive advantage get no gradient. Lower keep_ratio or use correction='decoupled'",
                key="clip",
            )
        if dropped and not kept:
            self._warn_once(
                f"correction {self.args.correction!r} could train none of the {dropped} probes that the filter kept; "
                "probes/dropped/… counts the causes",
                key="dropped",
            )
        filtered = batch.global_made and not kept + dropped
        if filtered and self._keep_ratio.value < self.args.keep_ratio:
            self._warn_once(
                f"keep_ratio followed probe accuracy down to {self._keep_ratio.value:.4f}, which keeps none of "
                f"{batch.global_made} probes of {batch.global_originals} originals and so stays there. Use "
                "keep_ratio_schedule='constant' or a larger generation batch",
                key="filter",
            )

    def _warn_once(self, message: str, *, key: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(f"step {self.state.global_step}: {message}. Said once")

    # Checkpoints and cards

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in the parent, plus keep ratio and difficulty buffer, written before the checkpoint can be pushed."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            partial = Path(output_dir) / f"{STATE_FILE}.partial"
            state = {"keep_ratio": self._keep_ratio.state_dict(), **self.dynamic_sampler.state_dict()}
            partial.write_text(json.dumps(state))
            partial.replace(Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """As in the parent, plus keep ratio and difficulty buffer."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = json.loads((Path(checkpoint) / STATE_FILE).read_text())
            self._keep_ratio.load_state_dict(state["keep_ratio"])
            self.dynamic_sampler.load_state_dict(state)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """The parent's metadata; the text says how a search agent is used, how it was trained, with what result."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            write_card(
                Path(self.args.output_dir) / "README.md",
                name=self.hub_model_id or Path(self.args.output_dir).resolve().name,
                args=self.args,
                prompt_template=self._prompt_template,
                feedback=self.sampler.engine.feedback,
                retriever=self.retriever.description,
                recipe=self.recipe,
                log_history=self._log_of_weights(),
                evaluation_sets=self._evaluation_sets(),
            )
