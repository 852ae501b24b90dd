"""`python -m rex_rag.quickstart`."""

from rex_rag.support.announce import announce


def main() -> None:
    """Say what takes so long before the first word, and run."""
    announce("loading torch and transformers")
    from rex_rag.quickstart.run import main as run

    run()


if __name__ == "__main__":
    main()
