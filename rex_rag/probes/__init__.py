"""The explorers by name: what proposes where a failed original is re-opened, and with which text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rex_rag.probes.backtracking import BacktrackingExplorer
from rex_rag.probes.explorer import Explorer
from rex_rag.probes.model_written import ModelWrittenExplorer, Score
from rex_rag.probes.pool import ExplorationPool, PoolExplorer
from rex_rag.support.named import choose

if TYPE_CHECKING:
    from rex_rag.rollout.agent import Agent
    from rex_rag.training.config import REXRAGConfig


def _exploration_pool(agent: Agent, args: REXRAGConfig) -> ExplorationPool:
    return ExplorationPool(args.exploration_pool(), agent.script.tokenizer, args.probe_density)


# Made of the agent, the settings, and what scores ids (`rex_rag.probes.model_written.Score`).
EXPLORERS: dict[str, Callable[[Agent, REXRAGConfig, Score | None], Explorer]] = {
    PoolExplorer.name: lambda agent, args, score: PoolExplorer(_exploration_pool(agent, args), agent.script),
    BacktrackingExplorer.name: lambda agent, args, score: BacktrackingExplorer(_exploration_pool(agent, args)),
    ModelWrittenExplorer.name: lambda agent, args, score: ModelWrittenExplorer(agent, score),
}


def make_explorer(name: str, agent: Agent, args: REXRAGConfig, score: Score | None = None) -> Explorer:
    """The explorer of a name; one of your own, named `module:Class`, is made of the same three.

    Raises:
        ValueError: for an unknown name.
    """
    return choose(name, EXPLORERS, Explorer, "explorer")(agent, args, score)
