"""Evaluate from a recipe in several processes: `accelerate launch --config_file NAME.yaml -m rex_rag.evaluate …`.

One process a GPU; each takes its share of the questions, and the first puts everything together. The same as
`rex-rag evaluate`, which runs in one process. Processes meet in the output directory alone: on several machines it
must lie on a file system that they share.
"""

import sys

from rex_rag.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
