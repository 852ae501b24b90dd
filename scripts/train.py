"""Train from a recipe, under accelerate launch; the same as `-m rex_rag.train`."""

import sys

from rex_rag.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
