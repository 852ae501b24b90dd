"""Model and tokenizer files that are damaged, missing or do not fit: said by name, before weights are loaded.

What is looked at is cheap: headers and lengths of weights, the table of contents of PyTorch's archives, the syntax of
JSON. Bytes that changed within a file of the right length are not noticed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
_CONFIG_FILE = "config.json"
# As transformers and peft look for them, the first that is there.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "chat_template.jinja"),
)
_POINTER = b"version https://git-lfs"
_ARCHIVE, _OLDER_FORMAT = b"PK\x03\x04", b"\x80"
# The Hub's own rule, save for the few names that it keeps for itself.
HUB_NAME = re.compile(r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]{0,95}", re.ASCII)
# What transformers, peft and torch say of weights that are of another shape than the configuration's.
_OTHER_SHAPES = ("ignore_mismatched_sizes", "size mismatch for")


class ModelFileError(UserError):
    """A file of a model cannot be used; the message names it, the reason and the way out."""


def broken(path: Path) -> str | None:
    """What is wrong with a file of weights, a PyTorch archive or a JSON file; `None` where nothing is to be seen."""
    if not path.is_file():
        return "is missing"
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if not head:
        return "is empty"
    if head == _POINTER:
        return "is a Git LFS pointer and not the file itself: fetch it again, with git-lfs"
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"is no JSON ({error}): it was cut, or edited"
        if not isinstance(content, dict):
            return f"holds a {type(content).__name__} and no JSON object"
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            return f"is cut or damaged ({error})"
    elif head.startswith(_ARCHIVE) and not zipfile.is_zipfile(path):
        return "is cut: it has no table of contents at its end"
    elif path.suffix == ".bin" and not head.startswith((_ARCHIVE, _OLDER_FORMAT)):
        return "is no file of PyTorch's"
    return None


def damaged_weights(folder: Path) -> str | None:
    """The first file of a folder's weights that is missing or damaged, with the reason; `None` where all are whole."""
    names = _ADAPTER_WEIGHTS if (folder / ADAPTER_FILE).is_file() else _WEIGHTS
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        return f"{folder / names[0]} is missing"
    if reason := broken(first):
        return f"{first} {reason}"
    if first.suffix != ".json":
        return None
    shards = json.loads(first.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        return f"{first} has no `weight_map`, which says where each tensor lies"
    for shard in sorted(set(shards.values())):
        if reason := broken(folder / shard):
            return f"{folder / shard}, which {first.name} names, {reason}"
    return None


def check_tokenizer(name: str, revision: str | None = None) -> None:
    """Refuse a tokenizer whose files are damaged.

    Raises:
        ModelFileError: naming the file.
    """
    if (folder := local_folder(name, revision)) is not None:
        _check_each(folder, _TOKENIZER_FILES)


def check_model(name: str, revision: str | None = None) -> None:
    """Refuse a model or adapter whose files are damaged, and an adapter whose base model is away.

    Args:
        name: a folder, or a Hub name, of which files that were fetched before are looked at.

    Raises:
        ModelFileError: naming the file.
    """
    folder = local_folder(name, revision)
    if folder is None:
        return
    _check_each(folder, (ADAPTER_FILE, _CONFIG_FILE, "generation_config.json", *_TOKENIZER_FILES))
    is_adapter = (folder / ADAPTER_FILE).is_file()
    if Path(name).is_dir():  # of the Hub's files some may still be fetched
        if not is_adapter and not (folder / _CONFIG_FILE).is_file():
            raise ModelFileError(f"{folder / _CONFIG_FILE} is missing; name the folder that a model was saved to")
        if damage := damaged_weights(folder):
            raise ModelFileError(f"{damage}; fetch or save the model again")
    if is_adapter:
        base, base_revision = adapter_base(folder)
        if not Path(base).is_dir() and not HUB_NAME.fullmatch(base):
            raise ModelFileError(_base_is_away(folder, base))
        check_model(base, base_revision)


def _check_each(folder: Path, names: tuple[str, ...]) -> None:
    for path in (folder / name for name in names):
        if path.is_file() and (reason := broken(path)):
            raise ModelFileError(f"{path} {reason}; fetch or save it again")


def refuse_nonfinite(name: str) -> None:
    """Refuse weights in a folder here that hold NaN or infinity. Reads all of them, as loading does a moment later.

    Raises:
        ModelFileError: naming file and tensor.
    """
    import torch
    from safetensors import safe_open

    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else ():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file, no mapping)
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
                    raise ModelFileError(
                        f"{path} holds values of {key} that are NaN or infinite, as training that broke leaves them; "
                        "name an earlier checkpoint"
                    )


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Where the files of a model lie here: the folder itself, or what was fetched of a Hub name before."""
    if Path(name).is_dir():
        return Path(name)
    if not HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_adapter(name: str) -> bool:
    """Whether a model's name is that of a folder with a PEFT adapter."""
    return (Path(name) / ADAPTER_FILE).is_file()


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter was trained on.

    Raises:
        ModelFileError: for an adapter that does not say.
    """
    settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base or not isinstance(base, str):
        raise ModelFileError(
            f"{folder / ADAPTER_FILE} does not say which model it adapts; set base_model_name_or_path in it"
        )
    return base, settings.get("revision")


def _base_is_away(folder: Path, base: str) -> str:
    return (
        f"{folder} holds an adapter of {base!r}, and there is no such folder here ({Path.cwd()}), nor a model of that "
        f"name to be had from the Hub; put it there, or correct base_model_name_or_path in {folder / ADAPTER_FILE}"
    )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Errors of loading this model that only its libraries see become a line that names it; bugs stay what they are.

    Raises:
        ModelFileError: for weights that cannot be read or do not fit config.json, a base model that is away, and a
            model that needs code of its own.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ModelFileError:
        raise
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ModelFileError(
                f"{name} comes with code of its own, which is never run here; use a model that transformers knows"
            ) from error
        raise
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ModelFileError(f"weights in {name} are damaged ({_one_line(error)}); fetch them again") from error
    except RuntimeError as error:
        text = _one_line(error)
        if any(mark in text for mark in _OTHER_SHAPES):
            raise ModelFileError(
                f"the weights in {name} do not fit {Path(name) / _settings_of(name)}, whose model has tensors of "
                "other shapes; fetch or save both again"
            ) from error
        if "PytorchStreamReader" in text:
            raise ModelFileError(f"weights in {name} are damaged ({text}); fetch them again") from error
        raise
    except OSError as error:
        if error.errno is None and is_adapter(name) and not Path(base := adapter_base(Path(name))[0]).is_dir():
            raise ModelFileError(_base_is_away(Path(name), base)) from error
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _settings_of(name: str) -> str:
    return ADAPTER_FILE if is_adapter(name) else _CONFIG_FILE


def load_causal_lm(name: str, **settings: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, which goes on with tensors drawn at random where a file lacks some.

    Raises:
        ModelFileError: for that, and for all that `explained` explains.
    """
    from transformers import AutoModelForCausalLM

    with explained(name):
        # False and not left out: left out, transformers asks at the terminal whether to run a model's own code.
        model, info = AutoModelForCausalLM.from_pretrained(
            name, **{"trust_remote_code": False, **settings}, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ModelFileError(
            f"the weights in {name} lack {len(missing)} of the tensors that {_settings_of(name)} asks for ({shown}); "
            "fetch or save the model again"
        )
    return model
