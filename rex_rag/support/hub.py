"""The Hugging Face Hub, asked once whether it answers, and never waited for without an end."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 3.0
_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 120.0


def bound_hub_requests() -> None:
    """Let huggingface_hub go offline where the Hub does not answer a first, short question, and bound its requests.

    By itself it sets no limit to most of them, and tries each file's five times over: minutes at the start of a run
    on a machine without a network, for files that were fetched before.
    """
    from huggingface_hub import set_client_factory

    set_client_factory(_client)


def _client() -> httpx.Client:
    import httpx
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS)
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [lambda request: _ask_first(), *hooks["request"]]}
    return client


@cache
def _ask_first() -> None:
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except httpx.HTTPError as error:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes started from here
        logger.warning(
            f"the Hub ({constants.ENDPOINT}) does not answer ({error}): going on with what was fetched before, as "
            "HF_HUB_OFFLINE=1 does"
        )
