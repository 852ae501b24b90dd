"""The memory of one GPU, part by part, from shapes and dtypes alone.

What lies there all the time is added up; of moments that follow each other only the largest counts. Read in trl 1.16,
accelerate 1.15, deepspeed 0.19 and peft 0.21; tests/planning holds parts of it to what torch really keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rex_rag.planning.settings import Launch, Recipe
from rex_rag.planning.shape import ModelShape
from rex_rag.support.errors import UserError

GIB = 2**30
CONTEXT = 1.5 * GIB  # the CUDA context, cuBLAS and NCCL: what empty processes of this kind hold
SPARE = 0.05  # of the GPU, for what the allocator rounds up and cannot use again
_ENGINE = 2 * GIB  # vLLM's activations of 4,096 tokens and its CUDA graphs, before it makes its KV cache
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
# trl.kernels.chunked_logprob: logits exist in tiles of so many tokens by so many words of the vocabulary.
TILE_TOKENS, TILE_WORDS = 4096, 32_768


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU. resident: all the time. moments: one after the other."""

    resident: dict[str, float]
    moments: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(self.moments.values())


def trained_parameters(recipe: Recipe, shape: ModelShape) -> int:
    return shape.lora_parameters(recipe.lora_r, recipe.lora_modules) if recipe.use_peft else shape.parameters


def gpu_memory(recipe: Recipe, launch: Launch, shape: ModelShape, capacity: float) -> Memory:
    """What a run holds at its longest rows, `max_sequence_length` in every row of a micro-batch.

    Args:
        capacity: bytes of the GPU, of which vLLM takes its share.
    """
    resident = {**_states(recipe, launch, shape), **_buffers(recipe, launch, shape)}
    moments = {"loss, forward and backward": loss_bytes(recipe, shape)}
    if launch.sharding.startswith("zero"):
        moments["optimiser's update"] = 4 * trained_parameters(recipe, shape) / launch.gpus
    engine = recipe.vllm_gpu_memory_utilization * capacity
    if not recipe.use_vllm:
        rows = recipe.per_device_train_batch_size * recipe.micro_batches
        cache = 2 * shape.kv_elements * recipe.max_sequence_length
        # transformers continues all rows in one call; their last logits are there as float32, raw and processed.
        moments["generation (transformers)"] = rows * (cache + 8 * shape.vocabulary)
    elif recipe.vllm_mode == "colocate" and recipe.vllm_enable_sleep_mode:
        moments["generation (vLLM, asleep later)"] = engine
    elif recipe.vllm_mode == "colocate":
        resident["vLLM: weights, KV cache"] = engine
    resident["dense index"] = _index_bytes(recipe, launch)
    resident["CUDA context, libraries"] = CONTEXT
    return Memory({name: size for name, size in resident.items() if size}, moments)


def _states(recipe: Recipe, launch: Launch, shape: ModelShape) -> dict[str, float]:
    """Weights, gradients, AdamW's two moments (with ZeRO's float32 weights), and the reference model."""
    width, count, shards = recipe.weight_bytes, shape.parameters, launch.gpus
    zero = launch.sharding.startswith("zero")
    whole = shards if launch.shards_weights else 1
    reference = count * (2 if zero else width) / whole if recipe.beta else 0
    if recipe.use_peft:
        # PEFT keeps the adapter in float32, and the reference is the model without it.
        adapter = 4 * trained_parameters(recipe, shape)
        weights = count * width / whole + adapter
        return {"weights, and adapter": weights, "gradients": adapter, "optimiser": 2 * adapter}
    if zero:
        stage = int(launch.sharding[-1])
        weights, gradients = 2 * count / whole, 2 * count / (shards if stage >= 2 else 1)
        optimiser = 12 * count / (shards if stage else 1)
    elif launch.sharding == "fsdp":  # accelerate makes float32 of whatever is trained
        weights, gradients, optimiser = 4 * count / shards, 4 * count / shards, 8 * count / shards
    else:
        weights, gradients, optimiser = width * count, width * count, 2 * width * count
    return {
        "weights": weights,
        "gradients": gradients,
        "optimiser": 0 if launch.offloads else optimiser,
        "reference model": reference,
    }


