"""Tiny random models of other families: each with its own kind of tokenizer, real control tokens and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from parts import PASSAGES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
)

from rex_rag.probes.pool import DEFAULT_POOL
from rex_rag.protocols import SearchR1

# Shorter than every rollout of the tests, so that the window is slid.
WINDOW = 16
_LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Tokens grow across the answer's tag, as they do in real vocabularies.
_STRADDLED = ["I am sure.<answer> red </answer>"] * 20
_TEXTS = [SearchR1().template, SearchR1().feedback, *DEFAULT_POOL, *(one.text for one in PASSAGES), *_STRADDLED]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _learned(backend: Tokenizer, size: int, **options: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE model that was trained on the texts of the protocol."""
    backend.train_from_iterator(_TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False, **options))
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _byte_level(pre_tokenizer: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    return _learned(backend, 600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _with_byte_fallback(specials: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """As sentencepiece learns: blanks are part of a word, and bytes stand for what is in no piece, line breaks too."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    return _learned(backend, 800, special_tokens=[*specials, *_BYTES])


def llama3_tokenizer() -> PreTrainedTokenizerBase:
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary, merges = _byte_level(pieces)
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = pieces, decoders.ByteLevel()
    control = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in control])
    begin = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token="<|eot_id|>")


def qwen3_tokenizer() -> PreTrainedTokenizerBase:
    vocabulary, merges = _byte_level(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    own = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in own])
    return tokenizer


def gemma3_tokenizer() -> PreTrainedTokenizerBase:
    vocabulary, merges = _with_byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    turns = ("<start_of_turn>", "<end_of_turn>")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in turns])
    return tokenizer


def mistral_tokenizer() -> PreTrainedTokenizerBase:
    vocabulary, merges = _with_byte_fallback(["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    own = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in own])
    return tokenizer


def of_trl(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def of_mistral_common() -> str:
    generator = pytest.importorskip("mistral_common.integrations.chat_templates.template_generator")
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return generator.build_chat_template(generator.TemplateConfig(version=TokenizerVersion.v3, spm=True))


@dataclass(frozen=True)
class Family:
    """What tells a family from others, and what its prompt is to be.

    prompt: with `{said}` in the place of the user message. ends: what ends a row, by the model's generation settings.
    own: further settings of the model. file: what else lies in its folder on the Hub; nothing is to read it.
    """

    name: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    template: Callable[[], str]
    config: Callable[..., Any]
    prompt: str
    ends: tuple[str, ...]
    settings: dict[str, Any] | None = None
    own: dict[str, Any] = field(default_factory=dict)
    file: str | None = None

    def save(self, folder: Path) -> Path:
        """The model's folder, as it would come from the Hub."""
        tokenizer = self.tokenizer()
        tokenizer.chat_template = self.template()
        tokenizer.save_pretrained(folder)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
        named = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            self.config(max_position_embeddings=1024, **sizes, **heads, **named, **self.own)
        )
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(self.ends))
        model.save_pretrained(folder)
        if self.file is not None:
            (folder / self.file).write_text("{}")
        return folder


_LLAMA3 = ("<|eot_id|>", "<|end_of_text|>")
_LLAMA3_PROMPT = (
    "<|start_header_id|>user<|end_header_id|>\n\n{said}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_QWEN3 = ("<|im_end|>", "<|endoftext|>")
_QWEN3_PROMPT = "<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

FAMILIES = [
    Family(
        "llama3",
        llama3_tokenizer,
        lambda: of_trl("llama3"),
        LlamaConfig,
        f"<|begin_of_text|>{_LLAMA3_PROMPT}",
        _LLAMA3,
    ),
    Family(
        "llama3_2",
        llama3_tokenizer,
        lambda: of_trl("llama3_2"),
        LlamaConfig,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: 26 Jul 2024\n\n<|eot_id|>{_LLAMA3_PROMPT}",
        _LLAMA3,
    ),
    Family("qwen3", qwen3_tokenizer, lambda: of_trl("qwen3"), Qwen3Config, _QWEN3_PROMPT, _QWEN3),
    Family(
        "qwen3_no_thinking",
        qwen3_tokenizer,
        lambda: of_trl("qwen3"),
        Qwen3Config,
        _QWEN3_PROMPT + _EMPTY_THOUGHT,
        _QWEN3,
        settings={"enable_thinking": False},
    ),
    Family(
        "qwen3_instruct_2507",
        qwen3_tokenizer,
        lambda: of_trl("qwen3_instruct_2507"),
        Qwen3Config,
        _QWEN3_PROMPT,
        _QWEN3,
    ),
    Family(
        "qwen3_5_think",
        qwen3_tokenizer,
        lambda: of_trl("qwen3_5_think"),
        Qwen3Config,
        _QWEN3_PROMPT + "<think>\n",
        _QWEN3,
    ),
    Family(
        "gemma3",
        gemma3_tokenizer,
        lambda: of_trl("gemma3"),
        Gemma3TextConfig,
        "<bos><start_of_turn>user\n{said}<end_of_turn>\n<start_of_turn>model\n",
        ("<eos>", "<end_of_turn>"),
        own={
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    Family(
        "mistral",
        mistral_tokenizer,
        of_mistral_common,
        MistralConfig,
        "<s>[INST] {said}[/INST]",
        ("</s>",),
        own={"sliding_window": WINDOW},
        file="tekken.json",
    ),
]
