"""REXRAGTrainer: TRL's GRPOTrainer with search rollouts, mixed probe sampling and policy correction.

A question's group has `num_generations` rows: n originals and m probe slots. A slot that stays empty is a row of one
masked token whose every reward is NaN, which TRL leaves out of the group's mean and std; it is dropped again before
optimisation. So every process holds equally many rows and TRL does the rest. Data flows one way: `sample_rows` ->
`rewarded` -> `scored_batch` -> `before_loss` (`rex_rag.training.corrected_loss`). TRL's private names are in
`rex_rag.training.grpo_seams`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from rex_rag.answers import exact_match
from rex_rag.models.adapters import policy_name
from rex_rag.probes import explorer_kind
from rex_rag.probes.filter import KeepRatio
from rex_rag.probes.mixed_sampling import MixedBatch, MixedSampler
from rex_rag.protocols import Protocol
from rex_rag.protocols.chat import carry_settings, encode_chat, policy_tokenizer, template_settings, warn_of_unread
from rex_rag.protocols.inert import control_tokens
from rex_rag.retrieval.base import Retriever, as_retriever
from rex_rag.rollout.agent import Agent
from rex_rag.rollout.books import end_tokens
from rex_rag.support.errors import UserError
from rex_rag.tools import make_tools
from rex_rag.training.budgets import context_warning, fit_budgets
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.corrected_loss import CorrectedLoss
from rex_rag.training.dynamic_sampling import DynamicSampler, fresh_questions
from rex_rag.training.finite import FiniteTrainer
from rex_rag.training.group_rows import (
    Slots,
    completion_columns,
    describe_rows,
    drop_empty_rows,
    lay_out,
    live_rows,
)
from rex_rag.training.grpo_options import refuse_short_server, training_problems, training_warnings
from rex_rag.training.grpo_seams import SampledRows, timed
from rex_rag.training.metrics import (
    ratio_metrics,
    ratio_statistics,
)
from rex_rag.training.model_card import method_of, write_card
from rex_rag.training.questions import add_prompts, checked_questions, refuse_long_prompt, refuse_long_prompts
from rex_rag.training.rescue_replay import Imitated, RescueReplay, Role, imitation_advantages
from rex_rag.training.resuming import ResumableTrainer
from rex_rag.training.reward_shaping import gate_shaping, log_given_rewards
from rex_rag.training.rewards import compose_rewards
from rex_rag.training.rollout_log import RolloutLog
from rex_rag.training.run_settings import SETTINGS_KEY, run_settings
from rex_rag.types import Trajectory

logger = get_logger(__name__)


class REXRAGTrainer(RolloutLog, CorrectedLoss, FiniteTrainer, ResumableTrainer):
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
            The same; evaluation never probes. One rollout per question (`num_generations_eval`) is decoded greedily,
            several are sampled.
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
            args = REXRAGConfig(output_dir=f"{policy_name(model).split('/')[-1]}-REX-RAG")
        retriever = as_retriever(retriever)
        retriever.check()
        self.retriever = retriever
        self.recipe = recipe
        self.describe_method(*method_of(args))
        self._keep_ratio = KeepRatio(args.keep_ratio, args.keep_ratio_schedule)
        self._slots: Slots  # of the batch under way
        self._replay: RescueReplay | None = None
        self._drawn: list[Imitated] = []
        protocol = args.agent_protocol()
        train_dataset = checked_questions(train_dataset, "train_dataset")
        eval_dataset = checked_questions(eval_dataset, "eval_dataset")
        if problems := training_problems(args, train_dataset):
            raise UserError("; ".join(problems))
        args = fit_budgets(args, model)
        processing_class = processing_class or policy_tokenizer(model, args)
        forbidden = control_tokens(processing_class)
        self.run_settings = run_settings(args, policy_name(model), train_dataset, retriever.description)
        train_dataset = add_prompts(train_dataset, protocol, forbidden)
        fresh = fresh_questions(train_dataset, args)
        given_weights = args.reward_weights
        functions, args.reward_weights = compose_rewards(reward_funcs, given_weights, args.format_reward_weight)
        self._is_shaping = [getattr(function, "is_shaping", False) for function in functions]
        super().__init__(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=add_prompts(eval_dataset, protocol, forbidden),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        args.reward_weights = given_weights  # `args` is the caller's, and may serve another trainer
        self.chat_template_kwargs = template_settings(args.chat_template_kwargs)
        warn_of_unread(self.tokenizer, args.chat_template_kwargs)
        carry_settings(self.tokenizer, args.chat_template_kwargs)
        self.sampler = self._make_sampler(protocol, retriever)
        greedy = args.num_generations_eval == 1  # as benchmarks are decoded; several of a question have to differ
        self.evaluator = self._make_agent(protocol, retriever, 0.0) if greedy else self.sampler.agent
        self._refuse_long_prompts()
        for warning in [*training_warnings(args, self.train_dataset, self.model), *context_warning(args, self.model)]:
            logger.warning(warning)
        if args.num_probe_slots and args.correction_form.replays:
            slots = args.generation_batch_size // self.num_generations * args.num_probe_slots
            self._replay = RescueReplay(slots, args.seed, lambda item: gather_object([item]))
        ranks = {"gather": lambda item: gather_object([item]), "rank": self.accelerator.process_index}
        self.dynamic_sampler = DynamicSampler(
            self.sampler,
            encode=self._encode_prompt,
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
                refuse_long_prompts(dataset, self._encode_prompt, self.args)

    # Generation

    def _make_agent(self, protocol: Protocol, retriever: Retriever, temperature: float) -> Agent:
        args, end_ids = self.args, list(self.eos_token_ids)
        if (
            not protocol.stop_strings
        ):  # a message's end is all that ends a turn, and a template may have one of its own
            of_template = self.tokenizer.convert_tokens_to_ids(end_tokens(self.tokenizer))
            end_ids = list(dict.fromkeys([*end_ids, *of_template]))
        return Agent(
            cache(lambda stop: self.make_generator(stop, end_ids, temperature)),
            make_tools(args.agent_tools, retriever, args.retrieval_top_k),
            self.tokenizer,
            protocol,
            args.rollout_budget(),
            stream=self.make_stream(end_ids, temperature) if args.rollout_schedule == "auto" else None,
            chat_template_kwargs=args.chat_template_kwargs,
            max_over_ranks=self.max_over_ranks,
            context_length=args.vllm_max_model_length,
        )

    def _make_sampler(self, protocol: Protocol, retriever: Retriever) -> MixedSampler:
        """The agent, what explores its failures, and the sampler over both."""
        args, agent = self.args, self._make_agent(protocol, retriever, self.temperature)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            refuse_short_server(self.vllm_generation.vllm_client, args)
        return MixedSampler(
            agent,
            explorer_kind(args.explorer).make(agent, args, self.log_probs),
            args.mixed_sampling(),
            score_probes=self._score_probes,
            trained=lambda probe: args.correction_form.trained(probe, agent.script),
            gather=lambda item: gather_object([item]),
            rank=self.accelerator.process_index,
        )

    @property
    def agent(self) -> Agent:  # type: ignore[override]
        """What samples now: the training agent, or the evaluating one."""
        return self.sampler.agent if self.model.training else self.evaluator

    def _encode_prompt(self, prompt: list[dict[str, str]]) -> list[int]:
        schemas = self.sampler.agent.protocol.schemas
        return encode_chat(self.tokenizer, prompt, self.args.chat_template_kwargs, schemas)

    def sample_rows(self, examples: list[dict], prompts: list) -> SampledRows:
        """Search rollouts instead of single completions; a probe slot that stays empty is one masked token.

        Texts hold what the model wrote alone. Ids and mask are those that the correction form trains, everything else
        is of the rollout.
        """
        prompt_ids: list[list[int]] = []
        for row, prompt in enumerate(prompts):  # the rows of a question are adjacent
            same = row and prompt == prompts[row - 1]
            prompt_ids.append(prompt_ids[-1] if same else self._encode_prompt(prompt))
            refuse_long_prompt(len(prompt_ids[-1]), prompt, self.args)
        self.agent.seconds.reset()
        with self.finite_sampling():
            slots = self._slots = self._sample(examples, prompt_ids)
        for row, imitated in (slots.replayed or {}).items():
            prompt_ids[row] = imitated.trajectory.prompt_ids
        self.live = slots.live
        self._log_rollouts(slots)
        return SampledRows(
            prompts=[example["prompt"] for example in examples],
            prompt_ids=prompt_ids,
            completion_ids=[row.completion_ids if row else [self.tokenizer.pad_token_id] for row in slots.trained],
            mask=[row.trained_mask if row else [0] for row in slots.trained],
            texts=[row.model_text if row else "" for row in slots.rows],
            logprobs=[row.sampling_logprobs if row else [None] for row in slots.trained],
        )

    def _sample(self, examples: list[dict], prompt_ids: list[list[int]]) -> Slots:
        """Run the rollouts of this process's rows and lay the trajectories into the rows."""
        if not self.model.training:
            rows = self.agent.rollout(prompt_ids)
            asked = zip(rows, examples, strict=True)
            correct = [exact_match(row.answer, example["golden_answers"]) for row, example in asked]
            return Slots(rows, MixedBatch(rows, correct, [], [], 0, len(rows), 0, 0, 0))
        sampled = self.dynamic_sampler.sample(
            examples, prompt_ids, step=self.state.global_step, keep_ratio=self._keep_ratio.value
        )
        self.log_metrics(sampled.metrics)
        laid = lay_out(sampled.batch, len(prompt_ids), self.num_generations, self.args.num_originals)
        slots = Slots(laid, sampled.batch, discarded=sampled.discarded)
        if self._replay is not None:
            slots.replayed = self._replayed(slots, self._replay)
        largest = self.max_over_ranks(sum(row is not None for row in slots.trained))
        slots.live = live_rows(slots.trained, largest, self.args.steps_per_generation)
        return slots

    def _replayed(self, slots: Slots, replay: RescueReplay) -> dict[int, Imitated]:
        """This process's share of the rows to imitate, laid into its probe slots. A collective."""
        batches = [batch for batch in (slots.batch, slots.discarded) if batch is not None]
        replay.add(batches, self.args.num_originals, self.state.global_step)
        self._drawn = replay.draw(self.state.global_step)
        for role in (Role.RESCUE, Role.RIGHT):
            self.log_metric(f"replay/{role.name.lower()}", float(sum(row.role is role for row in self._drawn)))
        own = self._drawn[self.accelerator.process_index :: self.accelerator.num_processes]
        places = [row for row in range(len(slots.rows)) if row % self.num_generations >= self.args.num_originals]
        return dict(zip(places, own, strict=False))

    def _score_probes(self, probes: Sequence[Trajectory]) -> list[float]:
        """Mean log pi_old over the `PROBE` tokens of started probes. A collective: see `log_probs`."""
        inserted = [probe.segments[-1].ids for probe in probes]
        contexts = [
            probe.prompt_ids + probe.completion_ids[: -len(ids)] for probe, ids in zip(probes, inserted, strict=True)
        ]
        with timed(self.log_metric, "scoring"):
            return [sum(values) / len(values) for values in self.log_probs(contexts, inserted)]

    # Rewards

    def before_rewards(self, examples: list[dict]) -> None:
        for example, row in zip(examples, self._slots.rows, strict=True):
            example["predicted_answer"] = row.answer if row else None
            example["trajectory"] = row

    def rewarded(self, examples: list[dict], rewards_per_func: torch.Tensor) -> torch.Tensor:
        """NaN for empty slots, which TRL calls unscorable; no shaping where nothing is right."""
        rows = self._slots.rows
        empty = torch.tensor([row is None for row in rows], device=self.accelerator.device)
        rewards_per_func[self.accelerator.gather(empty)] = torch.nan
        is_probe = torch.tensor([bool(row and row.is_probe) for row in rows], device=self.accelerator.device)
        if self.log_completions:  # every column is gathered from all processes
            for name, column in completion_columns(self._slots, examples, self.accelerator.process_index).items():
                self.log_column(name, column)
            self.log_column("is_probe", is_probe.tolist())
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        all_empty, all_probe = self.accelerator.gather(empty), self.accelerator.gather(is_probe)
        self.log_metric("reward/originals", rewards[~all_empty & ~all_probe].mean().item())
        self.log_metric("reward/probes", rewards[all_probe].mean().item())
        gated = self.model.training and self.args.shaping_needs_right_answer and any(self._is_shaping)
        apart = self.model.training and self._replay is not None
        self._given_rewards = rewards_per_func if gated or apart else None
        if gated:
            rewards_per_func = gate_shaping(rewards_per_func, self._is_shaping, self.num_generations)
        # Groups of originals alone: a probe that is not trained as one has no part in their mean.
        return rewards_per_func.masked_fill(all_probe.unsqueeze(1), torch.nan) if apart else rewards_per_func

    # Correction

    def before_batch(self) -> None:
        super().before_batch()
        if self.model.training and self.args.num_probe_slots:
            for column in self.table_columns:
                column.clear()  # the table holds the newest generation batch, which is rid of empty slots below

    def scored_batch(self, output: dict[str, Any]) -> dict[str, Any]:
        """What the correction needs beside TRL's, minus the empty slots."""
        if self._given_rewards is not None:
            names, metrics = self.reward_func_names, self.metric_lists["train"]
            log_given_rewards(self._given_rewards, names, self.reward_weights, metrics, self.completion_table)
        slots = self._slots
        with timed(self.log_metric, "correction"):
            output |= describe_rows(slots, output["completion_ids"].shape, self.accelerator.device)
            self._count_no_empty_slots(output.get("importance_sampling_ratio"))
            if slots.replayed:
                self._imitate(slots, output)
            if slots.live is not None:
                height = len(slots.rows)
                output = {
                    key: value[slots.live]
                    if isinstance(value, torch.Tensor) and value.shape[:1] == (height,)
                    else value
                    for key, value in output.items()
                }
            if self.model.training and self.args.num_probe_slots:
                drop_empty_rows(self.table_columns, gather_object([row is None for row in slots.rows]))
        return output

    def _imitate(self, slots: Slots, output: dict[str, Any]) -> None:
        output["roles"] = slots.roles.to(output["advantages"].device)
        by_role = imitation_advantages(self._drawn, float(output["num_items_in_batch"]), self.args.hold_weight)
        advantages = output["advantages"].clone()
        for role, advantage in by_role.items():
            advantages[output["roles"] == role] = advantage
        output["advantages"] = advantages

    def _count_no_empty_slots(self, ratio: torch.Tensor | None) -> None:
        """Log the ratios between trainer and engine anew: of whole sequences, TRL counts empty slots too, as 1."""
        if ratio is None or not self.vllm_importance_sampling_mode.startswith("sequence"):
            return
        filled = torch.tensor([row is not None for row in self._slots.trained], device=ratio.device)
        statistics = self.accelerator.gather(ratio_statistics(ratio[filled]).unsqueeze(0))
        for name, value in ratio_metrics(statistics).items():
            self.metric_lists["train" if self.model.training else "eval"][name][-1] = value

    # Checkpoints and cards

    def own_state(self) -> dict[str, Any]:
        """Keep ratio, difficulty buffer, what is replayed, and what the run is made of."""
        state = {"keep_ratio": self._keep_ratio.state_dict(), **self.dynamic_sampler.state_dict()}
        state |= {SETTINGS_KEY: self.run_settings, "collapse_guard": self.collapse_guard.state_dict()}
        return state if self._replay is None else {**state, "replay": self._replay.state_dict()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self._keep_ratio.load_state_dict(state["keep_ratio"])
        self.dynamic_sampler.load_state_dict(state)
        if "collapse_guard" in state:
            self.collapse_guard.load_state_dict(state["collapse_guard"])
        if self._replay is not None and "replay" in state:  # else another form was trained so far
            self._replay.load_state_dict(state["replay"])

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """The parent's metadata; the text says how a search agent is used, how it was trained, with what result."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            write_card(
                Path(self.args.output_dir) / "README.md",
                name=self.hub_model_id or Path(self.args.output_dir).resolve().name,
                args=self.args,
                protocol=self.sampler.agent.protocol,
                retriever=self.retriever.description,
                recipe=self.recipe,
                log_history=self._log_of_weights(),
                evaluation_sets=self._evaluation_sets(),
            )
