"""How reliable each token of a text is to a model: LogTokU (arXiv 2502.00290), from the logits that produced it.

The k largest logits of a token are taken as evidence, alpha_i = max(logit_i, 0), alpha_0 = sum_i alpha_i, for a
Dirichlet distribution over the candidates:

    aleatoric   AU = -sum_i (alpha_i / alpha_0) (digamma(alpha_i + 1) - digamma(alpha_0 + 1))    in [0, ln k]
    epistemic   EU = k / (alpha_0 + k)                                                           in (0, 1]
    reliability    = -AU * EU                                                                    at most 0

AU is high where several candidates have much evidence, EU where there is little evidence for any. Logits are not
shifted: their absolute height is the evidence, so the figures of models with other logit scales are not comparable
without care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rex_rag.support.errors import UserError
from rex_rag.support.tokenization import decode_on
from rex_rag.types import SegmentKind, Trajectory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_K = 2  # candidates taken as evidence; the LogTokU authors' choice in their evaluation
_PARTIAL = "\ufffd"  # what a decoder makes of bytes that are no whole character
_SPREAD = (2, 3, 4)  # tokens that can hold a character: UTF-8 has four bytes at most
CHUNK_TOKENS = 128  # positions of one forward pass; its logits are what takes memory


@dataclass(frozen=True, slots=True)
class TokenReliability:
    """One token and its figures; `aleatoric` and `reliability` are NaN where no candidate has any evidence."""

    text: str
    kind: SegmentKind
    aleatoric: float
    epistemic: float
    reliability: float


def evidence(logits: torch.Tensor, k: int = DEFAULT_K) -> torch.Tensor:
    """The k largest logits of each row as evidence, (..., V) -> (..., k), float32, largest first.

    Raises:
        ValueError: for fewer than 2 candidates, or more than there are logits.
    """
    if not 2 <= k <= logits.size(-1):
        raise UserError(
            f"k={k} candidates cannot be taken from {logits.size(-1)} logits; use 2 (the authors' choice) or more"
        )
    return logits.topk(k, dim=-1).values.float().clamp(min=0)


def aleatoric_uncertainty(alpha: torch.Tensor) -> torch.Tensor:
    """AU of evidence, (..., k) -> (...), in [0, ln k].

    NaN where there is no evidence (alpha_0 = 0): the shares alpha_i / alpha_0 are undefined there. In the limit of
    vanishing evidence AU tends to 0, which would rate a token that nothing speaks for as the most reliable of all.
    """
    alpha = alpha.float()
    total = alpha.sum(dim=-1, keepdim=True)
    return -(alpha / total * ((alpha + 1).digamma() - (total + 1).digamma())).sum(dim=-1)


def epistemic_uncertainty(alpha: torch.Tensor) -> torch.Tensor:
    """EU of evidence, (..., k) -> (...), in (0, 1]; 1 where there is none."""
    k = alpha.size(-1)
    return k / (alpha.float().sum(dim=-1) + k)


def token_reliability(alpha: torch.Tensor) -> torch.Tensor:
    """-AU * EU of evidence, (..., k) -> (...), at most 0; NaN where there is none."""
    return -aleatoric_uncertainty(alpha) * epistemic_uncertainty(alpha)


def completion_evidence(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    k: int = DEFAULT_K,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """The evidence behind every completion token, (T, k), on the CPU.

    The text goes through the model `chunk_tokens` positions at a time with its key-value cache, so the logits held at
    once are (chunk_tokens, V), whatever the length.

    Raises:
        ValueError: for an empty prompt: nothing would produce the first token.
    """
    import torch

    if not prompt_ids:
        raise UserError("the prompt has no tokens, so no logits produced the first token; give the model's prompt")
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)[:, :-1]  # (1, P+T-1)
    first = len(prompt_ids) - 1  # its logits are those of the first completion token
    was_training, cache, rows = model.training, None, []
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, ids.size(1), chunk_tokens):
                output = model(input_ids=ids[:, start : start + chunk_tokens], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(evidence(output.logits[0, max(first - start, 0) :], k).cpu())
    finally:
        model.train(was_training)
    return torch.cat(rows) if rows else torch.empty(0, k)


def score_trajectory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory, k: int = DEFAULT_K
) -> list[TokenReliability]:
    """The figures of every completion token of a trajectory, inserted ones included, as this model sees them."""
    alpha = completion_evidence(model, trajectory.prompt_ids, trajectory.completion_ids, k)
    figures = zip(
        aleatoric_uncertainty(alpha).tolist(),
        epistemic_uncertainty(alpha).tolist(),
        token_reliability(alpha).tolist(),
        strict=True,
    )
    kinds = [segment.kind for segment in trajectory.segments for _ in segment.ids]
    return [
        TokenReliability(text, kind, *values)
        for text, kind, values in zip(token_texts(tokenizer, trajectory.completion_ids), kinds, figures, strict=True)
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character spread over several is the text of the last, the others get U+FFFD."""
    texts = []
    for place, text in enumerate(decode_on(tokenizer, [[token] for token in ids]), start=1):
        if _PARTIAL in text:
            joined = decode_on(tokenizer, [ids[max(place - count, 0) : place] for count in _SPREAD])
            text = next((whole for whole in joined if _PARTIAL not in whole), text)
        texts.append(text)
    return texts
