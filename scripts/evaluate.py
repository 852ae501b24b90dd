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


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    evaluate(sys.argv[1:])


if __name__ == "__main__":
    main()
