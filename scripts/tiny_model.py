"""The same as `python -m rex_rag.quickstart.tiny_model`."""

import sys

from rex_rag.quickstart.tiny_model import main

sys.exit(main())
