"""Secrets: among settings, which nothing that is written may hold, and in what others say, which is shown."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

# By name, and not by how it ends: a pad_token is none.
_SECRETS = ("token", "hub_token", "push_to_hub_token", "auth_token", "use_auth_token", "api_key", "password")


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with secrets blanked, in mappings inside of it too; text such as the parent's `<HUB_TOKEN>` stays."""
    return {
        name: without_secrets(value)
        if isinstance(value, dict)
        else None
        if name in _SECRETS and not (isinstance(value, str) and value.startswith("<"))
        else value
        for name, value in settings.items()
    }


def hide(text: str, *secrets: str) -> str:
    """Text without secrets, however who echoes them spells them: escaped for JSON, for an address, for a page."""
    for secret in filter(None, secrets):
        text = _spellings(secret).sub("***", text)
    return text


@cache
def _spellings(secret: str) -> re.Pattern[str]:
    return re.compile("".join(map(_spelled, secret)))


def _spelled(character: str) -> str:
    """A pattern of one character as it is, or escaped."""
    itself, named, code = re.escape(character), re.escape(html.escape(character)), ord(character)
    # Hexadecimal digits in either case, and nothing else: `A` is no `a`.
    digits = "".join(f"[{digit}{digit.upper()}]" for digit in f"{code:02x}")
    in_json, in_address = rf"\\{{1,4}}(?:u00|x){digits}", rf"%(?:25)?{digits}"
    return rf"(?:{in_json}|{in_address}|&#0*{code};|&#[xX]0*{digits};|{named}|\\{{0,4}}{itself})"
