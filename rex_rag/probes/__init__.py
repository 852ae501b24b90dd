"""The explorers by name: what proposes where a failed original is re-opened, and with which text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rex_rag.probes.explorer import Explorer
from rex_rag.probes.pool import ExplorationPool, PoolExplorer
from rex_rag.support.named import choose

if TYPE_CHECKING:
    from rex_rag.rollout.agent import Agent
    from rex_rag.training.config import REXRAGConfig


def _pool(agent: Agent, args: REXRAGConfig) -> PoolExplorer:
    pool = ExplorationPool(args.exploration_pool(), agent.script.tokenizer, args.probe_density)
    return PoolExplorer(pool, agent.script)


EXPLORERS: dict[str, Callable[[Agent, REXRAGConfig], Explorer]] = {PoolExplorer.name: _pool}


def make_explorer(name: str, agent: Agent, args: REXRAGConfig) -> Explorer:
    """The explorer of a name; one of your own, named `module:Class`, is made of the agent and the settings.

    Raises:
        ValueError: for an unknown name.
    """
    return choose(name, EXPLORERS, Explorer, "explorer")(agent, args)
