"""The main job on the built-in world, start to end, on a CPU; the same as `python -m rex_rag.quickstart`."""

from rex_rag.quickstart.__main__ import main

if __name__ == "__main__":
    main()
