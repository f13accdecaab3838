"""How long the Hub may keep us waiting.

huggingface_hub's client has no time limit of its own: a server that takes a request and never answers would hold a
push, and the training run before it, for ever. Its seam for clients (`set_client_factory`) takes one with a limit.
"""

from __future__ import annotations

import os
from functools import cache

from httpx2 import Client, HTTPError, Timeout
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

__all__ = ["PATIENCE", "HTTPError", "limit_waiting"]

PATIENCE = "ONECARD_HUB_TIMEOUT"
"""Seconds without a byte either way, 120 by default; an environment variable, for slow lines and for tests."""


@cache
def limit_waiting() -> None:
    """Give huggingface_hub, in this process, a client that stops waiting; once: a change closes the one in use."""
    set_client_factory(_client)


def _client() -> Client:
    client = default_client_factory()
    client.timeout = Timeout(float(os.environ.get(PATIENCE) or 120))
    return client
