"""The methods that are compared, by name."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from rex_rag.evaluation.methods.agents import REXRAG, SearchR1
from rex_rag.evaluation.methods.base import Method, Toolbox
from rex_rag.evaluation.methods.ircot import IRCoT
from rex_rag.evaluation.methods.search_o1 import SearchO1
from rex_rag.evaluation.methods.single import R1, ChainOfThought, Direct, RetrieveOnce
from rex_rag.support.errors import UserError
from rex_rag.support.named import choose

# In the order of the comparison's table.
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Direct, ChainOfThought, RetrieveOnce, IRCoT, SearchO1, R1, SearchR1, REXRAG)
}

# Those that were trained, by a protocol.
AGENTS = tuple(name for name, method in METHODS.items() if issubclass(method, SearchR1))

__all__ = ["AGENTS", "METHODS", "Method", "Toolbox", "make_method"]


def make_method(
    name: str, template: str | None = None, further: Mapping[str, str] | None = None, **agent: Any
) -> Method:
    """The method of a name, with another first prompt or further texts where given (a trained model's own, say).

    Args:
        agent: `protocol` and `tools` of the trained search agents.

    Raises:
        ValueError: for an unknown name, a template that lacks a placeholder, and texts that the method has not.
    """
    kind = choose(name, METHODS, Method, "method")
    if agent and not issubclass(kind, SearchR1):
        raise UserError(f"the method {name} has a protocol of its own; leave {' and '.join(agent)} out")
    method = kind(template, further, **agent)
    if name not in METHODS:
        method.name = name  # cards tell it from the built-in ones, and find it again
        source = hashlib.sha256(inspect.getsource(sys.modules[kind.__module__]).encode()).hexdigest()
        # Nobody thinks of raising a number in a module of their own.
        method.revision = f"{method.revision}, source {source[:12]}"
    return method
