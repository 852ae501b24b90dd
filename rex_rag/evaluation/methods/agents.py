"""The trained search agents: the turns of training, by the script of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from rex_rag.evaluation.methods.base import Attempt, Method, Toolbox
from rex_rag.evaluation.methods.prompt_texts import question_text
from rex_rag.protocols import make_protocol
from rex_rag.rollout.agent import AgentScript
from rex_rag.rollout.script import Script
from rex_rag.tools import Tool, make_tools, tool_specs


class SearchR1(Method):
    """Think, search, answer, with a model trained to, by the protocol that it was trained with. The answer is that of
    the first complete answer that the model writes before any call of the same turn.

    Args:
        protocol: name of the protocol, and tools: names of its tools.
    """

    name = "search_r1"
    title = "Search-R1"
    source = "Jin et al., Search-R1: Training LLMs to Reason and Leverage Search Engines with RL, arXiv 2503.09516"
    uses_retriever = True

    def __init__(
        self,
        template: str | None = None,
        further: Mapping[str, str] | None = None,
        protocol: str = "search_r1",
        tools: Sequence[str] = ("search",),
    ) -> None:
        default = make_protocol(protocol, tool_specs(tools))
        self.default_template, self.further_prompts = default.template, {"feedback": default.feedback}
        super().__init__(template, further)
        self._tools = tuple(tools)
        self.protocol = make_protocol(protocol, tool_specs(tools), self.template, self.further["feedback"])
        self.stop_strings = (self.protocol.stop_strings,)
        self.marks = self.protocol.marks

    @property
    def prompts(self) -> dict[str, str]:
        schemas = self.protocol.schemas
        return super().prompts | ({"tools": json.dumps(schemas, sort_keys=True)} if schemas else {})

    def tools(self, toolbox: Toolbox) -> list[Tool]:
        return make_tools(self._tools, toolbox.retriever, toolbox.budget.top_k)

    def scripts(self, attempts: Sequence[Attempt], toolbox: Toolbox) -> list[Script]:
        self._turns = AgentScript(self.protocol, toolbox.tokenizer, toolbox.budget, toolbox.chat_template_kwargs)
        return super().scripts(attempts, toolbox)

    def script(self, attempt: Attempt) -> Script:
        attempt.trajectory.prompt_ids = self._turns.encode(question_text(attempt.question))
        yield from self._turns.turns(attempt.trajectory)


class REXRAG(SearchR1):
    """The same rollout: REX-RAG differs in how the model was trained. No probes are made in evaluation."""

    name = "rex_rag"
    title = "REX-RAG"
    source = "Jiang et al., REX-RAG: Reasoning Exploration with Policy Correction in RAG, arXiv 2508.08149"
