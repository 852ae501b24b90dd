"""What the plan counts, against what torch really allocates and keeps, for Qwen2 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from rex_rag.planning.memory import CONTEXT, GIB, activation_bytes, gpu_memory, head_bytes
from rex_rag.planning.seconds import loss_flops
from rex_rag.planning.settings import Launch, Recipe
from rex_rag.planning.shape import ModelShape, model_shape

SHAPE = ModelShape(
    hidden=128, layers=4, heads=4, kv_heads=2, intermediate=704, vocabulary=5_000, is_tied=True, head_dim=32
)
ROWS, LENGTH = 4, 384


def make_model(dtype: torch.dtype, shape: ModelShape = SHAPE) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.is_tied,
        head_dim=shape.head_dim,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, dtype=dtype).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def log_probs(
    model: torch.nn.Module, shape: ModelShape = SHAPE, rows: int = ROWS, length: int = LENGTH
) -> torch.Tensor:
    """As TRL asks for them: left-padded rows, every token labelled."""
    ids = torch.randint(0, shape.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs


def kept_for_backward(model: torch.nn.Module) -> int:
    """Bytes of storages that autograd keeps, parameters left out, each once."""
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}
    sizes: dict[int, int] = {}
    held = []  # alive, so that no address is used twice

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = log_probs(model)
    assert output.requires_grad
    return sum(sizes.values())


def test_parameters_of_the_tiny_model_are_counted_to_the_last_one():
    assert sum(value.numel() for value in make_model(torch.float32).parameters()) == SHAPE.parameters


def test_weights_gradients_and_adamw_are_what_torch_holds():
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    log_probs(model).sum().backward()
    optimizer.step()
    measured = {
        "weights": sum(value.nbytes for value in model.parameters()),
        "gradients": sum(value.grad.nbytes for value in model.parameters()),
        "optimiser": sum(part.nbytes for state in optimizer.state.values() for part in state.values()),
    }
    planned = gpu_memory(Recipe(), Launch(1, 1, "single", False, ""), SHAPE, 2**30).resident
    for name, size in measured.items():
        assert planned[name] == pytest.approx(size, rel=0.001), name


def without_cpu_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels fold a tile in place, and multiply into float32; here they are left out, so buffers remain."""
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked_logprob, name, lambda *args, **kwargs: None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing: bool):
    model = make_model(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    recipe = Recipe(dtype="bfloat16", gradient_checkpointing=checkpointing)
    planned, _ = activation_bytes(recipe, SHAPE, ROWS, LENGTH)
    assert planned == pytest.approx(kept_for_backward(model), rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_real_shape_is_what_torch_would_allocate(checkpointing: bool, monkeypatch: pytest.MonkeyPatch):
    """Six layers of Qwen2.5-0.5B as fake tensors, which allocate nothing and tell every size; GPU kernels as below."""
    without_cpu_copies(monkeypatch)
    shape = replace(model_shape("Qwen/Qwen2.5-0.5B"), layers=6)
    with FakeTensorMode():
        model = make_model(torch.bfloat16, shape)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for updates in (
                False,
                True,
                False,
                True,
            ):  # two micro-batches an update: gradients are there in the second
                log_probs(model, shape, rows=2, length=1000).sum().backward()
                if updates:
                    optimizer.step()
                    optimizer.zero_grad()
                tracker.reset_mod_stats()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    recipe = Recipe(
        dtype="bfloat16",
        beta=0,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=2,
        num_generations=2,
        num_probe_slots=0,
        max_sequence_length=1000,
        use_vllm=True,
        vllm_mode="server",
    )
    planned = gpu_memory(recipe, Launch(1, 1, "single", False, ""), shape, 24 * GIB).peak - CONTEXT
    assert planned == pytest.approx(measured, rel=0.02)


def test_log_probs_take_a_tile_of_logits_and_the_heads_gradient(monkeypatch: pytest.MonkeyPatch):
    without_cpu_copies(monkeypatch)
    tokens = ROWS * LENGTH
    weight = torch.nn.Parameter(torch.zeros(SHAPE.vocabulary, SHAPE.hidden, dtype=torch.bfloat16))
    tracker = MemTracker()
    tracker.track_external(weight)
    with tracker:
        hidden = torch.zeros(tokens, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.long)
        output = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ("log_probs", "entropy")
        )
        output[0].sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    measured = sum(size for part, size in peak.items() if part != "Total") - weight.nbytes
    planned = head_bytes(Recipe(dtype="bfloat16"), SHAPE, tokens)
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_floating_point_operations_of_the_loss_are_what_torch_counts(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    """Two layers of Qwen2.5-3B as fake tensors, without fused attention and sums in place, which are not counted."""
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", lambda total, left, right: torch.mm(left, right))
    shape = replace(model_shape("Qwen/Qwen2.5-3B"), layers=2)
    with FakeTensorMode():
        model = make_model(torch.bfloat16, shape)
        model.set_attn_implementation("eager")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with FlopCounterMode(display=False) as forward:
            total = log_probs(model, shape, rows=2, length=1000).sum()
        with FlopCounterMode(display=False) as backward:
            total.backward()
    recipe = Recipe(gradient_checkpointing=checkpointing)
    assert forward.get_total_flops() == pytest.approx(shape.forward_flops(2000, 1000, 2000), rel=0.01)
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert loss_flops(recipe, shape, 2000, 1000, 2000) == pytest.approx(counted, rel=0.01)
