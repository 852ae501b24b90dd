"""Train from a recipe: `accelerate launch --config_file NAME.yaml -m rex_rag.train --config RECIPE.yaml`.

Every key of the recipe can be overridden behind it (`--key value`); an unknown key is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rex_rag.support.announce import announce
from rex_rag.training.preflight import refuse_at_once


def main(words: Sequence[str]) -> int:
    """Train as a command line says; returns the exit code. What is amiss is said before torch is imported."""
    code = refuse_at_once(words)
    if code:
        return code
    announce("loading torch, transformers and TRL")
    from rex_rag.training.launch import main as train

    return train(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
