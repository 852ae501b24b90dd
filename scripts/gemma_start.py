"""The same as `python -m rex_rag.quickstart.gemma_start`."""

import sys

from rex_rag.quickstart.gemma_start import main

if __name__ == "__main__":
    sys.exit(main())
