"""A dense decoder's shape, from its `config.json` or a table, and what follows from it by arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rex_rag.support.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts and widths of a decoder with grouped-query attention and a gated feed-forward part (Qwen2, Llama)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    head_dim: int
    has_bias: bool = True  # on query, key and value, as in Qwen2

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The matrices of one layer: name -> width in, width out."""
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, inner),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (inner, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.has_bias else 0
        return sum(rows * columns for rows, columns in self.linears.values()) + bias + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.is_tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def lora_parameters(self, rank: int, modules: tuple[str, ...]) -> int:
        """Both factors of an adapter of that rank on the named matrices of every layer."""
        return self.layers * rank * sum(sum(self.linears[name]) for name in modules)

    @property
    def kv_elements(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def saved_bytes(self, width: int) -> int:
        """Bytes a token that autograd keeps of one layer for the backward pass.

        Args:
            width: bytes of an activation: 2 in bfloat16, 4 in float32.
        """
        inner = self.heads * self.head_dim
        # A norm squares and scales in float32: the input once, or its float32 copy; and what its weight multiplies.
        norms = 2 * (4 + width) * self.hidden
        # Inputs of q, k, v; rotated q, and k and v repeated for every head, as padded rows need; attention's output,
        # its log-sum a head, and the output laid out anew.
        attention = (self.hidden + 5 * inner) * width + 4 * self.heads
        # Inputs of gate and up; gate, its activation, up, their product.
        return norms + attention + (self.hidden + 4 * self.intermediate) * width

    def forward_flops(self, tokens: float, context: float, scored: float) -> float:
        """Floating-point operations of a forward pass.

        Args:
            tokens: through the layers. context: mean number of tokens that one of them attends to.
            scored: tokens that go through the output matrix.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return tokens * (2 * self.layers * self.layer_parameters + attention) + 2 * scored * self.head_parameters


# https://huggingface.co/Qwen/Qwen2.5-{0.5,1.5,3,7}B/blob/main/config.json; Instruct has the same shapes.
_KNOWN = {
    "Qwen/Qwen2.5-0.5B": ModelShape(896, 24, 14, 2, 4864, 151_936, True, 64),
    "Qwen/Qwen2.5-1.5B": ModelShape(1536, 28, 12, 2, 8960, 151_936, True, 128),
    "Qwen/Qwen2.5-3B": ModelShape(2048, 36, 16, 2, 11_008, 151_936, True, 128),
    "Qwen/Qwen2.5-7B": ModelShape(3584, 28, 28, 4, 18_944, 152_064, False, 128),
}


def model_shape(name: str) -> ModelShape:
    """The shape of a local model by its `config.json`, or of a known one by its name on the Hub.

    Raises:
        UserError: for a model that is neither, and one with experts or without the widths of a dense decoder.
    """
    path = Path(name) / "config.json"
    if not path.is_file():
        if known := _KNOWN.get(name.removesuffix("-Instruct")):
            return known
        raise UserError(
            f"model_name_or_path is {name!r}, no folder here with a config.json, and the table of shapes has "
            f"{', '.join(_KNOWN)}; download the model's config.json and name its folder by --model_name_or_path"
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    experts = [key for key in config if "expert" in key]
    try:
        if experts:
            raise KeyError(f"no experts, but it has {experts[0]}")
        heads = config["num_attention_heads"]
        return ModelShape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            is_tied=config.get("tie_word_embeddings", config.get("model_type", "").startswith("gemma")),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            has_bias=config.get("attention_bias", config.get("model_type") == "qwen2"),
        )
    except KeyError as missing:
        raise UserError(
            f"{path} is not of a dense decoder, which is what is counted here: expected {missing.args[0]}"
        ) from None
