"""What can be said of a training command in a second, before torch is imported: everything that is amiss at once.

Looked at are the recipe's keys, the settings of questions, evaluation and retriever, and what they name on this
machine: model, files and their columns, index, servers, hardware. What only the full configuration tells
(`REXRAGConfig`) is checked behind it.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from rex_rag.data.qa import QuestionArguments, QuestionSource
from rex_rag.data.question_files import column_names, has_file_suffix
from rex_rag.data.question_rows import Columns, no_column
from rex_rag.evaluation.during_training import EvaluationSetArguments
from rex_rag.models.files import HUB_NAME, check_model
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.load import RetrieverArguments
from rex_rag.support.errors import EXPECTED_ERROR, one_line
from rex_rag.support.options import LISTS, with_lists_joined
from rex_rag.support.politeness import longest_wait
from rex_rag.support.recipes import with_recipe_path
from rex_rag.support.wording import describe_unknown

# Where the fields of a recipe are declared whose classes cannot be imported without torch.
_DECLARED = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ("trl", "trainer/model_config.py", "ModelConfig"),
    ("rex_rag", "training/config.py", "REXRAGConfig"),
)
_LIGHT = (QuestionArguments, EvaluationSetArguments, RetrieverArguments)
_TEXT_FILES = ("prompt_template", "feedback_text", "exploration_prompts")
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# Trackers with an extra of this package, and the modules of which one is enough.
_TRACKERS = {
    **{"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")},
    "mlflow": ("mlflow",),
}
_SECONDS = 3.0  # for a server or the Hub to answer


@dataclass
class Findings:
    """settings: wrong wherever the recipe runs. here: what this machine lacks. waiting: servers that do not answer."""

    settings: list[str] = field(default_factory=list)
    here: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


def _home(package: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def recipe_keys() -> set[str]:
    """Every key that a recipe may have, read from where the installed versions declare them."""
    keys = {one.name for part in _LIGHT for one in fields(part)} | {"config"}
    for package, path, name in _DECLARED:
        tree = ast.parse((_home(package) / path).read_text(encoding="utf-8"))
        declared = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for node in declared.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _is_no_field(node):
                keys.add(node.target.id)
    return keys


def _is_no_field(node: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(node.annotation) or "init=False" in ast.unparse(node).replace(" ", "")


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """The recipe of a command line with what stands behind it, values as YAML reads them; paths stay as they are.

    Raises:
        ValueError, OSError, yaml.YAMLError: for a recipe that is not there, or is none.
    """
    words = with_recipe_path(with_lists_joined(words, LISTS))
    settings: dict[str, Any] = {}
    if "--config" in words:
        with open(words[words.index("--config") + 1], encoding="utf-8") as file:
            read = yaml.safe_load(file)
        settings = dict(read) if isinstance(read, Mapping) else {}
    given: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            key = key.replace("-", "_")
            given[key] = [value] if value else []
        elif key is not None:
            given[key].append(word)
    given.pop("config", None)
    return settings | {
        name: True if not values else _scalar(values[0]) if len(values) == 1 else [*map(_scalar, values)]
        for name, values in given.items()
    }


def _scalar(word: str) -> Any:
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return None if word.lower() == "none" else value if isinstance(value, bool | int | float) else word


def examine(settings: Mapping[str, Any]) -> Findings:
    """Everything that is amiss with a recipe's settings, as `read_settings` gives them."""
    found = Findings()
    known = recipe_keys()
    unknown = [name for name in settings if name.replace("-", "_") not in known]
    if unknown:
        found.settings.append(describe_unknown(unknown, sorted(known)))
    made: dict[type, Any] = {}
    for part in _LIGHT:
        own = {one.name: settings[one.name] for one in fields(part) if settings.get(one.name) is not None}
        made[part] = _tried(found.settings, partial(part, **own))
    found.here += _model_problems(settings)
    _examine_trackers(settings.get("report_to"), found)
    for name in _TEXT_FILES:
        if isinstance(settings.get(name), str) and not Path(settings[name]).is_file():
            found.settings.append(f"{name} is {settings[name]!r}, which is not a file here ({Path.cwd()})")
    if (questions := made[QuestionArguments]) is not None:
        if not questions.datasets:
            found.settings.append("datasets names no question set; name at least one")
        for source in questions.datasets:
            _tried(found.here, partial(_check_source, source, questions))
    if (evaluation := made[EvaluationSetArguments]) is not None:
        found.here += _missing_benchmarks(evaluation)
    if (retriever := made[RetrieverArguments]) is not None:
        _examine_retriever(retriever, found)
    if settings.get("push_to_hub") is True and (problem := _login_problem(settings.get("hub_token"))):
        found.here.append(problem)
    if not settings.get("use_cpu") and sys.platform == "linux" and not any(map(os.path.exists, _GPU_DEVICES)):
        found.here.append("this machine has no GPU; run on one that has, or set --use_cpu true --bf16 false")
    return found


