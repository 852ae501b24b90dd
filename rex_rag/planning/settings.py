"""What a plan reads: a recipe with its overrides, and accelerate's configuration. Plain values, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from rex_rag.support.errors import UserError
from rex_rag.support.recipes import recipe_path
from rex_rag.support.wording import describe_unknown
from rex_rag.training.preflight import read_settings, recipe_keys

_LAUNCH = re.compile(r"--config_file (\S+)")
_KINDS = {"NO": "single", "MULTI_GPU": "ddp", "FSDP": "fsdp"}
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Settings that would change the figures and that no formula here knows.
_NOT_COUNTED = ("generation_batch_size", "load_in_4bit", "load_in_8bit", "optim", "rerank_model", "use_liger_kernel")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a recipe that decide what it takes, with training's defaults (a test holds them equal)."""

    model_name_or_path: str | None = None
    dtype: str = "float32"
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: Any = None
    num_generations: int = 10
    num_probe_slots: int = 5
    probe_probability: float = 0.2
    keep_ratio: float = 0.12
    probe_filter: str = "likelihood"
    correction: str = "token"
    per_device_train_batch_size: int = 10
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    num_iterations: int = 1
    max_steps: int = -1
    beta: float = 0.001
    gradient_checkpointing: bool = True
    max_turn_tokens: int = 500
    max_observation_tokens: int = 500
    max_sequence_length: int = 4096
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_enable_sleep_mode: bool = False
    vllm_tensor_parallel_size: int = 1
    vllm_importance_sampling_correction: bool = True
    dynamic_sampling_rounds: int = 0
    retriever: Any = ("bm25",)
    retriever_devices: Any = ()

    @property
    def micro_batches(self) -> int:
        """Of a generation."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def updates(self) -> float:
        """Optimiser's updates of a generation."""
        return self.micro_batches * self.num_iterations / self.gradient_accumulation_steps

    @property
    def loss_rows(self) -> int:
        """Of a micro-batch of the loss, once empty probe slots are dropped: as many as the filter lets through."""
        rows = self.per_device_train_batch_size * self.micro_batches
        originals = rows * (self.num_generations - self.num_probe_slots) / self.num_generations
        all_filled = self.probe_filter == "none" or self.correction == "rescue_replay"
        filled = rows if all_filled or not self.num_probe_slots else min(rows, originals * (1 + self.keep_ratio))
        return math.ceil(filled / self.micro_batches)

    @property
    def weight_bytes(self) -> int:
        """Of one parameter as it is loaded."""
        return 4 if self.dtype == "float32" else 2

    @property
    def lora_modules(self) -> tuple[str, ...]:
        """Matrices with an adapter; by default PEFT's choice for Qwen2 and Llama."""
        named = self.lora_target_modules
        if not named:
            return ("q_proj", "v_proj")
        named = [named] if isinstance(named, str) else list(named)
        if named == ["all-linear"]:
            return _ALL_LINEAR
        if unknown := [name for name in named if name not in _ALL_LINEAR]:
            raise UserError(
                f"lora_target_modules has {unknown[0]!r}, which is not counted; name some of "
                f"{', '.join(_ALL_LINEAR)}, or all-linear"
            )
        return tuple(named)

    def with_micro_batch(self, rows: int) -> Recipe:
        """The same batches cut into micro-batches of so many rows, a divisor or multiple of what they are now."""
        all_rows = self.per_device_train_batch_size * self.micro_batches
        accumulated = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return replace(
            self,
            per_device_train_batch_size=rows,
            steps_per_generation=all_rows // rows,
            gradient_accumulation_steps=accumulated // rows,
        )

    def flags(self, given: Recipe) -> str:
        """What to write behind a launch of `given` to get this."""
        changed = [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(given, entry.name)]
        return " ".join(f"--{name} {str(getattr(self, name)).lower()}" for name in changed)


