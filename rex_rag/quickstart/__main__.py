"""`python -m rex_rag.quickstart`."""

from rex_rag.quickstart.run import main

main()
