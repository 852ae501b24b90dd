"""A warm start too short to be any good, made once: a real world, tokenizer and model for the end-to-end tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    """A directory holding `warm_start` (model, tokenizer) and `world` (corpus, train and test questions)."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "rex_rag.quickstart.warm_start", "--output", str(folder / "warm_start")]
    command += ["--max-steps", "300", "--check-from", "300"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return folder
