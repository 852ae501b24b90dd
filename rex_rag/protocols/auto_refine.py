"""The tags of AutoRefine (arXiv 2505.11277): those of Search-R1, but results stand in `<documents>`, and the model
sums them up in `<refine>` before it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rex_rag.protocols.base import SEARCH, Framing, ToolSpec
from rex_rag.protocols.search_r1 import SearchR1

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAGS = ("<documents>", "</documents>", "<refine>", "</refine>")


class AutoRefine(SearchR1):
    """For checkpoints of AutoRefine; `template` should be the one they were trained with (docs/evaluation.md)."""

    name = "auto_refine"

    def __init__(
        self, tools: Sequence[ToolSpec] = (SEARCH,), template: str | None = None, feedback: str | None = None
    ) -> None:
        super().__init__(tools, template, feedback)
        self.marks = (*self.marks, *_TAGS)

    def default_template(self) -> str:
        passages = "between <information> and </information>"
        refine = "between <documents> and </documents>; sum up what they say between <refine> and </refine>"
        return super().default_template().replace(passages, refine)

    def framing(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None) -> Framing:
        return Framing(f"\n\n{_TAGS[0]}", "\n", f"{_TAGS[1]}\n\n", self.feedback)
