"""Every recipe is parsed the way training parses it, and says of itself what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import TrlParser

from rex_rag.cli import _parser
from rex_rag.planning.memory import GIB
from rex_rag.planning.plan import make_plan
from rex_rag.planning.seconds import Assumptions
from rex_rag.training.recipe import RECIPE_PARTS

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = ROOT / "recipes" / "accelerate_configs"
OURS = ("quickstart", "hotpotqa_sample", "gemma-3-270m")
METHODS = ("grpo", "rex_rag", "rex_rag_dapo")
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (*OURS, *(f"Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B")))
    for path in (ROOT / "recipes" / folder).glob("*.yaml")
)
PAPER_RECIPES = [path for path in RECIPES if path.startswith(("recipes/Qwen2.5-3B", "recipes/Qwen2.5-7B"))]
ONE_GPU_RECIPES = ["recipes/Qwen2.5-0.5B/rex_rag.yaml", "recipes/Qwen2.5-1.5B/rex_rag_lora.yaml"]
HEADER_LAUNCH = re.compile(r"accelerate launch --config_file (\S+) -m (\S+) --config (\S+)")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch):
    """Recipes hold paths relative to the repository root, from where they are launched."""
    monkeypatch.chdir(ROOT)


def parse(recipe: str | Path, *overrides: str):
    """As in training; use_cpu, since this machine need not have the GPU that a recipe wants."""
    parser = TrlParser(RECIPE_PARTS)
    return parser.parse_args_and_config(["--config", str(recipe), "--use_cpu", "true", *overrides])


def header(recipe: str) -> str:
    """The comment at the top without its marks, continued lines joined."""
    lines = []
    for line in (ROOT / recipe).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines).replace("\\\n", "")


def values(recipe: str) -> dict:
    return yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))


def test_all_recipes_are_there():
    assert [
        *ONE_GPU_RECIPES,
        *(
            f"recipes/Qwen2.5-{size}/{name}.yaml"
            for size in ("3B", "7B")
            for name in ("grpo", "rex_rag", "rex_rag_dapo")
        ),
        "recipes/gemma-3-270m/grpo.yaml",
        "recipes/gemma-3-270m/rex_rag.yaml",
        "recipes/hotpotqa_sample/rex_rag.yaml",
        "recipes/quickstart/grpo.yaml",
        "recipes/quickstart/rescue_replay.yaml",
        "recipes/quickstart/rex_rag.yaml",
    ] == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_parses_strictly_and_builds_its_config(recipe: str):
    questions, _, retriever, config, model = parse(recipe)
    written = values(recipe)
    written.pop("use_cpu", None)
    written.pop("datasets")
    tracker = written.pop("report_to")
    assert config.report_to == ([] if tracker == "none" else [tracker])
    assert tracker == ("none" if "quickstart" in recipe or "hotpotqa" in recipe else "trackio")
    assert questions.datasets
    for name, value in written.items():
        owners = [part for part in (questions, retriever, config, model) if hasattr(part, name)]
        assert owners, name
        # A lone entry of a list may be written without brackets.
        assert any(getattr(owner, name) in (value, [value]) for owner in owners), f"{name}: {value!r} did not arrive"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_no_key_twice(recipe: str):
    keys = [key.value for key, _ in yaml.compose((ROOT / recipe).read_text(encoding="utf-8")).value]
    assert len(keys) == len(set(keys)), sorted(key for key in keys if keys.count(key) > 1)


def test_an_unknown_key_is_refused(tmp_path: Path):
    text = (ROOT / "recipes/quickstart/rex_rag.yaml").read_text(encoding="utf-8")
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(text.replace("probe_probability:", "probe_probabilty:"), encoding="utf-8")
    with pytest.raises(ValueError, match="probe_probabilty"):
        parse(misspelt)


def test_a_value_out_of_range_is_refused(tmp_path: Path):
    text = (ROOT / "recipes/quickstart/rex_rag.yaml").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("num_probe_slots: 5", "num_probe_slots: 10"), encoding="utf-8")
    with pytest.raises(ValueError, match="leaves no original"):
        parse(wrong)


@pytest.mark.parametrize("recipe", RECIPES)
def test_header_names_files_that_exist_and_the_recipe_itself(recipe: str):
    launches = HEADER_LAUNCH.findall(header(recipe))
    assert len(launches) == 1
    accelerate_config, script, named = launches[0]
    assert Path(accelerate_config).parent == Path("recipes/accelerate_configs")
    assert (ROOT / accelerate_config).is_file()
    assert script == "rex_rag.train"
    assert named == recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_header_shows_an_override_that_parses(recipe: str):
    shown = re.search(r"for example:\n(--.+)", header(recipe))
    assert shown, "no override example"
    overrides = shown[1].split()
    parts = parse(recipe, *overrides)
    for name, value in zip(overrides[::2], overrides[1::2], strict=True):
        [found] = [getattr(part, name[2:]) for part in parts if hasattr(part, name[2:])]
        assert found == [value] or str(found) == value


@pytest.mark.parametrize("recipe", [*ONE_GPU_RECIPES, *PAPER_RECIPES])
def test_every_number_has_its_source_beside_it(recipe: str):
    lines = (ROOT / recipe).read_text(encoding="utf-8").splitlines()
    numbers = [line for line in lines if re.match(r"\w+: [\d.]", line)]
    assert len(numbers) > 20
    for line in numbers:
        assert re.search(r"  # (paper|reference|ours|rows a question|one for each|no probes|= )", line), line


# The paper's hyper-parameters (arXiv 2508.08149, section 4.1) and, where it gives none, those of the authors' scripts.
REFERENCE = {
    "num_originals": 5,
    "retrieval_top_k": 3,
    "max_turns": 5,
    "max_prompt_length": 2048,
    "max_turn_tokens": 500,
    "max_observation_tokens": 500,
    "max_sequence_length": 4096,
    "format_reward_weight": 0.0,
    "num_iterations": 1,
    "learning_rate": 1e-6,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.285,
    "epsilon": 0.2,
    "beta": 0.001,
    "kl_token_max": 10.0,
    "kl_on_probe_tokens": True,
    "use_bias_correction_kl": False,
    "entropy_coef": 0.0,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "temperature": 1.0,
    "top_p": 1.0,
    "bf16": True,
}
REFERENCE_PROBES = {
    "probe_probability": 0.2,
    "keep_ratio": 0.12,
    "keep_ratio_schedule": "constant",
    "probe_filter": "likelihood",
    "correction": "token",
    "probe_density": "exact",
    "exploration_prompts": None,
    "exploration_pool_size": None,
}


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_numbers_are_the_papers_and_the_references(recipe: str):
    *_, config, _ = parse(recipe)
    expected = dict(REFERENCE)
    if "grpo" not in recipe:
        expected |= REFERENCE_PROBES
    if "dapo" in recipe:
        expected["epsilon_high"] = 0.28
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_batch_arithmetic_gives_the_papers_steps_on_eight_gpus(recipe: str):
    *_, config, _ = parse(recipe)
    rows_per_gpu = config.per_device_train_batch_size * config.steps_per_generation
    assert 8 * rows_per_gpu // config.num_generations == 512  # questions a generation
    assert rows_per_gpu % config.num_generations == 0  # whole groups on every GPU
    updates = config.steps_per_generation // config.gradient_accumulation_steps
    assert config.steps_per_generation % config.gradient_accumulation_steps == 0
    # 2,560 originals and up to 0.12 x 2,560 = 307 probes in mini-batches of 256 trajectories: 10 to 11.2 updates.
    assert 512 * config.num_originals / updates == 256
    assert config.max_steps == 1005 * updates == 10050
    assert config.save_steps == 50 * updates
    assert config.get_warmup_steps(config.max_steps) == 2865  # ceil(0.285 x 10050 = 2864.25)
    # The other way to count, questions, in the header: 256 of them an update.
    [accumulated, steps, saved] = re.search(
        r"--gradient_accumulation_steps (\d+) --max_steps (\d+) --save_steps (\d+)", header(recipe)
    ).groups()
    *_, config, _ = parse(recipe, "--gradient_accumulation_steps", accumulated, "--max_steps", steps)
    updates = config.steps_per_generation / config.gradient_accumulation_steps
    assert 512 / updates == 256 and config.max_steps == 1005 * updates and int(saved) == 50 * updates


@pytest.mark.parametrize("recipe", ONE_GPU_RECIPES)
def test_planned_hours_and_overrides_of_the_header_hold(recipe: str):
    """Its own plan, GRPO's override, and for the larger model the override under it."""
    text = header(recipe)
    [command] = re.findall(r"rex-rag (plan .+)", text)
    options = _parser().parse_args(command.split())

    def plan(*overrides: str):
        given = Assumptions(queries_per_second=options.queries_per_second)
        return make_plan(options.recipe, overrides, gpus=options.gpus, gpu=options.gpu, given=given)[0]

    plans = [plan()]
    if larger := re.search(r"The 3B model on one GPU:\n((?:--.+\n)+)", text):
        flags = larger[1].split()
        parse(recipe, *flags)
        plans.append(plan(*(word for pair in pairs(flags) if pair[0] != "--output_dir" for word in pair)))
    for one in plans:
        assert one.fits
        assert f"{one.step:.0f} s" in text and f"{one.hours:.1f} h" in text
        assert f"{one.memory.peak / GIB:.1f}" in text
    *_, config, _ = parse(recipe, *re.search(r"this recipe with\n?(.+\n--.+)", text)[1].split())
    assert config.num_probe_slots == 0
    assert config.generation_batch_size // config.num_generations == 64


