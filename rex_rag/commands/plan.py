"""`rex-rag plan`: what a recipe would take on GPUs that need not be there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields

from rex_rag.commands.terminal import positive
from rex_rag.planning.memory import GIB, SPARE, kv_rows
from rex_rag.planning.plan import Plan, made_faster, made_to_fit, make_plan
from rex_rag.planning.seconds import GPUS, Assumptions, trajectories
from rex_rag.retrieval.estimate import human_seconds
from rex_rag.support.wording import counted


def add_plan(commands: argparse._SubParsersAction) -> None:
    """`rex-rag plan`: memory by part, seconds by stage, hours, and what to change."""
    plan = commands.add_parser(
        "plan",
        help="memory, seconds and hours that a recipe would take",
        description="Work out from a recipe, overrides (--key value) behind it included, what one GPU would hold, how "
        "long a step would take by stage, and what to change where it does not fit. No GPU is needed and nothing is "
        "loaded; every assumption is printed. docs/hardware.md says how far these figures were checked.",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a file, or a name that `rex-rag recipe` lists")
    plan.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs in all, one process each")
    plan.add_argument(
        "--nodes", type=positive, default=1, metavar="M", help="machines that they stand in (default: 1)"
    )
    plan.add_argument("--memory", type=positive, metavar="G", help="GiB of one GPU (default: the card's)")
    plan.add_argument("--gpu", choices=sorted(GPUS), help="whose speed to take (default: by memory)")
    plan.add_argument("--accelerate", metavar="FILE", help="accelerate's configuration (default: the recipe's header)")
    plan.add_argument("--price", type=float, metavar="P", help="of a GPU hour, in any currency")
    defaults = Assumptions()
    for entry in fields(Assumptions):
        plan.add_argument(
            f"--{entry.name}",
            type=float,
            default=getattr(defaults, entry.name),
            metavar="X",
            help="assumption (default: %(default)g)",
        )
    plan.set_defaults(run=_plan, overrides=())


def _plan(options: argparse.Namespace) -> None:
    names = ("recipe", "overrides", "gpus", "nodes", "memory", "gpu", "accelerate")
    given = Assumptions(**{entry.name: getattr(options, entry.name) for entry in fields(Assumptions)})
    plan, said = make_plan(**{name: getattr(options, name) for name in names}, given=given)
    print("\n".join(_lines(plan, options, said)))


def _lines(plan: Plan, options: argparse.Namespace, said: list[str]) -> Iterator[str]:
    recipe, launch, gpu = plan.recipe, plan.launch, plan.gpu
    nodes = f" in {launch.nodes} nodes" if launch.nodes > 1 else ""
    yield f"{options.recipe}: {recipe.model_name_or_path}, {plan.shape.parameters / 1e9:.3f} billion parameters"
    yield f"{launch.gpus} x {gpu.memory} GiB{nodes}, speed of {gpu.name}, {launch.sharding} ({launch.file})"
    rows = counted(recipe.loss_rows, "row")
    yield f"\nmemory of one GPU, GiB; the loss of {rows} of {recipe.max_sequence_length:,} tokens"
    for name, size in plan.memory.resident.items():
        yield f"  {name:<36}{size / GIB:8.2f}"
    for name, size in plan.memory.moments.items():
        yield f"  at times: {name:<26}{size / GIB:8.2f}"
    yield f"  {'peak':<36}{plan.memory.peak / GIB:8.2f} of {gpu.memory}, {SPARE:.0%} of them to spare: " + (
        "fits" if not plan.excess else f"{plan.excess / GIB:.1f} TOO MUCH"
    )
    if recipe.use_vllm and recipe.vllm_mode == "colocate":
        held = kv_rows(recipe, plan.shape, plan.capacity, plan.given.trajectory(recipe))
        yield f"  vLLM's KV cache holds {held:,} mean trajectories" + (
            ": TOO FEW, its share is too small" if plan.engine_is_starved else ""
        )
    yield from _time_lines(plan, options.price)
    yield from _change_lines(plan)
    yield "\nassumptions"
    for line in (*said, *plan.given.lines(recipe)):
        yield f"  - {line}"


def _time_lines(plan: Plan, price: float | None) -> Iterator[str]:
    recipe = plan.recipe
    originals, started, kept = trajectories(recipe, plan.launch, plan.given)
    length = plan.given.trajectory(recipe)
    yield f"\nseconds of a generation step: {originals:,.0f} originals, {kept:,.0f} of {started:,.0f} probes,"
    yield f"{(originals + kept) * length / 1e6:.2f} million tokens, {recipe.updates:g} updates"
    for name, seconds in plan.seconds.items():
        yield f"  {name:<36}{seconds:8.1f}  {seconds / plan.step:4.0%}"
    yield f"  {'step':<36}{plan.step:8.1f}"
    if plan.hours is None:
        yield "  whole run: set max_steps, a plan does not count questions"
        return
    cost = "" if price is None else f", {plan.hours * plan.launch.gpus * price:,.0f} at {price:g} a GPU hour"
    generations = recipe.max_steps / recipe.updates
    yield f"  whole run: {generations:,.0f} generations, {human_seconds(plan.hours * 3600)}{cost}"


def _change_lines(plan: Plan) -> Iterator[str]:
    if plan.rounds_away:
        yield "\nweights in half precision without float32 masters: updates at such learning rates ROUND AWAY"
    fitting = plan if plan.fits else made_to_fit(plan)
    if fitting is None:
        yield "\nno setting here makes it fit: take GPUs with more memory, more of them, or a smaller model"
        return
    if fitting is not plan:
        yield f"\nto make it work: {fitting.flags(plan)}"
        yield f"  then {fitting.memory.peak / GIB:.1f} GiB and {fitting.step:.0f} s a step"
    for faster in made_faster(fitting):
        yield f"\nfaster: {faster.flags(plan)}"
        yield f"  then {faster.memory.peak / GIB:.1f} GiB and {faster.step:.0f} s a step"
