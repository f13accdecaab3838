"""Checkpoints are found where huggingface_hub keeps them, without asking it, and only when they are whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.conftest import EMBEDDED
from toolkit.checkpoint.whole import whole_snapshot

PLACES = ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")


@pytest.mark.parametrize("place", PLACES)
def test_the_hubs_cache_is_found_wherever_it_is(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACES, "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(place, str(tmp_path))
    asks = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", asks], env=os.environ, capture_output=True, text=True, check=True)
    cached = Path(theirs.stdout.strip()) / "models--a--b"
    assert tmp_path in (cached.parent, *cached.parents)
    assert whole_snapshot("a/b") is None
    snapshot = cached / "snapshots" / "0123"
    shutil.copytree(EMBEDDED, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert whole_snapshot("a/b") == whole_snapshot("a/b", "0123") == snapshot
    (shard,) = snapshot.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert whole_snapshot("a/b") is None