def _tried(problems: list[str], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        message = one_line(error)
        if message is None and not isinstance(error, RetrievalError):
            raise
        problems.append(message or str(error))
        return None


def _model_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    name = settings.get("model_name_or_path")
    if not isinstance(name, str):
        yield "model_name_or_path is not set; name a Hub model or a folder"
    elif Path(name).is_dir():
        problems: list[str] = []
        _tried(problems, lambda: check_model(name))
        yield from problems
    elif problem := _hub_problem(name, settings.get("model_revision")):
        yield f"model_name_or_path is {name!r}, and there is no such folder here ({Path.cwd()}); {problem}"


def _examine_trackers(report_to: str | Sequence[str] | None, found: Findings) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names if list(names) != ["none"] else []:
        if name not in _TRACKERS and name not in (known := _all_trackers()):
            reason = "which is whatever happens to be installed" if name == "all" else "which is no tracker"
            found.settings.append(
                f"report_to names {name!r}, {reason}; name {', '.join(_TRACKERS)}, none, or another that transformers "
                f"takes ({', '.join(sorted(known - set(_TRACKERS)))})"
            )
        elif name in _TRACKERS and not any(map(importlib.util.find_spec, _TRACKERS[name])):
            found.here.append(f"report_to names {name!r}, which is not installed: pip install 'rex-rag[{name}]'")


def _all_trackers() -> set[str]:
    """Every name that transformers takes, read from where it lists them."""
    tree = ast.parse((_home("transformers") / "integrations" / "integration_utils.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    table = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK")
    assert isinstance(table, ast.Dict)
    return {ast.literal_eval(key) for key in table.keys if key is not None}


def _hub_problem(name: str, revision: str | None) -> str | None:
    """Why a model cannot be had from the Hub; `None` for one that can, or was fetched before."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if not HUB_NAME.fullmatch(name):
        return "nor can it be a name on the Hub, which is of the form OWNER/NAME"
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return "it was never fetched from the Hub, and HF_HUB_OFFLINE forbids to"
    try:
        HfApi().model_info(name, revision=revision, timeout=_SECONDS)
    except Exception as error:  # the library's own and those of whatever carries its requests
        return f"the Hub does not give it: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _login_problem(token: str | None) -> str | None:
    """Why nothing could be pushed: no network, no token, or one that the Hub does not know."""
    from huggingface_hub import HfApi, constants, get_session

    said = "push_to_hub is on, but "
    if constants.HF_HUB_OFFLINE:
        return f"{said}HF_HUB_OFFLINE forbids to ask the Hub; leave one of them out"
    session = get_session()
    session.timeout = _SECONDS
    try:
        HfApi().whoami(token=token)
    except Exception as error:  # as above
        words = " ".join(str(error).split())[:200]
        return f"{said}the Hub knows no login ({type(error).__name__}: {words}); `hf auth login`, or leave it out"
    finally:
        session.timeout = None
    return None


def _check_source(source: QuestionSource, questions: QuestionArguments) -> None:
    """Whether a file of questions is there and has the columns; what the Hub or a folder holds is not looked at."""
    path = Path(source.path).expanduser()
    if path.is_dir() or not has_file_suffix(path):
        return
    columns = Columns(
        source.question_column or questions.question_column, source.answers_column or questions.answers_column
    )
    held = column_names(source.path, [columns.question, *columns.of_answers])
    for names, setting in (([columns.question], "question_column"), (columns.of_answers, "answers_column")):
        if absent := [name for name in names if name not in held]:
            raise no_column(source.path, absent, setting, held)


def _missing_benchmarks(evaluation: EvaluationSetArguments) -> Iterator[str]:
    for spec in evaluation.eval_benchmarks:
        name, _, path = str(spec).rpartition("=")
        if (name or "/" in path) and not Path(spec).exists() and not Path(path).expanduser().exists():
            yield f"eval_benchmarks names {path}, which is no file here ({Path.cwd()})"


def _examine_retriever(retriever: RetrieverArguments, found: Findings) -> None:
    found.here += [f"corpus {path} is no file here ({Path.cwd()})" for path in retriever.corpus if not _is_there(path)]
    _tried(found.here, lambda: retriever.kind.check(retriever))
    for url in retriever.retriever if retriever.kind.is_served else []:
        place = urlsplit(url)
        try:
            port = place.port or (443 if place.scheme == "https" else 80)
            socket.create_connection((place.hostname, port), timeout=_SECONDS).close()
        except OSError as error:
            from rex_rag.retrieval.remote.client import DEFAULT_BACKOFF_SECONDS
            from rex_rag.retrieval.remote.servers import MAX_BACKOFF_SECONDS

            attempts = retriever.retriever_max_attempts
            seconds = longest_wait(attempts, DEFAULT_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
            found.waiting.append(
                f"the retriever at {url} does not answer ({error.strerror or error}); a run waits for it, for "
                f"{seconds:.0f} s at most (retriever_max_attempts {attempts})"
            )


def _is_there(path: str) -> bool:
    return Path(path).expanduser().exists()


def refuse_at_once(words: Sequence[str]) -> int:
    """Say what is amiss with a training command; returns the exit code, 0 where it can go on.

    Processes of one machine would say the same, so the first one speaks. A server that does not answer may still be
    starting: that is told, and waited for.
    """
    if "--help" in words or "-h" in words:
        return 0
    problems: list[str] = []
    found = _tried(problems, lambda: examine(read_settings(words))) or Findings(problems)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    for line in found.waiting if speaks else []:
        sys.stderr.write(f"{line}\n")
    problems = found.settings + found.here
    if not problems:
        return 0
    if speaks:
        sys.stderr.write("error: " + "\n       ".join(problems) + "\n")
    return EXPECTED_ERROR
