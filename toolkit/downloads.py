"""Files of a repository on the Hub into its cache, with how far they are.

`snapshot_download` draws bars of its own, or none; here its counts go to whoever listens, on a terminal or not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tqdm import tqdm

from toolkit.steps import Steps, current, part

__all__ = ["download"]


def download(repo_id: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder of the cache with the files that match; what is there already is not fetched again.

    Raises:
        whatever `snapshot_download` does.
    """
    with part("download"):
        bars = _bars_of(current())
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), tqdm_class=bars))


def _bars_of(steps: Steps | None) -> type[Any]:
    """A class of bars that draw nothing: those that count bytes tell `steps`, from whatever thread."""

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._nowhere = open(os.devnull, "w")  # noqa: SIM115
            super().__init__(*args, **{**kwargs, "file": self._nowhere})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """tqdm's own seam, called a few times a second."""
            if steps is not None and self.unit == "B" and self.total and str(self.desc).startswith("Reconstr"):
                steps.advance(self.n, self.total, "bytes")

        def close(self) -> None:
            """Also what it did not draw on."""
            super().close()
            self._nowhere.close()

    return Told