def pairs(flags: list[str]) -> list[tuple[str, str]]:
    return list(zip(flags[::2], flags[1::2], strict=True))


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_methods_differ_only_where_they_must(size: str):
    rex, grpo, dapo = (values(f"recipes/Qwen2.5-{size}/{name}.yaml") for name in ("rex_rag", "grpo", "rex_rag_dapo"))
    probes = {"probe_probability", "keep_ratio", "probe_filter", "correction", "probe_density"}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"}

    def differing(one: dict, other: dict) -> set[str]:
        return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}

    assert differing(rex, dapo) == {"output_dir", "epsilon_high"}
    assert differing(rex, grpo) - batch == {"output_dir", "num_generations", "num_probe_slots", *probes}


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_loads(path: Path):
    config = load_config_from_file(str(path))
    on_cpu = path.stem.endswith("cpu")
    assert config.use_cpu is on_cpu
    assert config.mixed_precision == ("no" if on_cpu else "bf16")
    # MULTI_CPU wants mpirun and, without it, starts one process in silence; FSDP on CPU silently becomes DDP.
    assert config.distributed_type.value not in {"MULTI_CPU", "FSDP" if on_cpu else ""}


@pytest.mark.parametrize(
    ("name", "kind", "processes", "stage"),
    [
        ("cpu", "NO", 1, None),
        ("single_gpu", "NO", 1, None),
        ("ddp", "MULTI_GPU", 8, None),
        ("ddp_cpu", "MULTI_GPU", 2, None),
        ("zero2", "DEEPSPEED", 8, 2),
        ("zero2_2nodes", "DEEPSPEED", 16, 2),
        ("zero2_8nodes", "DEEPSPEED", 64, 2),
        ("zero3", "DEEPSPEED", 8, 3),
        ("zero3_cpu", "DEEPSPEED", 2, 3),
        ("fsdp2", "FSDP", 8, None),
    ],
)
def test_accelerate_config_is_what_its_name_says(name: str, kind: str, processes: int, stage: int | None):
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes == processes and config.num_machines == max(1, processes // 8)
    assert config.deepspeed_config.get("zero_stage") == stage
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
