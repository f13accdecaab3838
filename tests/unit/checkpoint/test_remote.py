"""Downloads tell how far they are, to whoever listens, draw nothing, and leave other forms of the weights alone."""

from __future__ import annotations

import contextvars
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.harness.hub_stand_in import serve_this_process
from toolkit import steps
from toolkit.checkpoint import remote
from toolkit.errors import HubError


def test_bars_of_the_hub_become_counts(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The Hub's client makes three bars: bytes of the network, bytes on the disk, and files."""
    told: list[tuple[float, float, str]] = []

    def snapshot_download(repo_id: str, *, tqdm_class: type, **options: object) -> str:
        network = tqdm_class(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True)
        disk = tqdm_class(desc="Reconstructing (incomplete total...)", total=0, initial=0, unit="B", unit_scale=True)
        disk.total = network.total = 100
        for bar in (network, disk):
            bar.update(60)
            bar.refresh()
            bar.set_description("Reconstruction complete" if bar is disk else "Download complete")
            bar.close()
        with tqdm_class(total=2, desc="Fetching 2 files") as files:
            files.update(1)
            files.refresh()
        assert options == {"revision": "main", "allow_patterns": ["*.json"]}
        return f"/cache/{repo_id}"

    def verb() -> None:
        listener = steps.listen(Console(file=io.StringIO()))
        monkeypatch.setattr(listener, "advance", lambda *given: told.append(given))
        assert str(remote.download("a/b", ["*.json"], revision="main")) == "/cache/a/b"
        assert "download" in steps.seconds_by_part()

    monkeypatch.setattr(remote, "snapshot_download", snapshot_download)
    contextvars.copy_context().run(verb)
    assert (60, 100, "bytes") in told
    assert {unit for _, _, unit in told} == {"bytes"}
    contextvars.Context().run(lambda: remote.download("a/b", ["*.json"], revision="main"))
    assert capfd.readouterr() == ("", "")


def test_only_the_shards_of_the_index_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shards = {f"model-{number:05}-of-00002.safetensors": b"x" * 1000 for number in (1, 2)}
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    sharded = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        "original/model.safetensors": b"y" * 9000,
        "consolidated.safetensors": b"z" * 9000,
        "README.md": b"r",
    }
    single = {"config.json": b"{}", "model.safetensors": b"x", "other.safetensors": b"y" * 9000}
    with serve_this_process(monkeypatch, tmp_path) as hub:
        for name, content in (("a/sharded", sharded), ("a/single", single)):
            hub.repositories[name] = {"private": False, "files": list(content), "content": content}
        folder = remote.fetch("a/sharded", "main")
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors.index.json", *shards}
        assert {path.name for path in remote.fetch("a/single", "main").iterdir()} == {
            "config.json",
            "model.safetensors",
        }
        with pytest.raises(HubError, match="a/none: cannot be downloaded"):
            remote.fetch("a/none", "main")
