"""Evaluate from a recipe, in several processes.

accelerate launch --config_file recipes/accelerate_configs/NAME.yaml \\
    scripts/evaluate.py --config recipes/evaluation/NAME.yaml [--key value ...]

One process a GPU; each takes its share of the questions, and the first puts everything together. The same as
`rex-rag evaluate`, which runs in one process. Processes meet in the output directory alone: on several machines it
must lie on a file system that they share.
"""

import logging
import sys

from rex_rag.commands.evaluate import evaluate
from rex_rag.commands.terminal import refuse


def main() -> int:
    """Evaluate; returns the exit code: 0, 2 for errors a user can mend, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        evaluate(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
