"""The user's folder of what is made once from a checkpoint: its int8 file, the bytes of its steps."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """`$ONECARD_CACHE`, or `onecard` in the user's cache folder."""
    given = os.environ.get("ONECARD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "onecard"
