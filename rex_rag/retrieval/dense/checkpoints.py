"""Where an encoder's checkpoint lies, which one exactly it is, and that loading it runs no foreign code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rex_rag.retrieval.base import RetrievalError

# Weights, configuration, vocabulary: what sentence-transformers reads. Exports to other runtimes are left out.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "artifact.metadata")
_OTHER_RUNTIMES = ("onnx", "openvino")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OWN_MODULES = "sentence_transformers."
# Named by what PyLate saves; sentence-transformers reads it as a module of its own and imports nothing of PyLate.
_KNOWN_MODULES = ("pylate.models.Dense.Dense",)
# What a revision begins with that is a hash over a local folder.
LOCAL = "sha256:"
# Folders that many checkpoints lie in, and so name none; and the Hub cache's, which are named by commits.
_SAYS_NOTHING = re.compile(
    r"((model|encoder|checkpoint|final|best|last|output|weights|snapshot)s?)?[-_.]?\d*|[0-9a-f]{40}"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that is safe to load."""

    folder: Path
    revision: str  # Hub commit, or "sha256:..." over a local folder
    has_modules: bool  # whether it has sentence-transformers' files, which say how tokens are pooled
    prompts: dict[str, str]  # what its own configuration would prepend, by sentence-transformers' names
    makes_token_vectors: bool = False  # whether it was trained to: PyLate's, Stanford's, sentence-transformers' own


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Find a local folder, or fetch a Hub repository's safetensors weights, configuration and vocabulary.

    Raises:
        RetrievalError: for a checkpoint that is absent, has weights in pickle files alone, or needs code of its own.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_safe(folder)
        pinned = f"{LOCAL}{_folder_hash(folder)}"
    else:
        if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise RetrievalError(
                f"the encoder {name!r} is neither a folder nor a Hub repository `owner/name`; correct the path"
            )
        folder = _fetch(name, revision)
        _check_safe(folder)
        if not _COMMIT.fullmatch(folder.name):
            raise RetrievalError(f"the Hub cache holds {name} at {folder}, which does not name its commit")
        pinned = folder.name
    own = _read_json(folder / "config_sentence_transformers.json")
    filled = {key: value for key, value in (own.get("prompts") or {}).items() if value}
    late = own.get("model_type") in ("MultiVectorEncoder", "ColBERT") or "query_prefix" in own
    late = late or "HF_ColBERT" in (_read_json(folder / "config.json").get("architectures") or ())
    return Checkpoint(folder, pinned, (folder / "modules.json").is_file(), filled, late)


def pinned_checkpoint(name: str, revision: str | None, location: str | Path | None = None) -> Checkpoint:
    """The checkpoint of that name, or at another place, with the revision that an index was made with.

    Raises:
        RetrievalError: as `find_checkpoint`, and for another revision.
    """
    checkpoint = find_checkpoint(str(location or name), None if location else revision)
    if revision is not None and checkpoint.revision != revision:
        raise RetrievalError(
            f"the encoder at {checkpoint.folder} has the revision {checkpoint.revision}, not {revision}: its weights "
            "or configuration are others than those that made the index; give the original checkpoint, or build the "
            "index again"
        )
    return checkpoint


@contextmanager
def loading(checkpoint: Checkpoint, device: str) -> Iterator[None]:
    """What loading raises, as an error that names checkpoint and device."""
    try:
        yield
    except Exception as error:  # of whatever library: weights cut short, an unknown architecture, no such device
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise RetrievalError(
            f"the encoder {checkpoint.folder} cannot be loaded on {device}: {type(error).__name__}: {reason}; check "
            "the device, and whether the checkpoint is whole"
        ) from error


def public_name(name: str, revision: str) -> str:
    """What may be published of where a checkpoint comes from: a Hub repository as it is, a folder without its path.

    A folder whose own name says nothing is named by its model type, `bert encoder`.
    """
    if not revision.startswith(LOCAL):
        return name
    folder = Path(name).expanduser()
    own = folder.resolve().name if folder.is_dir() else folder.name
    if not _SAYS_NOTHING.fullmatch(own):
        return own
    kind = _read_json(folder / "config.json").get("model_type")
    return f"{kind} encoder" if isinstance(kind, str) and re.fullmatch(r"[\w.-]+", kind) else "local encoder"


def short_name(name: str, revision: str) -> str:
    """A checkpoint in the words of a description: a repository without its owner, a folder with its hash."""
    shown = public_name(name, revision)
    if revision.startswith(LOCAL):
        return f"{shown} ({revision.removeprefix(LOCAL)[:12]})"
    return shown.rsplit("/", 1)[-1]


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_FILES),
            ignore_patterns=[f"{folder}/*" for folder in _OTHER_RUNTIMES],
        )
    except Exception as error:
        raise RetrievalError(
            f"the encoder {name} (revision {revision or 'main'}) could not be had from the Hub or its cache: "
            f"{type(error).__name__}: {error}; check the name, or give a local folder"
        ) from error
    return Path(path)


def _check_safe(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise RetrievalError(f"{folder} is no checkpoint: it has neither config.json nor modules.json")
    weights = {path.parent for path in folder.rglob("*.safetensors")}
    if not weights:
        raise RetrievalError(
            f"{folder} has no weights as safetensors, and pickled ones are never loaded: give the revision of the "
            "repository that has them (often a pull request, refs/pr/N), or save the model again with "
            "`model.save_pretrained(folder)`"
        )
    for path in folder.rglob("*"):
        unread = path.relative_to(folder).parts[0] in _OTHER_RUNTIMES
        if path.suffix in _PICKLES and path.parent not in weights and not unread:
            raise RetrievalError(f"{path} is a pickle without safetensors beside it, and pickles are never loaded")
    modules = _read_json(folder / "modules.json", default=[])
    types = [str(module.get("type")) for module in modules]
    foreign = [name for name in types if not name.startswith(_OWN_MODULES) and name not in _KNOWN_MODULES]
    if foreign:
        raise RetrievalError(f"{folder} needs code of its own ({foreign[0]}), which is never run; use another encoder")


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    files = {path for pattern in _FILES for path in folder.rglob(pattern) if path.is_file()}
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if relative.parts[0] in _OTHER_RUNTIMES or any(part.startswith(".") for part in relative.parts):
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{relative.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _read_json(path: Path, default=None):
    if not path.is_file():
        return {} if default is None else default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RetrievalError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
