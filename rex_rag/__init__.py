"""REX-RAG (arXiv 2508.08149) on Hugging Face: train language models to search.

Importing this package is quick: the trainer, and torch with it, is loaded when `REXRAGTrainer` or `REXRAGConfig` is
first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rex_rag.agent import SearchAgent
    from rex_rag.training.config import REXRAGConfig
    from rex_rag.training.trainer import REXRAGTrainer

__version__ = "0.1.0"

# Whatever is started from this package tells nobody that it was. Libraries look when they are imported, so: first.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")

__all__ = ["REXRAGConfig", "REXRAGTrainer", "SearchAgent", "__version__"]

_HOMES = {
    "REXRAGConfig": "rex_rag.training.config",
    "REXRAGTrainer": "rex_rag.training.trainer",
    "SearchAgent": "rex_rag.agent",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rex_rag' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
