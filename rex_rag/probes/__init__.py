"""The explorers by name: what proposes where a failed original is re-opened, and with which text."""

from __future__ import annotations

from rex_rag.probes.backtracking import BacktrackingExplorer
from rex_rag.probes.explorer import Explorer
from rex_rag.probes.model_written import EndpointExplorer, ModelWrittenExplorer
from rex_rag.probes.pool import PoolExplorer
from rex_rag.support.named import choose

EXPLORERS: dict[str, type[Explorer]] = {
    kind.name: kind for kind in (PoolExplorer, BacktrackingExplorer, ModelWrittenExplorer, EndpointExplorer)
}


def explorer_kind(name: str) -> type[Explorer]:
    """The explorer of a name, or one of your own, named `module:Class`.

    Raises:
        ValueError: for an unknown name.
    """
    return choose(name, EXPLORERS, Explorer, "explorer")
