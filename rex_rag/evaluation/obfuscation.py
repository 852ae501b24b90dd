"""Text of benchmarks that are published obfuscated, so that no crawl for training data finds it in the plain.

BrowseComp (OpenAI, github.com/openai/simple-evals) and BrowseComp-Plus (arXiv 2508.06600): base64 of the UTF-8 text,
xor the SHA-256 of a password, repeated; the password is the set's canary. What is read here is never written back.
"""

from __future__ import annotations

import base64
import hashlib
from itertools import cycle

from rex_rag.data.question_rows import QuestionError
from rex_rag.support.wording import shorten


def reveal(text: str, canary: str, place: str) -> str:
    """The plain text of an obfuscated one; `place` begins the message of an error.

    Raises:
        QuestionError: for text that was not obfuscated with this canary.
    """
    key = cycle(hashlib.sha256(canary.encode()).digest())
    try:
        hidden = base64.b64decode(text, validate=True)
        return bytes(byte ^ mask for byte, mask in zip(hidden, key, strict=False)).decode()
    except ValueError as error:
        raise QuestionError(
            f"{place}: {shorten(text)} was not obfuscated with the canary {shorten(canary)} ({error}); give the "
            "canary of the set's own card, or none for a set in plain text"
        ) from error
