"""Downloads tell how far they are, to whoever listens, and draw nothing."""

from __future__ import annotations

import contextvars
import io

import pytest
from rich.console import Console

from toolkit import downloads, steps


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
        assert str(downloads.download("a/b", ["*.json"], revision="main")) == "/cache/a/b"
        assert "download" in steps.seconds_by_part()

    monkeypatch.setattr(downloads, "snapshot_download", snapshot_download)
    contextvars.copy_context().run(verb)
    assert (60, 100, "bytes") in told
    assert {unit for _, _, unit in told} == {"bytes"}
    contextvars.Context().run(lambda: downloads.download("a/b", ["*.json"], revision="main"))
    assert capfd.readouterr() == ("", "")
