"""Evaluate from a recipe, under accelerate launch; the same as `-m rex_rag.evaluate`."""

import sys

from rex_rag.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
