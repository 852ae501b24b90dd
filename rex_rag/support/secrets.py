"""Secrets among settings, which nothing that is written may hold."""

from __future__ import annotations

from collections.abc import Mapping
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
