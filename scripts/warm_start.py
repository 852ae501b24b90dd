"""The same as `python -m rex_rag.quickstart.warm_start`."""

import sys

from rex_rag.quickstart.warm_start import main

sys.exit(main())
