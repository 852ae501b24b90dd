"""What GRPOSeams rests on in TRL and transformers. A version that moves any of it fails here, by name."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import trl
from transformers import Trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from rex_rag.training.grpo_seams import GRPOSeams

TRAINING = Path(inspect.getfile(GRPOSeams)).parent
MOVED = f"TRL {trl.__version__} has moved this; read it again, then change rex_rag/training/grpo_seams.py:"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (GRPOTrainer, "_generate", ["self", "prompts"]),
        (
            GRPOTrainer,
            "_calculate_rewards",
            ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        ),
        (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (
            GRPOTrainer,
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (GRPOTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (GRPOTrainer, "_log_completion_extra", ["self", "column", "values"]),
        (GRPOTrainer, "_get_train_sampler", ["self", "dataset"]),
        (VLLMGeneration, "_iter_named_params", ["self"]),
        (VLLMGeneration, "_fix_param_name_to_vllm", ["self", "name", "extra_prefixes"]),
        (Trainer, "_save", ["self", "output_dir", "state_dict"]),
        (Trainer, "_save_optimizer_and_scheduler", ["self", "output_dir"]),
        (Trainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
    ],
)
def test_what_is_overridden_or_called_takes_what_it_took(owner, name, expected):
    assert parameters(getattr(owner, name)) == expected, f"{MOVED} {owner.__name__}.{name}"


def test_the_forward_pass_takes_and_gives_what_it_did():
    forward = GRPOTrainer._get_per_token_logps_and_entropies
    assert parameters(forward)[:6] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    ], f"{MOVED} _get_per_token_logps_and_entropies"  # fmt: skip
    last = inspect.getsource(forward).rstrip().splitlines()[-1].strip()
    assert last == "return logps, entropies, aux_loss", f"{MOVED} what _get_per_token_logps_and_entropies returns"


def test_generate_returns_eight_entries_in_this_order():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    unpacked = re.search(r"\(\n((?:\s+\w+,\n)+)\s+\) = self\._generate\(prompts\)", source)
    assert unpacked, f"{MOVED} how _generate is called"
    assert unpacked[1].replace(",", "").split() == [
        "prompt_ids_list",
        "completion_ids_list",
        "tool_mask_list",
        "completions",
        "sampling_per_token_logps_list",
        "extra_fields",
        "images",
        "tool_images",
    ], f"{MOVED} the entries of _generate"


def test_the_loss_reads_what_is_replaced_behind_its_one_forward_pass():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    order = [
        "self._get_per_token_logps_and_entropies(",
        'advantages = inputs["advantages"]',
        'inputs.get("old_per_token_logps")',
        'inputs.get("sampling_per_token_logps"',
        'inputs["ref_per_token_logps"]',
    ]
    places = [source.find(text) for text in order]
    assert -1 not in places, f"{MOVED} {order[places.index(-1)]} in _compute_loss"
    assert source.count(order[0]) == 1 and places[0] == min(places), f"{MOVED} the order of _compute_loss"


def test_the_completion_table_has_these_columns():
    source = inspect.getsource(GRPOTrainer.__init__)
    keys = re.search(r"self\._logs = \{(.*?)\n        \}", source, re.DOTALL)
    assert keys, f"{MOVED} _logs"
    names = set(re.findall(r'"(\w+)":', keys[1]))
    assert {"prompt", "completion", "rewards", "advantages", "extra"} <= names, f"{MOVED} the columns of _logs"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (GRPOTrainer, ["_metrics", "_logs", "_tokenizer", "_last_loaded_step", "_step", "_buffered_inputs", "_dist"]),
        (VLLMGeneration, ["_llm_weights_sleeping", "max_completion_length", "generation_kwargs", "enable_sleep_mode"]),
        (VLLMGeneration, ["_iter_named_params()", "_dist.gather_params", "_dist.is_fsdp"]),
    ],
)
def test_attributes_that_are_read_are_set(source, names):
    text = inspect.getsource(inspect.getmodule(source))
    assert [name for name in names if f"self.{name}" not in text] == [], MOVED


def test_epochs_are_run_by_these_names():
    run = inspect.getsource(Trainer._run_epoch)
    for name in ("epoch", "epochs_trained", "steps_trained_in_current_epoch", "steps_in_epoch"):
        assert name in parameters(Trainer._run_epoch), f"{MOVED} {name} of Trainer._run_epoch"
    assert run


def private_names(path: Path) -> set[str]:
    """Private attributes of `self` or `super()` that a file reads, sets or overrides and TRL or Trainer defines."""
    known = {name for owner in (GRPOTrainer, Trainer) for name in dir(owner) if re.match(r"_[a-z]", name)}
    known |= {"_metrics", "_logs", "_tokenizer", "_last_loaded_step", "_buffered_inputs", "_dist"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return found & known


def test_no_other_file_of_training_touches_private_names():
    seams = ("grpo_seams.py", "engine_weights.py")
    touched = {path.name: private_names(path) for path in TRAINING.glob("*.py") if path.name not in seams}
    assert {name: found for name, found in touched.items() if found} == {}