@dataclass(frozen=True, slots=True)
class Launch:
    """How many processes share the work, one a GPU, and how.

    sharding: single, ddp, zero0 to zero3 or fsdp. offloads: the optimiser lies in the machine's memory. file: said so.
    """

    gpus: int
    nodes: int
    sharding: str
    offloads: bool
    file: str

    @property
    def shards_weights(self) -> bool:
        return self.sharding in ("zero3", "fsdp")


def read_recipe(
    name: str, overrides: Sequence[str], gpus: int, nodes: int, accelerate: str | None
) -> tuple[Recipe, Launch, list[str]]:
    """A recipe on so many GPUs in all, its batch kept by scaling `steps_per_generation` to them.

    Returns:
        Recipe, launch and what is to be said of either.

    Raises:
        UserError: for a key that is none, and for batches that cannot be shared so.
    """
    path = recipe_path(name)
    settings, given = read_settings(["--config", str(path), *overrides]), read_settings(overrides)
    if unknown := [key for key in settings if key not in (allowed := recipe_keys())]:
        raise UserError(describe_unknown(unknown, sorted(allowed)))
    if "model_name_or_path" not in settings:
        raise UserError(f"{path} is no training recipe: it has no model_name_or_path; `rex-rag recipe` lists some")
    known = [entry.name for entry in fields(Recipe)]
    recipe = Recipe(**{key: settings[key] for key in known if settings.get(key) is not None})
    text = path.read_text(encoding="utf-8")
    header = _LAUNCH.search(text)
    file = accelerate or ("recipes/accelerate_configs/single_gpu.yaml" if gpus == 1 or not header else header[1])
    processes = yaml.safe_load(recipe_path(header[1]).read_text())["num_processes"] if header else 1
    launch = _launch(file, gpus, nodes)
    said = [f"not counted, though the recipe sets it: {key}" for key in _NOT_COUNTED if key in settings]
    if gpus != processes and "steps_per_generation" not in given:
        scaled = {
            key: getattr(recipe, key) * processes / gpus
            for key in ("steps_per_generation", "gradient_accumulation_steps")
            if getattr(recipe, key) is not None
        }
        if any(value < 1 or value % 1 for value in scaled.values()):
            raise UserError(
                f"{path} is written for {processes} processes, and {gpus} cannot share its "
                f"{recipe.micro_batches} micro-batches a generation, {recipe.gradient_accumulation_steps} an update; "
                "give --steps_per_generation and --gradient_accumulation_steps, or another --gpus"
            )
        kept: dict[str, Any] = {key: int(value) for key, value in scaled.items()}
        written, recipe = recipe, replace(recipe, **kept)
        said.append(f"the recipe's batch, written for {processes} processes, is kept: {recipe.flags(written)}")
    rows = recipe.per_device_train_batch_size * recipe.micro_batches
    if rows % recipe.num_generations:
        raise UserError(
            f"{rows} rows a process ({recipe.per_device_train_batch_size} x {recipe.micro_batches}) are no whole "
            f"groups of num_generations {recipe.num_generations}; change per_device_train_batch_size or "
            "steps_per_generation"
        )
    return recipe, launch, said


def _launch(file: str, gpus: int, nodes: int) -> Launch:
    config = yaml.safe_load(recipe_path(file).read_text(encoding="utf-8"))
    deepspeed = config.get("deepspeed_config") or {}
    sharding = _KINDS.get(config["distributed_type"]) or f"zero{deepspeed.get('zero_stage', 0)}"
    if gpus % nodes or (gpus > 1 and sharding == "single"):
        raise UserError(
            f"{file} does not launch {gpus} processes on {nodes} nodes; name another, --accelerate "
            "recipes/accelerate_configs/zero2.yaml, and a number of GPUs that the nodes share evenly"
        )
    return Launch(gpus, nodes, sharding, deepspeed.get("offload_optimizer_device", "none") != "none", str(file))