def _buffers(recipe: Recipe, launch: Launch, shape: ModelShape) -> dict[str, float]:
    """Copies that sharding and autocast make."""
    trained, count = trained_parameters(recipe, shape), shape.parameters
    buffers: dict[str, float] = {}
    if launch.sharding == "ddp":
        buffers["DDP's buckets"] = (4 if recipe.use_peft else recipe.weight_bytes) * trained
    elif launch.sharding == "zero3":
        buffers["ZeRO-3: gathered weights"] = 2 * min(count, _LIVE)
    elif launch.sharding == "fsdp":
        buffers["FSDP: gathered weights"] = 2 * (2 * shape.layer_parameters + shape.head_parameters)
        if recipe.gradient_accumulation_steps > 1:  # `no_sync` of FSDP2 keeps gradients whole until they are reduced
            buffers["FSDP: whole gradients"] = 2 * trained
    if launch.sharding.startswith("zero"):
        buffers["ZeRO: reduction bucket"] = 2 * min(trained, _BUCKET)
    elif recipe.weight_bytes == 4 and launch.sharding != "fsdp":
        buffers["autocast's bfloat16 weights"] = 2 * count
    return buffers


def activation_bytes(recipe: Recipe, shape: ModelShape, rows: int, length: int) -> tuple[float, float]:
    """What the forward pass keeps of rows of one length, and what one layer's backward pass adds at its peak."""
    tokens = rows * length
    layer = shape.saved_bytes(2) * tokens
    if recipe.use_peft:  # adapters read a float32 copy of what their matrix reads
        layer += tokens * sum(4 * shape.linears[name][0] for name in recipe.lora_modules)
    ends = rows * length**2 + tokens * shape.hidden * (4 + recipe.weight_bytes)  # the mask, and the last norm
    gradients = 6 * shape.intermediate * tokens  # of gate, up and their product, in bfloat16
    if recipe.gradient_checkpointing:
        inputs = shape.layers * shape.hidden * recipe.weight_bytes * tokens
        return ends + inputs, layer + gradients
    return ends + shape.layers * layer, gradients


def head_bytes(recipe: Recipe, shape: ModelShape, tokens: int) -> float:
    """What the log-probabilities of so many tokens take at their backward pass: one tile of logits, never all.

    Beside it the gradients of hidden states and of the output matrix, both in float32, and their cast.
    """
    tile = min(tokens, TILE_TOKENS) * TILE_WORDS * 2
    hidden = tokens * shape.hidden * (2 + 4)
    if recipe.use_peft:
        return tile + hidden
    cast = 2 * shape.head_parameters if recipe.weight_bytes == 2 else TILE_WORDS * shape.hidden * 2
    return tile + hidden + 4 * shape.head_parameters + cast


def loss_bytes(recipe: Recipe, shape: ModelShape) -> float:
    """Activations and log-probabilities of a micro-batch of the longest rows."""
    rows, length = recipe.loss_rows, recipe.max_sequence_length
    kept, layer = activation_bytes(recipe, shape, rows, length)
    return kept + max(layer, head_bytes(recipe, shape, rows * length))


def _index_bytes(recipe: Recipe, launch: Launch) -> float:
    """Of a local dense index on GPUs: every process opens one, spread over the named devices."""
    devices = [recipe.retriever_devices] if isinstance(recipe.retriever_devices, str) else recipe.retriever_devices
    if not any(str(device).startswith("cuda") for device in devices or ()):
        return 0
    named: Sequence[str] = [recipe.retriever] if isinstance(recipe.retriever, str) else recipe.retriever
    file = Path(named[0]) / "index.faiss"
    if not file.is_file():
        raise UserError(
            f"retriever_devices is {devices}, but there is no {file} whose size could be counted; build the index, or "
            "leave retriever_devices out and count it yourself: passages x dimensions x 2 bytes"
        )
    return file.stat().st_size * (launch.gpus // launch.nodes) / len(devices)


def kv_rows(recipe: Recipe, shape: ModelShape, capacity: float, length: float) -> int:
    """How many rows of a mean length vLLM holds at once in what its share leaves beside weights and workspace."""
    tensor_parallel = recipe.vllm_tensor_parallel_size
    room = recipe.vllm_gpu_memory_utilization * capacity - 2 * shape.parameters / tensor_parallel - _ENGINE
    return max(0, math.floor(room * tensor_parallel / (2 * shape.kv_elements * length)))


def smallest_share(recipe: Recipe, shape: ModelShape, capacity: float, rows: int = 16) -> float:
    """The smallest `vllm_gpu_memory_utilization`, in steps of 0.05, that holds so many of the longest rows."""
    tensor_parallel = recipe.vllm_tensor_parallel_size
    cache = rows * recipe.max_sequence_length * 2 * shape.kv_elements
    return math.ceil(((2 * shape.parameters + cache) / tensor_parallel + _ENGINE) / capacity * 20) / 20
