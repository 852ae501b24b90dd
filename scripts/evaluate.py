"""Evaluate from a recipe, under accelerate launch; the same as `-m rex_rag.evaluate`."""

import sys

from rex_rag.commands.evaluate import main

sys.exit(main())
