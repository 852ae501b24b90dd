"""The same as `python -m rex_rag.quickstart.tiny_model`."""

import sys

from rex_rag.quickstart.tiny_model import main

if __name__ == "__main__":
    sys.exit(main())
