"""REXRAGConfig: TRL's GRPOConfig plus the settings of REX-RAG. Every cross-field check lives here."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from rex_rag.agent import AgentSettings
from rex_rag.correction.forms import FORMS, CorrectionForm
from rex_rag.probes import EXPLORERS
from rex_rag.probes.mixed_sampling import MixedSamplingConfig
from rex_rag.probes.pool import load_pool
from rex_rag.protocols import PROTOCOLS, Protocol
from rex_rag.protocols.chat import read_settings
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.errors import UserError
from rex_rag.support.named import choose
from rex_rag.support.secrets import without_secrets
from rex_rag.training.budgets import fill_budgets
from rex_rag.training.collapse_guard import MODES
from rex_rag.training.config_checks import config_warnings, rollout_problems
from rex_rag.training.dynamic_sampling import signal_problems
from rex_rag.training.grpo_options import (
    bound_problems,
    choice_problems,
    data_loading_problems,
    loss_problems,
    option_problems,
    sampling_problems,
)

logger = logging.getLogger(__name__)

_CHOICES = {
    "correction": FORMS,  # the mapping itself: a form may be registered later
    "probe_filter": ("likelihood", "random", "none"),
    "probe_density": ("exact", "coarse"),
    "keep_ratio_schedule": ("constant", "accuracy_ema"),
    "rollout_schedule": ("auto", "lock_step"),
    "collapse_guard": MODES,
}


@dataclass
class REXRAGConfig(GRPOConfig):
    r"""
    Configuration of [`REXRAGTrainer`], in addition to everything [`~trl.GRPOConfig`] offers.

    Args:
        num_generations (`int`, *optional*, defaults to `10`):
            Rows per question: originals and probe slots together. The paper's n = 5 originals are
            `num_generations - num_probe_slots`.
        num_probe_slots (`int`, *optional*, defaults to `5`):
            How many probes a question can hold. Slots left empty are dropped before optimisation and cost nothing, so
            as many slots as originals never bind. `0` switches probes off: the trainer is then Search-R1's GRPO.
        probe_probability (`float`, *optional*, defaults to `0.2`):
            Probability with which a failed original is probed (paper section 3.3: p = 0.2).
        keep_ratio (`float`, *optional*, defaults to `0.12`):
            The trajectory filter keeps the best `floor(keep_ratio * N)` probes of the global batch, N originals
            (paper section 3.4: alpha = 0.12).
        keep_ratio_schedule (`str`, *optional*, defaults to `"constant"`):
            `"accuracy_ema"` lets the keep ratio follow probe accuracy (moving average, weight 0.1) from `keep_ratio`
            on; the reference implementation starts it at 0.08.
        probe_filter (`str`, *optional*, defaults to `"likelihood"`):
            `"likelihood"` ranks probes by the mean log-probability of their prompt; `"random"` keeps a random subset
            of the same size; `"none"` keeps all (both are ablations, paper table 2).
        correction (`str`, *optional*, defaults to `"token"`):
            How probes enter the loss: the name of a form in [`~rex_rag.correction.forms.FORMS`]. `"token"` is the
            paper's (eq. 7-8): the clipped ratio is pi_theta / mu, token by token. docs/correction.md compares them.
        correction_weight_max (`float` or `None`, *optional*):
            Truncates the weights of a form that multiplies advantages by them from above.
        correction_weight_min (`float`, *optional*, defaults to `0.1`):
            Lower bound on the weights of the form `"floor"`.
        hold_weight (`float`, *optional*, defaults to `10.0`):
            Under the form `"rescue_replay"`, the weight of the mean NLL of right originals, which holds what the
            policy can; that of rescues counts 1.
        probe_density (`str`, *optional*, defaults to `"exact"`):
            `"exact"` takes the prompt's next-token frequencies in the tokenised pool; `"coarse"` 1/n on its first
            token and 1 on the rest (ablation).
        kl_token_max (`float` or `None`, *optional*, defaults to `10.0`):
            The KL estimate (k3) of a token is at most this many nats, without gradient beyond, as in the reference.
            The policy may make inserted tokens ever less likely, and one of them could outweigh a batch. `None` (on
            the command line `inf`) is TRL's unbounded estimate.
        kl_on_probe_tokens (`bool`, *optional*, defaults to `True`):
            Whether the KL term runs over inserted exploration prompts too, as in the reference.
        exploration_prompts (`str` or `None`, *optional*):
            Text file with one exploration prompt a line; `None` uses the built-in 30.
        exploration_pool_size (`int` or `None`, *optional*):
            Use only the first so many prompts of the pool; `1` is the single-prompt ablation.
        max_turns (`int`, *optional*, defaults to `5`):
            Turns that may search (reference: 5; Search-R1 v0.2: 4). One last generation follows, in which a search
            is not executed.
        max_prompt_length (`int`, *optional*):
            Longest prompt in tokens, 2048 if unset. A longer one is refused by name, never truncated.
        max_turn_tokens (`int`, *optional*):
            Longest generation of one turn in tokens, 500 if unset.
        max_observation_tokens (`int`, *optional*):
            Longest observation in tokens, tags included, 500 if unset.
        max_sequence_length (`int`, *optional*):
            Prompt and completion in all, in tokens, 4096 if unset. `max_completion_length` follows from it. For a
            model that takes fewer tokens, the trainer lowers it to them, and the three above that are unset in
            proportion.
        retrieval_top_k (`int`, *optional*, defaults to `3`):
            Passages per search (`top_k` is TRL's sampling parameter).
        protocol (`str`, *optional*, defaults to `"search_r1"`):
            How the model is asked, acts and is answered: `"search_r1"` (tags), `"tool_calls"` (native tool calls of
            the model's chat template), or a class of your own as `module:Class`.
        agent_tools (`list[str]`, *optional*, defaults to `["search"]`):
            What the model may call: `search`, `read`, or a function of your own as `module:function`.
        explorer (`str`, *optional*, defaults to `"pool"`):
            What proposes probes, see [`~rex_rag.probes.EXPLORERS`]; or a class of your own as `module:Class`.
        explorer_url, explorer_model (`str` or `None`, *optional*):
            For `explorer` `"endpoint"`: address of an OpenAI-format server, and the model's name there.
        rollout_schedule (`str`, *optional*, defaults to `"auto"`):
            `"auto"` streams where the engine is this process's own (colocated vLLM): a trajectory goes on as soon as
            its own search is back. `"lock_step"` runs all trajectories turn by turn, as engines that are shared by
            processes need in any case.
        prompt_template (`str` or `None`, *optional*):
            Text file with the prompt; `{question}` marks the place of the question. `None` uses the protocol's.
        feedback_text (`str` or `None`, *optional*):
            Text file with what is inserted after an invalid action, taken as it is; `None` uses the protocol's.
        format_reward_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the reward for well-formed trajectories beside exact match; off by default, as in the paper.
        shaping_needs_right_answer (`bool`, *optional*, defaults to `True`):
            Count the format reward, and reward functions marked by `rex_rag.training.rewards.shaping`, in the
            advantage only where the group (originals and kept probes) holds a right answer. Elsewhere they alone would
            tell its rows apart, and the group's std would make full-size advantages of any difference. `False`:
            everywhere.
        dynamic_sampling_rounds (`int`, *optional*, defaults to `0`):
            How many times a step may replace groups without signal, all right or all wrong by exact match, by fresh
            questions and generate for them (DAPO, arXiv 2503.14476); `0` switches dynamic sampling off.
        rest_after (`int`, *optional*, defaults to `0`):
            Difficulty buffer: a question whose originals were all right so many times in a row rests, and is replaced
            by a fresh one, the next so many times that it comes up; `0` switches the buffer off.
        collapse_guard (`str`, *optional*, defaults to `"warn"`):
            What to do when logged figures say that the policy breaks: `"off"`, `"warn"`, `"stop"` (the message names
            the last good checkpoint), `"rollback"` (go on from it with 0.3 of the learning rate, three times at most).
            docs/health.md has figures and bounds.
        llds_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the regulariser against lazy likelihood displacement (arXiv 2512.04220), 0.1 in its paper: what
            was not worse than its group may not become less likely. It acts from the second update of a generation on.
        watchdog_seconds (`float`, *optional*, defaults to `600.0`):
            A process that has been in one stage of a step for so long says so, with the stage and the line, and again
            after twice the time; `0` watches nothing. Below `ddp_timeout`, which ends the run without naming anybody.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether `rex_rag.train` removes what earlier runs left in `output_dir` (checkpoints, completion tables,
            weights, the trainer's state and arguments) instead of refusing to train there.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `num_generations`: Defaults to `10` instead of `8`.
    > - `num_generations_eval`: Defaults to `1`, decoded greedily; several are sampled.
    > - `max_completion_length`: Defaults to `max_sequence_length`.
    > - `bf16`: Where neither it nor `fp16` is set, `True` only on an accelerator that has bfloat16.
    > - `beta`: Defaults to `0.001` instead of `0.0` (paper section 4.1).
    > - `use_bias_correction_kl`: Defaults to `False` instead of `True` (the plain k3 estimator, as in the paper).
    > - `num_completions_to_print`: Defaults to `2` instead of `None`, all; whole trajectories are on disk.
    > - `per_device_train_batch_size`: Defaults to `10`, one question a micro-batch.
    > - `run_name`: Defaults to the last part of `output_dir`, so that a tracker's run goes on where training does.
    > - `trackio_static_space_id`: Defaults to `False` instead of `None`: nothing is published unasked.
    """

    num_generations: int | None = field(
        default=10, metadata={"help": "Rows per question: originals and probe slots together."}
    )
    num_generations_eval: int | None = field(
        default=1,
        metadata={
            "help": "Rollouts per question in evaluation, which never probes; one is greedy, several are sampled."
        },
    )
    per_device_train_batch_size: int = field(
        default=10, metadata={"help": "Rows per device and micro-batch, probe slots included."}
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Follows from max_sequence_length; leave it unset."},
    )
    beta: float = field(default=0.001, metadata={"help": "KL coefficient against the initial model (k3 estimator)."})
    num_completions_to_print: int | None = field(
        default=2, metadata={"help": "Rollouts a log on screen, with log_completions; all are on disk."}
    )
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Weight the KL estimate by the importance ratio."}
    )

    num_probe_slots: int = field(
        default=5, metadata={"help": "Probe slots per question among num_generations; 0 switches probes off."}
    )
    probe_probability: float = field(default=0.2, metadata={"help": "Probability of probing a failed original."})
    keep_ratio: float = field(
        default=0.12, metadata={"help": "The filter keeps floor(keep_ratio * originals) probes of the global batch."}
    )
    keep_ratio_schedule: str = field(
        default="constant",
        metadata={"help": "Keep ratio over time.", "choices": list(_CHOICES["keep_ratio_schedule"])},
    )
    probe_filter: str = field(
        default="likelihood", metadata={"help": "Trajectory filter.", "choices": list(_CHOICES["probe_filter"])}
    )
    correction: str = field(
        default="token",
        metadata={
            "help": "How probes enter the loss. "
            + "; ".join(f"{name}: {form.summary}" for name, form in FORMS.items())
            + "; or module:Class."
        },
    )
    correction_weight_max: float | None = field(
        default=None, metadata={"help": "Upper truncation of weights that multiply advantages."}
    )
    hold_weight: float = field(
        default=10.0, metadata={"help": "Weight of imitating right originals, under form rescue_replay."}
    )
    correction_weight_min: float = field(default=0.1, metadata={"help": "Lower bound on the weights of form floor."})
    probe_density: str = field(
        default="exact",
        metadata={"help": "Density of the inserted prompt's tokens.", "choices": list(_CHOICES["probe_density"])},
    )
    kl_token_max: float | None = field(
        default=10.0, metadata={"help": "Upper bound on the KL estimate of a token, in nats; inf: TRL's, unbounded."}
    )
    kl_on_probe_tokens: bool = field(
        default=True, metadata={"help": "Let the KL term run over inserted exploration prompts."}
    )
    exploration_prompts: str | None = field(
        default=None, metadata={"help": "Text file with exploration prompts, one a line; unset: the built-in 30."}
    )
    exploration_pool_size: int | None = field(
        default=None, metadata={"help": "Use only the first so many exploration prompts."}
    )
    max_turns: int = field(default=5, metadata={"help": "Turns that may search, before one last generation."})
    max_prompt_length: int = field(
        default=None, metadata={"help": "Longest prompt, in tokens; unset: 2048, less for a model that takes fewer."}
    )
    max_turn_tokens: int = field(
        default=None,
        metadata={"help": "Longest generation of a turn, in tokens; unset: 500, less for a model that takes fewer."},
    )
    max_observation_tokens: int = field(
        default=None,
        metadata={"help": "Longest observation, in tokens; unset: 500, less for a model that takes fewer."},
    )
    max_sequence_length: int = field(
        default=None,
        metadata={"help": "Prompt and completion in all, in tokens; unset: 4096, less for a model that takes fewer."},
    )
    retrieval_top_k: int = field(default=3, metadata={"help": "Passages per search."})
    protocol: str = field(
        default="search_r1",
        metadata={"help": f"How the model acts: {', '.join(PROTOCOLS)}, or your own as module:Class."},
    )
    agent_tools: list[str] = field(
        default_factory=lambda: ["search"],
        metadata={"help": "What the model may call: search, read, or your own as module:function."},
    )
    explorer: str = field(
        default="pool", metadata={"help": f"What proposes probes: {', '.join(EXPLORERS)}, or module:Class."}
    )
    explorer_url: str | None = field(
        default=None, metadata={"help": "explorer endpoint: address of the server, http://host:port/v1."}
    )
    explorer_model: str | None = field(
        default=None, metadata={"help": "explorer endpoint: the name that its model is served under."}
    )
    rollout_schedule: str = field(
        default="auto",
        metadata={"help": "How rollouts are run together.", "choices": list(_CHOICES["rollout_schedule"])},
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text file with the prompt template; {question} marks the question."}
    )
    feedback_text: str | None = field(
        default=None, metadata={"help": "Text file with what is inserted after an invalid action."}
    )
    format_reward_weight: float = field(default=0.0, metadata={"help": "Weight of the well-formedness reward."})
    shaping_needs_right_answer: bool = field(
        default=True,
        metadata={"help": "Count shaping rewards (format) only in groups that hold a right answer."},
    )
    dynamic_sampling_rounds: int = field(
        default=0, metadata={"help": "Times a step may replace groups without signal by fresh questions; 0: never."}
    )
    rest_after: int = field(
        default=0, metadata={"help": "A question all right so many times in a row rests as many turns; 0: never."}
    )
    collapse_guard: str = field(
        default="warn",
        metadata={"help": "What to do when the policy breaks.", "choices": list(_CHOICES["collapse_guard"])},
    )
    llds_weight: float = field(
        default=0.0, metadata={"help": "Weight of the regulariser against lazy likelihood displacement; 0: off."}
    )
    watchdog_seconds: float = field(
        default=600.0, metadata={"help": "Say so where a process is in one stage of a step for so long; 0: never."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove what earlier runs left in output_dir instead of refusing to train."}
    )

    def __post_init__(self) -> None:
        self.unset_budgets = fill_budgets(self)
        if self.bf16 is None and not self.fp16:
            self.bf16: bool | None = not self.use_cpu and is_torch_bf16_gpu_available()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn of it
        self._refuse_bad_values()
        if self.max_completion_length is None:
            self.max_completion_length = self.max_sequence_length
        super().__post_init__()
        self.run_name: str = self.run_name or Path(self.output_dir).resolve().name
        self.trackio_static_space_id: str | bool = self.trackio_static_space_id or False
        self._refuse(data_loading_problems(self))
        self._refuse_split_groups()
        self._prepare_generation()
        for warning in config_warnings(self):
            logger.warning(warning)

    @property
    def device(self) -> torch.device:
        """As in the parent, but a CPU has no number: Trainer resumes with `torch.load`, which knows no `cpu:0`."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def __getstate__(self) -> dict[str, Any]:
        """What is saved as training_args.bin, beside every checkpoint: no secrets, which would be pushed with it."""
        return without_secrets(self.__dict__)

    def __copy__(self) -> REXRAGConfig:
        """With secrets, as for `__deepcopy__`: a copy is there to train with."""
        return self._twin(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> REXRAGConfig:
        return self._twin(copy.deepcopy(self.__dict__, memo))

    def _twin(self, settings: dict[str, Any]) -> REXRAGConfig:
        twin = object.__new__(type(self))
        twin.__dict__.update(settings)
        return twin

    def to_dict(self) -> dict[str, Any]:
        """What trackers are told: as in the parent, with secrets inside of settings blanked too."""
        return without_secrets(super().to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(**{self.to_dict()})"

    __str__ = __repr__

    @property
    def num_originals(self) -> int:
        """G0 = n: rollouts per question sampled from pi_old alone."""
        return self.num_generations - self.num_probe_slots

    @property
    def correction_form(self) -> CorrectionForm:
        found = choose(self.correction, FORMS, CorrectionForm, "correction")
        return found() if isinstance(found, type) else found

    def mixed_sampling(self) -> MixedSamplingConfig:
        return MixedSamplingConfig(
            originals_per_question=self.num_originals,
            probe_slots=self.num_probe_slots,
            probe_probability=self.probe_probability,
            probe_filter=self.probe_filter,
            seed=self.seed,
        )

    def rollout_budget(self) -> RolloutBudget:
        return RolloutBudget(
            max_turns=self.max_turns,
            max_turn_tokens=self.max_turn_tokens,
            max_observation_tokens=self.max_observation_tokens,
            max_sequence_length=self.max_sequence_length,
            top_k=self.retrieval_top_k,
        )

    def exploration_pool(self) -> tuple[str, ...]:
        return load_pool(self.exploration_prompts, self.exploration_pool_size)

    def agent_settings(self) -> AgentSettings:
        """How the model is asked and acts: what is saved beside it as agent.json.

        Raises:
            ValueError: for a text file that is missing or unusable.
        """
        return AgentSettings(
            protocol=self.protocol,
            tools=tuple(self.agent_tools),
            template=self._text_file("prompt_template"),
            feedback=self._text_file("feedback_text"),
            budget=self.rollout_budget(),
            chat_template_kwargs=read_settings(self.chat_template_kwargs) or None,
            method="rex_rag" if self.num_probe_slots else "search_r1",
        )

    def agent_protocol(self) -> Protocol:
        """The protocol, with its tools, prompt and feedback.

        Raises:
            ValueError: for an unknown protocol or tool, and for a text file that is missing or unusable.
        """
        return self.agent_settings().make_protocol()

    def _text_file(self, name: str) -> str | None:
        """The content of the file that a setting names, `None` where it is unset."""
        value = getattr(self, name)
        if value is None:
            return None
        if not Path(value).is_file():
            raise UserError(f"{name} is {value!r}, which is not a file; give a text file")
        text = Path(value).read_text(encoding="utf-8")
        if not text.strip():
            raise UserError(f"{name} is {value!r}, an empty file; write the text into it, or leave the setting out")
        return text

    def _refuse_bad_values(self) -> None:
        """Collect every problem and report them together."""
        if self.kl_token_max == math.inf:  # what a command line can say for `None`
            self.kl_token_max = None
        # No comparison holds for NaN, so bounds would let it through.
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        self._refuse([f"{name} is nan; give a number" for name, value in numbers.items() if math.isnan(value)])
        problems = (
            choice_problems(self, _CHOICES) + option_problems(self) + bound_problems(self) + signal_problems(self)
        )
        problems += rollout_problems(self) + sampling_problems(self) + loss_problems(self)
        for check in (
            self.exploration_pool,
            self.agent_protocol,
            lambda: read_settings(self.chat_template_kwargs),
        ):
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
        self._refuse(problems)

    def refuse_bad_budgets(self) -> None:
        """Raise for budgets that do not go together."""
        self._refuse(rollout_problems(self))

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise UserError("REXRAGConfig:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def _prepare_generation(self) -> None:
        generation_kwargs = dict(self.generation_kwargs or {})
        stop = list(self.agent_protocol().stop_strings)
        allowed = {"stop": stop, "include_stop_str_in_output": True} if self.use_vllm and stop else {}
        foreign = {key: value for key, value in generation_kwargs.items() if allowed.get(key) != value}
        if foreign:
            raise UserError(
                f"generation_kwargs is {foreign}; rollouts are sampled from the full softmax and stop where the "
                "protocol says, so no other sampling parameter is taken: remove it"
            )
        if not self.use_vllm:
            return
        self.generation_kwargs: dict[str, Any] | None = allowed
        if self.vllm_max_model_length is None:
            self.vllm_max_model_length: int = self.max_sequence_length
        elif self.vllm_max_model_length < self.max_sequence_length:
            raise UserError(
                f"vllm_max_model_length is {self.vllm_max_model_length}, less than max_sequence_length "
                f"{self.max_sequence_length}: vLLM would cut rollouts by itself; leave it unset or raise it"
            )

    def _refuse_split_groups(self) -> None:
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if rows % self.num_generations:
            raise UserError(
                f"per_device_train_batch_size * steps_per_generation is {self.per_device_train_batch_size} * "
                f"{self.steps_per_generation} = {rows}, not a multiple of num_generations {self.num_generations}: a "
                "question's originals and probes would be split over processes; make it a multiple"
            )

        samples = self.num_generations_eval or self.num_generations
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % samples:
            raise UserError(
                f"per_device_eval_batch_size is {self.per_device_eval_batch_size}, not a multiple of "
                f"num_generations_eval {samples}: a question's rollouts would be split over processes; make it one"
            )
