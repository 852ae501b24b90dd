"""Write the tables of plans into docs/hardware.md: `python scripts/hardware_tables.py`; `--check` only compares."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from rex_rag.planning.memory import GIB
from rex_rag.planning.plan import Plan, made_faster, made_to_fit, make_plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hardware.md"
BLOCK = re.compile(r"(<!-- plans -->\n).*?(<!-- end -->\n)", re.DOTALL)
HEAD = "| recipe | GPUs | as written: GiB | s a step | changed | GiB | s a step | days |\n" + "|---" * 8 + "|"
RECIPES = [
    ("Qwen2.5-0.5B/rex_rag", [1], (24,)),
    ("Qwen2.5-1.5B/rex_rag_lora", [1], (24,)),
    ("Qwen2.5-3B/rex_rag", [1, 2, 4, 8], (24, 48, 80)),
    ("Qwen2.5-7B/rex_rag", [8, 16], (24, 48, 80)),
]
# What is said for a setting, in the order of the table's cell.
WORDS = {
    "use_peft": "LoRA",
    "vllm_tensor_parallel_size": "tensor parallel {}",
    "gradient_checkpointing": "no checkpointing",
    "per_device_train_batch_size": "micro-batch {}",
    "vllm_gpu_memory_utilization": "vLLM {}",
    "vllm_enable_sleep_mode": "sleep",
}


def changes(plan: Plan, given: Plan) -> str:
    """What differs from the recipe, in few words."""
    words = ["ZeRO-3"] if plan.launch.file != given.launch.file else []
    if plan.recipe.weight_bytes > given.recipe.weight_bytes:
        words.append("float32")
    for name, text in WORDS.items():
        value = getattr(plan.recipe, name)
        if value != getattr(given.recipe, name):
            words.append(text.format(value))
    return ", ".join(words) or "nothing"


def row(recipe: str, gpus: int, memory: int) -> str:
    """One plan as it is, or with what makes it fit, and with what makes it faster."""
    over_nodes = {"nodes": gpus // 8, "accelerate": f"accelerate_configs/zero2_{gpus // 8}nodes"} if gpus > 8 else {}
    given, _ = make_plan(recipe, gpus=gpus, memory=memory, **over_nodes)
    plan = given if given.fits else made_to_fit(given)
    written = f"{given.memory.peak / GIB:.1f} | {given.step:,.0f}" if given.fits else "no | "
    start = f"| {recipe} | {gpus} x {memory} GiB | {written} | "
    if plan is None:
        return start + "does not fit | | | |"
    plan = [plan, *made_faster(plan)][-1]
    return (
        start + f"{changes(plan, given)} | {plan.memory.peak / GIB:.1f} | {plan.step:,.0f} | {plan.hours / 24:,.1f} |"
    )


def tables() -> Iterator[str]:
    yield HEAD
    for recipe, counts, sizes in RECIPES:
        for gpus in counts:
            for memory in sizes:
                yield row(recipe, gpus, memory)


def page() -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda block: block[1] + "\n".join(tables()) + "\n" + block[2], PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the page is not what it would be")
    if parser.parse_args().check:
        raise SystemExit(page() != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")
