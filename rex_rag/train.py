"""Train from a recipe: `accelerate launch --config_file NAME.yaml -m rex_rag.train --config RECIPE.yaml`.

Every key of the recipe can be overridden behind it (`--key value`); an unknown key is refused.
"""

import sys

from rex_rag.training.launch import main

if __name__ == "__main__":
    sys.exit(main())
