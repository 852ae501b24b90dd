"""Plans against arithmetic by hand, and what is said where a run does not fit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest

from rex_rag.cli import main
from rex_rag.planning.memory import GIB, gpu_memory, head_bytes, kv_rows, loss_bytes
from rex_rag.planning.plan import made_faster, made_to_fit, make_plan
from rex_rag.planning.seconds import GPU, Assumptions, step_seconds
from rex_rag.planning.settings import Launch, Recipe
from rex_rag.planning.shape import ModelShape, model_shape

ROOT = Path(__file__).resolve().parents[2]
# hidden 8, one layer, 2 heads of 4 with one for keys, intermediate 16, vocabulary 100.
TINY = ModelShape(
    hidden=8, layers=1, heads=2, kv_heads=1, intermediate=16, vocabulary=100, is_tied=True, head_dim=4, has_bias=False
)


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512)],
)
def test_known_shapes_have_the_published_number_of_parameters(size: str, parameters: int):
    assert model_shape(f"Qwen/Qwen2.5-{size}").parameters == parameters
    assert model_shape(f"Qwen/Qwen2.5-{size}-Instruct").parameters == parameters


def test_parameters_by_hand():
    # q 8x8, k and v 8x4, o 8x8, gate and up 8x16, down 16x8, two norms of 8.
    assert TINY.layer_parameters == 64 + 32 + 32 + 64 + 3 * 128 + 16 == 592
    assert TINY.parameters == 100 * 8 + 592 + 8 == 1400
    assert TINY.lora_parameters(2, ("q_proj", "down_proj")) == 2 * (8 + 8) + 2 * (16 + 8) == 80
    assert TINY.kv_elements == 2 * 1 * 4


def test_a_local_config_is_read_and_experts_are_refused(tmp_path: Path):
    config = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_shape(str(tmp_path)) == replace(TINY, has_bias=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    with pytest.raises(ValueError, match="no experts, but it has num_experts"):
        model_shape(str(tmp_path))
    with pytest.raises(ValueError, match=r"'Qwen/Qwen9-1B', no folder here with a config\.json.*download"):
        model_shape("Qwen/Qwen9-1B")


def test_defaults_are_those_of_training():
    from trl import ModelConfig

    from rex_rag.retrieval.load import RetrieverArguments
    from rex_rag.training.budgets import BUDGETS
    from rex_rag.training.config import REXRAGConfig

    for entry in fields(Recipe):
        owner = next(kind for kind in (REXRAGConfig, ModelConfig, RetrieverArguments) if hasattr_of(kind, entry.name))
        [other] = [one for one in fields(owner) if one.name == entry.name]
        default = other.default if other.default_factory is MISSING else tuple(other.default_factory())
        default = BUDGETS.get(entry.name, default)
        assert entry.default == default, entry.name


def hasattr_of(kind: type, name: str) -> bool:
    return name in {entry.name for entry in fields(kind)}


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        # bytes of a parameter: weights, gradients, AdamW (with masters), reference; on 4 GPUs
        ("ddp", (4, 4, 8, 4)),
        ("zero1", (2, 2, 3, 2)),
        ("zero2", (2, 0.5, 3, 2)),
        ("zero3", (0.5, 0.5, 3, 0.5)),
        ("fsdp", (1, 1, 2, 1)),
    ],
)
def test_states_by_hand(sharding: str, expected: tuple[float, ...]):
    memory = gpu_memory(Recipe(), Launch(4, 1, sharding, False, ""), TINY, GIB)
    parts = [memory.resident[name] for name in ("weights", "gradients", "optimiser", "reference model")]
    assert parts == [1400 * share for share in expected]


def test_an_adapter_has_gradients_and_states_alone_and_no_reference():
    recipe = Recipe(dtype="bfloat16", use_peft=True, lora_r=2, lora_target_modules=["q_proj", "down_proj"])
    memory = gpu_memory(recipe, Launch(1, 1, "single", False, ""), TINY, GIB)
    assert memory.resident["weights, and adapter"] == 2 * 1400 + 4 * 80
    assert (memory.resident["gradients"], memory.resident["optimiser"]) == (320, 640)
    assert "reference model" not in memory.resident


def test_logits_are_one_tile_whatever_the_batch():
    recipe = Recipe(dtype="bfloat16")
    tile = 4096 * 32_768 * 2  # 256 MiB
    head = 100 * 8 * (4 + 2)  # the output matrix's gradient in float32, and its cast
    assert head_bytes(recipe, TINY, 4096) == tile + 4096 * 8 * 6 + head
    assert head_bytes(recipe, TINY, 40_960) == tile + 40_960 * 8 * 6 + head
    shape = model_shape("Qwen/Qwen2.5-3B")
    assert head_bytes(recipe, shape, 8 * 4096) < 8 * 4096 * shape.vocabulary * 2 / 3.5


def test_empty_slots_are_not_in_the_loss():
    # 640 rows a GPU, 320 originals and at most 38 probes, in 80 micro-batches: 358.4 / 80 = 4.48.
    recipe = Recipe(per_device_train_batch_size=8, steps_per_generation=80)
    assert recipe.loss_rows == 5
    assert replace(recipe, correction="rescue_replay").loss_rows == 8
    assert replace(recipe, num_generations=5, num_probe_slots=0, per_device_train_batch_size=4).loss_rows == 4
    assert loss_bytes(recipe, TINY) < loss_bytes(replace(recipe, correction="rescue_replay"), TINY)


def test_vllms_share_by_hand():
    recipe = Recipe(use_vllm=True, vllm_gpu_memory_utilization=0.5)
    capacity = 2 * (2 * GIB + 2 * 1400 + 10 * 16 * 100)  # workspace, weights, ten rows of 100 tokens of 16 bytes
    assert kv_rows(recipe, TINY, capacity, 100) == 10


def test_seconds_by_hand():
    recipe = Recipe(
        per_device_train_batch_size=1,
        steps_per_generation=50,
        gradient_accumulation_steps=50,
        num_generations=5,
        num_probe_slots=0,
        beta=0.0,
        use_vllm=True,
        vllm_importance_sampling_correction=False,
        gradient_checkpointing=False,
    )
    given = Assumptions(
        prompt_tokens=0, written_tokens=100, retrieved_tokens=0, flops_share=1, bandwidth_share=1, searches=1
    )
    gpu = GPU("toy", 1, flops=1.0, bandwidth=1e18, link=1e18)
    seconds = step_seconds(recipe, Launch(1, 1, "single", False, ""), TINY, gpu, 4 * GIB, given)
    # One row a micro-batch, as long as the mean: 50 x 100 tokens, 2 x 592 a token in the layer, 4 x 8 x 100 in
    # attention, 2 x 800 in the output matrix; forward and twice as much backward, and the logits once more.
    assert seconds["loss, forward and backward"] == pytest.approx(50 * 100 * (3 * (1184 + 3200) + 4 * 1600))
    assert seconds["retrieval"] == 50 / 2500
    assert seconds["old log-probs"] == seconds["reference log-probs"] == seconds["links between GPUs"] == 0


def test_the_batch_is_kept_on_other_numbers_of_gpus():
    plan, said = make_plan("Qwen2.5-3B/rex_rag", gpus=4, memory=80)
    assert (plan.recipe.steps_per_generation, plan.recipe.gradient_accumulation_steps) == (160, 16)
    assert any("--gradient_accumulation_steps 16 --steps_per_generation 160" in line for line in said)
    with pytest.raises(ValueError, match="8 processes, and 3 cannot share its 80 micro-batches"):
        make_plan("Qwen2.5-3B/rex_rag", gpus=3, memory=80)


def test_what_does_not_fit_is_made_to_fit_with_no_needless_change():
    plan, _ = make_plan("Qwen2.5-3B/rex_rag", gpus=1, memory=24)
    assert not plan.fits and plan.rounds_away
    fitting = made_to_fit(plan)
    assert fitting.fits and fitting.recipe.use_peft and fitting.recipe.dtype == "bfloat16"
    assert not fitting.recipe.vllm_enable_sleep_mode or not fitting.changed(vllm_enable_sleep_mode=False).fits
    assert "--use_peft true" in fitting.flags(plan) and "zero3" not in fitting.flags(plan)
    assert made_to_fit(make_plan("Qwen2.5-7B/rex_rag", gpus=1, memory=8)[0]) is None


def test_the_settings_that_reach_the_target_of_100_seconds():
    """2,560 trajectories of 1,500 tokens on 8 H100, searches under 3 % of it."""
    plan, _ = make_plan("Qwen2.5-3B/rex_rag", gpus=8, gpu="H100")
    assert plan.fits and plan.step < 100 and plan.seconds["retrieval"] < 0.03 * plan.step
    faster = made_faster(plan)
    assert faster and all(one.fits for one in faster)
    assert plan.step > faster[0].step >= faster[-1].step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8"], "neither --memory nor --gpu"),
        (["--gpus", "8", "--memory", "80", "--use_pefd", "true"], r"use_pefd' \(did you mean use_peft\?\)"),
        (["--gpus", "8", "--memory", "80", "--accelerate", "accelerate_configs/single_gpu"], "does not launch 8"),
        (
            ["--gpus", "1", "--memory", "80", "--per_device_train_batch_size", "3", "--steps_per_generation", "1"],
            "whole",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture):
    import re

    assert main(["plan", "Qwen2.5-3B/rex_rag", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_the_command_prints_parts_stages_changes_and_assumptions(capsys: pytest.CaptureFixture):
    assert main(["plan", "Qwen2.5-3B/rex_rag", "--gpus", "8", "--memory", "24", "--price", "2"]) == 0
    text = capsys.readouterr().out
    for part in ("weights  ", "optimiser", "TOO MUCH", "old log-probs", "1,005 generations", "at 2 a GPU hour"):
        assert part in text
    assert "to make it work: " in text and "with recipes/accelerate_configs/zero3.yaml" in text
    assert "- a trajectory has 1,500 tokens" in text and "- not counted: " in text


def test_a_plan_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from rex_rag.cli import main\n"
        "main(['plan', 'Qwen2.5-3B/rex_rag', '--gpus', '8', '--memory', '80'])\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_pages_tables_are_what_plans_say():
    spec = importlib.util.spec_from_file_location("hardware_tables", ROOT / "scripts" / "hardware_tables.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == script.PAGE.read_text(encoding="utf-8"), "run python scripts/hardware_tables.py"
