"""A plan: recipe, launch, model and GPU together; whether it fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from rex_rag.planning.memory import GIB, SPARE, Memory, gpu_memory, kv_rows, smallest_share
from rex_rag.planning.seconds import GPU, GPUS, Assumptions, step_seconds
from rex_rag.planning.settings import Launch, Recipe, read_recipe
from rex_rag.planning.shape import ModelShape, model_shape
from rex_rag.support.errors import UserError

LORA = {"dtype": "bfloat16", "use_peft": True, "lora_r": 64, "lora_target_modules": "all-linear"}
_WORTH = 0.03  # of a step's seconds: what is proposed to make it faster saves at least that


@dataclass(frozen=True)
class Plan:
    """What one run takes. Memory in bytes of one GPU, seconds of one generation step."""

    recipe: Recipe
    launch: Launch
    shape: ModelShape
    gpu: GPU
    given: Assumptions

    @property
    def capacity(self) -> float:
        return self.gpu.memory * GIB

    @cached_property
    def memory(self) -> Memory:
        return gpu_memory(self.recipe, self.launch, self.shape, self.capacity)

    @cached_property
    def seconds(self) -> dict[str, float]:
        return step_seconds(self.recipe, self.launch, self.shape, self.gpu, self.capacity, self.given)

    @cached_property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float | None:
        """Of the whole run; `None` where the recipe counts epochs."""
        if self.recipe.max_steps < 0:
            return None
        return self.recipe.max_steps / self.recipe.updates * self.step / 3600

    @property
    def excess(self) -> float:
        """Bytes that are lacking; 0 where it fits, a share of the GPU left to the allocator."""
        return max(0, self.memory.peak - (1 - SPARE) * self.capacity)

    @property
    def engine_is_starved(self) -> bool:
        """Whether vLLM's share holds less than its weights and one of the longest rows."""
        recipe = self.recipe
        colocated = recipe.use_vllm and recipe.vllm_mode == "colocate"
        return colocated and kv_rows(recipe, self.shape, self.capacity, recipe.max_sequence_length) < 1

    @property
    def rounds_away(self) -> bool:
        """Whether weights are trained in half precision without float32 masters, which small updates do not move."""
        recipe = self.recipe
        return recipe.weight_bytes == 2 and not recipe.use_peft and self.launch.sharding in ("single", "ddp")

    @property
    def fits(self) -> bool:
        return not (self.excess or self.engine_is_starved or self.rounds_away)

    def changed(self, **settings: Any) -> Plan:
        return replace(self, recipe=replace(self.recipe, **settings))

    def flags(self, given: Plan) -> str:
        """What a launch of `given` needs behind it, and in front of it, to be this plan."""
        flags = self.recipe.flags(given.recipe)
        return f"{flags} with {self.launch.file}" if self.launch.file != given.launch.file else flags


def make_plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    nodes: int = 1,
    memory: int | None = None,
    gpu: str | None = None,
    accelerate: str | None = None,
    given: Assumptions = Assumptions(),  # noqa: B008 (frozen)
) -> tuple[Plan, list[str]]:
    """The plan of a recipe, and what is to be said of its settings. Arguments as on the command line.

    Raises:
        UserError: where neither a GPU nor its memory (GiB) is named, and for what the recipe's reading refuses.
    """
    if gpu:
        card = GPUS[gpu]
    elif memory:
        card = next((card for card in GPUS.values() if card.memory >= memory), GPUS["H200"])
    else:
        raise UserError("neither --memory nor --gpu is given; say how many GiB a GPU has, or which one it is")
    read, launch, said = read_recipe(recipe, overrides, gpus, nodes, accelerate)
    card = replace(card, memory=memory or card.memory)
    return Plan(read, launch, model_shape(str(read.model_name_or_path)), card, given), said


def made_to_fit(plan: Plan) -> Plan | None:
    """The plan with the mildest changes that make it fit; `None` where none do.

    Changes are added in the order of what they cost, then each is taken back that was not needed in the end.
    """
    steps: list[Callable[[Plan], Plan]] = []
    for step in _remedies(plan):
        steps.append(step)
        if _after(plan, steps).fits:
            break
    else:
        return None
    for step in list(steps):
        if _after(plan, fewer := [one for one in steps if one is not step]).fits:
            steps = fewer
    return _after(plan, steps)


def made_faster(plan: Plan) -> list[Plan]:
    """Plans that fit, each one change from the one before and faster by some hundredths."""
    better: list[Plan] = []
    while True:
        found = min(filter(lambda one: one.fits, _variants(plan)), key=lambda one: one.step, default=plan)
        if found.step > (1 - _WORTH) * plan.step:
            return better
        better.append(found)
        plan = found


def _after(plan: Plan, steps: list[Callable[[Plan], Plan]]) -> Plan:
    for step in steps:
        plan = step(plan)
    return plan


def _remedies(plan: Plan) -> Iterator[Callable[[Plan], Plan]]:
    if plan.rounds_away:
        yield lambda one: one.changed(dtype="float32")
    yield lambda one: one.changed(gradient_checkpointing=True)
    yield _fitting_share
    rows = plan.recipe.per_device_train_batch_size
    for fewer in (count for count in range(rows - 1, 0, -1) if rows % count == 0):
        yield partial(_with_micro_batch, fewer)
    if plan.launch.gpus > 1 and not plan.launch.shards_weights:
        yield _with_zero3
    yield lambda one: one.changed(vllm_enable_sleep_mode=one.recipe.use_vllm)
    if plan.launch.gpus % 2 == 0 and plan.recipe.use_vllm:
        yield lambda one: _fitting_share(one.changed(vllm_tensor_parallel_size=2))
    yield lambda one: one.changed(**LORA)


def _fitting_share(plan: Plan) -> Plan:
    """vLLM's share as small as it can be, or as large as it must be; nothing where vLLM is elsewhere."""
    if not plan.recipe.use_vllm or plan.recipe.vllm_mode != "colocate":
        return plan
    share = smallest_share(plan.recipe, plan.shape, plan.capacity)
    return plan.changed(vllm_gpu_memory_utilization=min(share, 0.9))


def _with_micro_batch(rows: int, plan: Plan) -> Plan:
    return replace(plan, recipe=plan.recipe.with_micro_batch(rows))


def _with_zero3(plan: Plan) -> Plan:
    file = "recipes/accelerate_configs/zero3.yaml"
    return replace(plan, launch=replace(plan.launch, sharding="zero3", offloads=False, file=file))


def _variants(plan: Plan) -> Iterator[Plan]:
    recipe = plan.recipe
    rows = recipe.per_device_train_batch_size
    sizes = {rows, *(count for count in range(1, rows) if rows % count == 0)}
    if recipe.gradient_accumulation_steps % 2 == 0 and recipe.micro_batches % 2 == 0:
        sizes.add(2 * rows)
    for count in sizes:
        cut = replace(plan, recipe=recipe.with_micro_batch(count))
        yield cut
        yield cut.changed(gradient_checkpointing=False)
    if recipe.use_vllm and recipe.vllm_mode == "colocate":
        for share in (tenths / 10 for tenths in range(1, 10)):
            yield plan.changed(vllm_gpu_memory_utilization=share)
            yield plan.changed(vllm_gpu_memory_utilization=share, vllm_enable_sleep_mode=True)
