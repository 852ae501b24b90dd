"""Which model a run was of: hashes of weights and tokenizers, without a path of the machine that they lie on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.models.files import ADAPTER_FILE, adapter_base, explained, is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_BLOCK_BYTES = 1 << 24


def model_identity(name: str, revision: str | None) -> dict[str, Any]:
    """Which weights a name stands for: the Hub's commit, or the hash of a folder's weights and settings."""
    folder = Path(name)
    if not folder.is_dir():
        from transformers import AutoConfig

        with explained(name):
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        commit = getattr(config, "_commit_hash", None)
        return {"name": name, "revision": commit or revision, "weights_sha256": None}
    # The last two parts tell a checkpoint from its siblings, and nothing of the machine.
    identity: dict[str, Any] = {
        "name": "/".join(folder.resolve().parts[-2:]),
        "revision": None,
        "weights_sha256": folder_sha256(folder),
    }
    if is_adapter(name):
        identity["base"] = model_identity(*adapter_base(folder))
    return identity


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a model's or an adapter's weights."""
    return any(_is_weights(path) for path in folder.glob("*"))


def folder_sha256(folder: Path) -> str:
    """Of names and contents of weights and settings; what only says how a model was trained does not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_settings = path.name in ("config.json", "generation_config.json", ADAPTER_FILE)
        if not (is_settings or _is_weights(path) or path.name.endswith(".index.json")):
            continue
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES and "model" in path.name


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase | TokenizerFiles) -> str:
    """Hash of what decides how text becomes ids: vocabulary, special tokens, chat template, and a text's encoding."""
    said = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
        "chat_template": tokenizer.chat_template,
        # Merges show in how text is encoded.
        "encoded": tokenizer(" Tokenisation: naïve 1,234 <search> the North-West </search>\n\n")["input_ids"],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class TokenizerFiles:
    """What `tokenizer_sha256` reads of a tokenizer, taken from a folder's files alone."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = folder / "chat_template.jinja"
        self.chat_template = template.read_text("utf-8") if template.is_file() else settings.get("chat_template")
        named = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
        named += settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        self.all_special_tokens = {one["content"] if isinstance(one, dict) else one for one in named if one}

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}
