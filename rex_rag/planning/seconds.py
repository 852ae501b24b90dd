"""The seconds of a generation step, stage by stage, from floating-point operations, bytes and stated assumptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rex_rag.planning.memory import kv_rows, trained_parameters
from rex_rag.planning.settings import Launch, Recipe
from rex_rag.planning.shape import ModelShape


@dataclass(frozen=True, slots=True)
class GPU:
    """memory: GiB. flops: a second, dense bfloat16. bandwidth, link (to another GPU, one way): bytes a second."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float


# NVIDIA's data sheets, without sparsity; cards without NVLink talk over PCIe 4.0 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("RTX4090", 24, 165e12, 1.01e12, 25e9),
        GPU("L40S", 48, 362e12, 0.86e12, 25e9),
        GPU("H100", 80, 989e12, 3.35e12, 450e9),
        GPU("A100", 80, 312e12, 2.04e12, 300e9),
        GPU("H200", 141, 989e12, 4.8e12, 450e9),
    )
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no recipe says. Tokens are means of a trajectory."""

    prompt_tokens: float = 200
    written_tokens: float = 500
    retrieved_tokens: float = 800
    searches: float = 2
    failure_rate: float = 0.6
    flops_share: float = 0.4
    bandwidth_share: float = 0.6
    queries_per_second: float = 2500
    node_link: float = 50e9

    def lines(self, recipe: Recipe) -> Iterator[str]:
        """Each in one line."""
        yield (
            f"a trajectory has {self.trajectory(recipe):,.0f} tokens ({self.prompt_tokens:g} prompt, "
            f"{self.written_tokens:g} written, {self.retrieved_tokens:g} retrieved) and {self.searches:g} searches"
        )
        yield "lengths are spread evenly from 0.4 to 1.6 of their mean, and a micro-batch is padded to its longest row"
        yield f"{self.failure_rate:.0%} of originals answer wrongly and may be probed; a probe writes half as much"
        yield (
            f"matrix products run at {self.flops_share:.0%} of the data sheet's dense bfloat16; a layer's forward "
            f"pass takes {_LAYER * 1000:g} ms or more"
        )
        yield f"decoding, updates and links run at {self.bandwidth_share:.0%} of the data sheet's bytes a second"
        yield f"a decoding step costs {_STEP[recipe.use_vllm] * 1000:g} ms beside; the last rows add {_TAIL - 1:.0%}"
        yield (
            f"search servers answer {self.queries_per_second:,.0f} queries/s (flat-fp16 on one GPU, extrapolated in "
            "docs/retrieval.md); their GPUs are not among these"
        )
        yield f"nodes are linked by {self.node_link / 1e9:g} GB/s a GPU; links do not overlap with computing"
        yield "not counted: start-up, evaluation, checkpoints, weight sync to vLLM" + (
            ", rounds of dynamic sampling" if recipe.dynamic_sampling_rounds else ""
        )

    def trajectory(self, recipe: Recipe) -> float:
        return min(self.prompt_tokens + self.written_tokens + self.retrieved_tokens, recipe.max_sequence_length)


_LAYER = 0.0005  # of the processor, to launch the kernels of a layer's forward pass in eager PyTorch
_STEP = {True: 0.006, False: 0.030}  # the scheduler of vLLM, and the layers' launches in transformers
_TAIL = 1.3  # a generation's last rows run with the batch half empty
_MOST_ROWS = {True: 1024, False: 256}  # vLLM's max_num_seqs, on GPUs of 70 GiB and more (but the A100) or others


def step_seconds(
    recipe: Recipe, launch: Launch, shape: ModelShape, gpu: GPU, capacity: float, given: Assumptions
) -> dict[str, float]:
    """Seconds of one generation step, its updates included: stage -> seconds.

    Args:
        capacity: bytes of a GPU's memory.
    """
    rate, bandwidth = gpu.flops * given.flops_share, gpu.bandwidth * given.bandwidth_share
    length = given.trajectory(recipe)
    originals, started, kept = trajectories(recipe, launch, given)
    own = (originals + kept) / launch.gpus
    # Every micro-batch has equally many rows; an empty one costs what pads it, and is short where it stands alone.
    live = recipe.loss_rows * recipe.micro_batches if recipe.loss_rows > 1 else own
    completion = 1 - given.prompt_tokens / length

    def forward(rows: float, width: float, scored: float, micro_rows: int) -> float:
        launching = rows / micro_rows * shape.layers * _LAYER
        return max(launching, shape.forward_flops(rows * width, width, rows * scored) / rate)

    # The expected largest of so many draws from an even spread over 0.4 to 1.6 of the mean.
    width = min(recipe.max_sequence_length, length * (0.4 + 1.2 * recipe.loss_rows / (recipe.loss_rows + 1)))
    score = forward(
        own, length, length * completion, recipe.per_device_train_batch_size
    )  # in the order of lengths, so next to no padding
    aligned = recipe.gradient_accumulation_steps % (recipe.micro_batches * recipe.num_iterations) == 0
    old = not aligned or (recipe.use_vllm and recipe.vllm_importance_sampling_correction)
    loss = max(
        loss_flops(recipe, shape, live * width, width, live * width * completion) / rate,
        (3 + recipe.gradient_checkpointing) * live / recipe.loss_rows * shape.layers * _LAYER,
    )
    states = 2 * trained_parameters(recipe, shape) * 16 / (1 if launch.sharding in ("single", "ddp") else launch.gpus)
    return {
        "generation": _generation(recipe, launch, shape, gpu, capacity, given, originals, kept),
        "retrieval": given.searches * (originals + kept / 2) / given.queries_per_second,
        "scoring of probes": forward(started / launch.gpus, length, 30, recipe.per_device_train_batch_size),
        "old log-probs": score * old,
        "reference log-probs": score * bool(recipe.beta),
        "loss, forward and backward": recipe.num_iterations * loss,
        "optimiser": recipe.updates * states / bandwidth,
        "links between GPUs": _linked_bytes(recipe, launch, shape, old + bool(recipe.beta))
        / (given.bandwidth_share * (gpu.link if launch.nodes == 1 else min(gpu.link, given.node_link))),
    }


def loss_flops(recipe: Recipe, shape: ModelShape, tokens: float, context: float, scored: float) -> float:
    """Floating-point operations of the loss, forward and backward; arguments as of `forward_flops`.

    A backward pass takes the gradients of inputs and of weights; frozen ones have none. The logits are made anew,
    and so is what is checkpointed, but for a layer's last product, whose value nothing needs.
    """
    gradients = 1 if recipe.use_peft else 2
    layers, head = shape.forward_flops(tokens, context, 0), shape.forward_flops(0, 0, scored)
    anew = layers - 2 * tokens * shape.layers * shape.hidden * shape.intermediate
    return (1 + gradients) * layers + recipe.gradient_checkpointing * anew + (2 + gradients) * head


def trajectories(recipe: Recipe, launch: Launch, given: Assumptions) -> tuple[float, float, float]:
    """Of one generation over all GPUs: originals, probes started, probes kept."""
    rows = recipe.per_device_train_batch_size * recipe.micro_batches * launch.gpus
    questions = rows / recipe.num_generations
    originals = questions * (recipe.num_generations - recipe.num_probe_slots)
    started = originals * given.failure_rate * recipe.probe_probability if recipe.num_probe_slots else 0
    kept = started if recipe.probe_filter == "none" else min(started, recipe.keep_ratio * originals)
    if recipe.correction == "rescue_replay" and recipe.num_probe_slots:
        kept = rows - originals  # its slots hold what is replayed
    return originals, started, kept


def _generation(
    recipe: Recipe,
    launch: Launch,
    shape: ModelShape,
    gpu: GPU,
    capacity: float,
    given: Assumptions,
    originals: float,
    kept: float,
) -> float:
    engine = recipe.vllm_tensor_parallel_size if recipe.use_vllm else 1  # GPUs that generate together
    own, length = originals / launch.gpus * engine, given.trajectory(recipe)
    rate, bandwidth = engine * gpu.flops * given.flops_share, engine * gpu.bandwidth * given.bandwidth_share
    if recipe.use_vllm:
        most = _MOST_ROWS[gpu.memory >= 70 and gpu.name != "A100"]
        rows = max(1, min(own, most, kv_rows(recipe, shape, capacity, length)))
        steps = (own + kept / launch.gpus * engine / 2) * given.written_tokens / rows * _TAIL
    else:  # in lock-step every turn lasts as long as its longest row
        rows, steps = own, (given.searches + 1) * recipe.max_turn_tokens
    read = 2 * shape.parameters + rows * length / 2 * 2 * shape.kv_elements
    step = max(read / bandwidth, shape.forward_flops(rows, length / 2, rows) / rate) + _STEP[recipe.use_vllm]
    inserted = given.prompt_tokens + given.retrieved_tokens
    prefill = shape.forward_flops(own * inserted, length / 2, own * (1 + given.searches)) / rate
    return steps * step + prefill


def _linked_bytes(recipe: Recipe, launch: Launch, shape: ModelShape, scoring_passes: int) -> float:
    """Bytes that a GPU sends in one generation step: gradients, and weights where they are sharded."""
    if launch.gpus == 1:
        return 0
    trained, whole = trained_parameters(recipe, shape), 2 * shape.parameters
    micro_batches = recipe.micro_batches * recipe.num_iterations
    if launch.sharding == "ddp":
        sent = recipe.updates * 2 * trained * (4 if recipe.use_peft else recipe.weight_bytes)
    else:
        # ZeRO-2 and 3 reduce gradients behind every micro-batch, not once an update.
        often = recipe.updates if launch.sharding in ("zero0", "zero1", "fsdp") else micro_batches
        sent = often * 2 * trained + (0 if launch.shards_weights else recipe.updates * 2 * trained)
    if launch.shards_weights:
        gathers = (2 + recipe.gradient_checkpointing) * micro_batches + scoring_passes * recipe.micro_batches + 1
        sent += gathers * whole
    return sent * (launch.gpus - 1) / launch.gpus
