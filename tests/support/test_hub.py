"""A Hub that takes connections and never answers costs a start some seconds, once."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from parts import make_bpe_tokenizer, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]

# The library reads its address and its cache once, when it is imported: so a process of its own.
OPENING = """
import sys
from transformers import AutoConfig, AutoTokenizer
from rex_rag.support.hub import bound_hub_requests
bound_hub_requests()
print(AutoTokenizer.from_pretrained("me/fetched").eos_token)
for name in ("me/absent", "me/other"):
    try:
        AutoConfig.from_pretrained(name)
    except OSError:
        print("refused")
"""


def test_a_silent_hub_is_asked_once_and_the_cache_serves(tmp_path):
    place = tmp_path / "hub" / "models--me--fetched"
    tokenizer = make_bpe_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(place / "snapshots" / "abc")
    tokenizer.save_pretrained(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    listening = socket.create_server(("127.0.0.1", 0))  # the system takes connections; nobody answers
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        **{
            "HF_ENDPOINT": f"http://127.0.0.1:{listening.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        },
    }
    began = time.monotonic()
    with listening:
        command = [sys.executable, "-c", OPENING]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [tokenizer.eos_token, "refused", "refused"], done.stderr
    assert done.stderr.count("does not answer") == 1
    assert time.monotonic() - began < 30  # three seconds, and the imports
