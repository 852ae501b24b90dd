"""Train from a recipe, under accelerate launch; the same as `-m rex_rag.train`."""

import sys

from rex_rag.training.launch import main

sys.exit(main())
