"""README and docs as a reader uses them: every link leads somewhere, every command parses, the site builds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from trl import TrlParser

from rex_rag.cli import _FORWARDED, _parser, main
from rex_rag.support.recipes import recipe_path
from rex_rag.training.recipe import RECIPE_PARTS
from tests.evaluation.tiny_run import make_tiny_world

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
LAUNCH = ["accelerate", "launch"]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Those that headings get on a repository's website and in the site."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's blocks for a shell, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    found = []
    for block in blocks:
        if " -c '" in block:  # a program of several lines
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def inline_commands(page: Path, program: str) -> list[str]:
    joined = " ".join(without_blocks(text_of(page)).split())
    return re.findall(rf"`{program} ([^`]+)`", joined)


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@cache
def repository_pages():
    spec = importlib.util.spec_from_file_location("repository_pages", ROOT / "docs/repository_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def options_of(command: str) -> frozenset[str]:
    """What `rex-rag COMMAND --help` lists, in either spelling."""
    if command in _FORWARDED:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue()))
    [choices] = [action.choices for action in _parser()._actions if action.choices]
    return frozenset(option for action in choices[command]._actions for option in action.option_strings)


@cache
def training_options() -> frozenset[str]:
    return frozenset(option for action in TrlParser(RECIPE_PARTS)._actions for option in action.option_strings)


def refused(words: list[str], known: frozenset[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known


# Links


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name: str):
    page = ROOT / name
    for target, anchor in LINK.findall(text_of(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists() and path.is_relative_to(ROOT), f"{name} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{name} links to {target}#{anchor}"
        elif anchor:
            assert repository_pages().line_of(path, anchor)


def test_a_link_by_name_finds_the_line_and_a_wrong_name_is_an_error():
    path = ROOT / "rex_rag/probes/mixed_sampling.py"
    line = repository_pages().line_of(path, "MixedSampler.sample")
    assert text_of(path).splitlines()[line - 1].strip() == "def sample("
    with pytest.raises(ValueError, match=r"mixed_sampling\.py defines no MixedSampler\.sampel"):
        repository_pages().line_of(path, "MixedSampler.sampel")


def test_the_walk_through_a_step_names_its_code_as_the_links_do():
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./[\w/]+\.py#([\w.]+)\)", text_of(ROOT / "docs/training_step.md"))
    assert len(links) > 20
    assert [shown for shown, linked in links if shown not in (linked, "forms.py")] == []


def test_every_extension_of_the_tests_is_shown_as_the_very_file():
    page = text_of(ROOT / "docs/extending.md")
    shown = re.findall(r"^```\{literalinclude\} \.\./(.+)$", page, re.MULTILINE)
    own = [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/extensions/own_*.py")]
    assert sorted(shown) == sorted(own)


# Commands


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name: str):
    for words in commands(ROOT / name):
        check_command(words)


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        check_targets(rest)
    elif program == "rex-rag":
        check_rex_rag(rest)
    elif words[:2] == LAUNCH:
        check_launch(words[2:])
    elif program == "python":
        check_python(rest)
    elif program == "pip":
        check_extras(rest)
    elif program == "sbatch":
        files = [word for word in rest if not word.startswith("-")][:2]
        assert all(Path(file).is_file() for file in files), words
        parse_overrides(files[1], rest[rest.index(files[1]) + 1 :])
    elif program.startswith("--"):  # what goes behind a launch
        assert not refused(words, training_options()), words
    else:
        assert program in ("trackio", "tensorboard", "git"), f"nothing here knows {program}"


def check_targets(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets, words


def check_rex_rag(words: list[str]) -> None:
    command = words[0]
    if command in _FORWARDED:
        assert not refused(words, options_of(command)), words
        if "--config" in words:
            assert recipe_path(words[words.index("--config") + 1])
        return
    options, further = _parser().parse_known_args(words)
    if command in ("check", "doctor", "plan"):
        recipe = Path(options.recipe)
        if recipe.parent == Path():  # my.yaml, the reader's
            assert not refused(further, training_options()), words
        else:
            parse_overrides(recipe_path(options.recipe), further)
    elif command != "ask":
        assert not further, words


def check_launch(words: list[str]) -> None:
    place = words.index("-m")
    options = launch_command_parser().parse_args([*words[:place], *words[place:]])
    assert Path(options.config_file).is_file() and options.module, words
    recipe = words[words.index("--config") + 1]
    further = words[words.index("--config") + 2 :]
    if options.training_script == "rex_rag.train":
        parse_overrides(recipe, further)
    else:
        assert options.training_script == "rex_rag.evaluate"
        assert Path(recipe).is_file() and not refused(further, options_of("evaluate")), words


def parse_overrides(recipe: str | Path, words: list[str]) -> None:
    parser = TrlParser(RECIPE_PARTS)
    parser.parse_args_and_config(["--config", str(recipe), "--use_cpu", "true", *words])


def check_python(words: list[str]) -> None:
    """A program of ours: its options stand in it, or in the modules that it takes them from."""
    module = words[1].replace(".", "/") if words[0] == "-m" else None
    file = Path(words[0]) if module is None else Path(f"{module}.py")
    file = file if file.is_file() or module is None else Path(module) / "__main__.py"
    assert file.is_file(), words
    sources, waiting = {}, [file]
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in sources:
            sources[path] = text_of(path)
            names = re.findall(r"^\s*from (rex_rag[\w.]*) import", sources[path], re.MULTILINE)
            waiting += [Path(name.replace(".", "/")).with_suffix(".py") for name in names]
    text = "\n".join(sources.values())
    unknown = [
        word
        for word in words
        if word.startswith("--") and word not in text and not re.search(rf"^    {word[2:]}:", text, re.MULTILINE)
    ]
    assert not unknown, words


def check_extras(words: list[str]) -> None:
    extras = set(re.findall(r"^(\w+) =$", text_of(ROOT / "setup.cfg"), re.MULTILINE))
    named = [extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")]
    assert set(named) <= extras, words


@pytest.mark.parametrize(
    "line",
    [
        "make quickstrat",
        "rex-rag serve --idnex indexes/mine",
        "rex-rag ask",
        "rex-rag view run --outptu page.html",
        "accelerate launch --config_file recipes/accelerate_configs/zero9.yaml -m rex_rag.train --config x.yaml",
        "accelerate launch --config_file recipes/accelerate_configs/cpu.yaml -m rex_rag.train "
        "--config recipes/Qwen2.5-3B/rex_rag.yaml --keep_ration 0.1",
        "python scripts/study.py --no-such-option",
        "pip install -e .[gpus]",
        "curl http://127.0.0.1",
    ],
)
def test_a_command_with_a_slip_is_found(line: str):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(line.split())


def test_commands_and_options_in_the_prose_are_known():
    options = {"--help", *training_options()}
    options |= {option for action in launch_command_parser()._actions for option in action.option_strings}
    [choices] = [action.choices for action in _parser()._actions if action.choices]
    options = options.union(*(options_of(command) for command in choices))
    scripts = "".join(text_of(path) for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("rex_rag/quickstart/*.py")])
    for page in PAGES:
        for target in inline_commands(page, "make"):
            check_targets(target.split())
        for command in inline_commands(page, "rex-rag"):
            name, *words = command.split()
            if name != "COMMAND":
                assert not refused(words, options_of(name) | {"--help"} | training_options()), f"{page}: {command}"
        for option in re.findall(r"`(--[a-z][\w-]*)", without_blocks(text_of(page))):
            assert option in options or f'"{option}"' in scripts or option == "--key", f"{page.name}: {option}"


def test_the_list_of_commands_is_whole():
    page = text_of(ROOT / "docs/commands.md")
    listed = [line.split() for line in re.findall(r"^\| `rex-rag ([^`]+)`", page, re.MULTILINE)]
    [choices] = [action.choices for action in _parser()._actions if action.choices]
    assert sorted(words[0] for words in listed) == sorted(choices)
    for name, *words in listed:
        named = re.findall(r"--[a-z][\w-]*", " ".join(words))
        assert not refused(named, options_of(name) | {"--key"}), name
    targets = set(re.findall(r"^([a-z-]+):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert targets == set(re.findall(r"`make ([a-z-]+)`", page))


@pytest.mark.slow
def test_the_readmes_python_trains_and_asks(tmp_path: Path, monkeypatch, capsys):
    """As it stands, but for the model's name and for budgets to its size."""
    world = make_tiny_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    world.questions.rename("questions.jsonl")
    world.corpus.rename("passages.jsonl")
    smaller = (
        f"prompt_template={str(world.model / 'prompt.txt')!r}, max_prompt_length=64, max_turn_tokens=12, "
        "max_observation_tokens=64, max_sequence_length=256, max_steps=1, use_cpu=True, bf16=False, report_to='none', "
    )
    for block in re.findall(r"^```python\n(.*?)^```$", text_of(ROOT / "README.md"), re.DOTALL | re.MULTILINE):
        block = block.replace("Qwen/Qwen2.5-3B", str(world.model)).replace("REXRAGConfig(", f"REXRAGConfig({smaller}")
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "outputs/my-agent/agent.json").is_file()
    assert capsys.readouterr().out.strip()


