"""Adapters by their Hub name: `hf://owner/name@revision` becomes a folder, with an artifact's own files only.

`snapshot_download` takes whatever a repository holds; an artifact is an allow-list, so nothing else comes in.
"""

from __future__ import annotations

import re
from pathlib import Path

from toolkit.artifact.connection import HTTPError, limit_waiting
from toolkit.artifact.manifest import FILES, MANIFEST
from toolkit.downloads import download
from toolkit.errors import HubError, RecipeError, first_line

__all__ = ["fetch_adapter", "is_remote"]

_NAME = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_remote(name: str) -> bool:
    """Whether this is `hf://owner/name[@revision]`, or `owner/name` where no such folder is here."""
    return name.startswith("hf://") or (
        _NAME.fullmatch(name) is not None and name[0] not in "./~" and not Path(name).exists()
    )


def fetch_adapter(name: str) -> Path:
    """The folder of an adapter, downloaded to the Hub's cache where it is a Hub name.

    Raises:
        RecipeError: not a name. HubError: not there, no access, or no connection.
    """
    if not is_remote(name):
        return Path(name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(f"{name}: not an adapter on the Hub; write hf://owner/name or hf://owner/name@revision")
    limit_waiting()
    try:
        wanted = sorted({*FILES, MANIFEST})
        return download(match["repo"], wanted, revision=match["revision"])
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{name}: cannot be downloaded: {first_line(error)}; check the name, or log in with `hf auth login`"
        ) from None
