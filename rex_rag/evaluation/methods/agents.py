"""The trained search agents: the search rollout of training, by the engine of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rex_rag.evaluation.methods.base import Method, Toolbox, unanswered
from rex_rag.evaluation.records import Question
from rex_rag.protocols.search_r1 import FEEDBACK_TEXT, PROMPT_TEMPLATE, STOP_STRINGS
from rex_rag.rollout.engine import RolloutEngine
from rex_rag.types import Trajectory, Truncation


class SearchR1(Method):
    """Think, search, answer, in tags, with a model trained to. The answer is the content of the first complete
    `<answer>` that the model writes before any search of the same turn."""

    name = "search_r1"
    title = "Search-R1"
    source = "Jin et al., Search-R1: Training LLMs to Reason and Leverage Search Engines with RL, arXiv 2503.09516"
    uses_retriever = True
    default_template = PROMPT_TEMPLATE
    further_prompts: ClassVar[dict[str, str]] = {"feedback": FEEDBACK_TEXT}
    stop_strings = (STOP_STRINGS,)

    def _run(self, questions: Sequence[Question], toolbox: Toolbox) -> list[Trajectory]:
        engine = RolloutEngine(
            toolbox.generator(STOP_STRINGS),
            toolbox.retriever,
            toolbox.tokenizer,
            budget=toolbox.budget,
            feedback=self.further["feedback"],
        )
        prompts = [toolbox.encode_chat(self.prompt_text(question)) for question in questions]
        limit = toolbox.budget.max_sequence_length
        finished = iter(engine.rollout([prompt for prompt in prompts if len(prompt) < limit]))
        return [
            next(finished) if len(prompt) < limit else unanswered(prompt, Truncation.SEQUENCE) for prompt in prompts
        ]


class REXRAG(SearchR1):
    """The same rollout: REX-RAG differs in how the model was trained. No probes are made in evaluation."""

    name = "rex_rag"
    title = "REX-RAG"
    source = "Jiang et al., REX-RAG: Reasoning Exploration with Policy Correction in RAG, arXiv 2508.08149"