# The site


def test_the_readme_is_one_screen_and_its_picture_has_the_tables_figures():
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    table = re.search(r"^\| \| 2-hop \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE).groups()
    drawn = re.findall(r'text-anchor="end"[^>]*>(\d+)<', text_of(ROOT / "docs/rescue.svg"))
    assert [round(100 * float(figure)) for figure in table] == [int(figure) for figure in drawn]
    assert f"in {drawn[2]} of 100 cases" in text_of(ROOT / "docs/training_step.md")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_the_network(tmp_path: Path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    words = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **nowhere})
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {f"{page.stem}.html" for page in ROOT.glob("docs/*.md")} <= set(pages)
    loaded = {
        name: re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"(https?:[^\"]+)", pages[name]) for name in pages
    }
    assert not {name: found for name, found in loaded.items() if found}
    # Links to the code lead to lines that are there.
    links = re.findall(r'href="(repository/[^"#]+)#(line-\d+)"', pages["training_step.html"])
    assert len(links) > 20
    for file, line in links:
        assert f'id="{line}"' in pages[file]
    for documented in ("REXRAGTrainer", "REXRAGConfig", "SearchAgent", "Protocol", "Explorer", "CorrectionForm"):
        assert re.search(rf'<dt class="sig[^>]*id="[\w.]+\.{documented}"', pages["api.html"]), documented
