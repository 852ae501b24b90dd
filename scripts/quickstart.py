"""The main job on the built-in world, start to end, on a CPU; the same as `python -m rex_rag.quickstart`."""

from rex_rag.quickstart.run import main

if __name__ == "__main__":
    main()
