"""What is asked of the Hub: a config, the headers of safetensors files, a whole checkpoint.

transformers has one reason for all failures. `snapshot_download` draws bars of its own, or none; here its counts go to
whoever listens, on a terminal or not. Apart from the rest, because the Hub's client takes half a second to load.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from tqdm import tqdm

from toolkit.checkpoint.files import BESIDE, Header, gguf_at, listed
from toolkit.errors import HubError, ModelError, first_line
from toolkit.steps import Steps, current, part

__all__ = ["ask_hub", "download", "fetch", "hub_headers"]


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


def hub_headers(name_or_path: str, revision: str) -> Iterable[Header]:
    """Of every tensor in a checkpoint on the Hub.

    Raises:
        ModelError: no safetensors there, or a shard is missing. HubError: the Hub cannot be reached.
    """
    try:
        found = get_safetensors_metadata(name_or_path, revision=revision)
    except RemoteEntryNotFoundError as error:
        shard = error.response.url.path.rpartition("/")[2]
        raise ModelError(f"{name_or_path}: lacks the shard {shard}, which its index names") from None
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ModelError(f"{name_or_path}: no readable safetensors there: {first_line(error)}") from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise HubError(f"{name_or_path}: its safetensors headers cannot be read: {first_line(error)}") from None
    for metadata in found.files_metadata.values():
        for key, info in metadata.tensors.items():
            yield Header(key, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])


def ask_hub(name: str, revision: str) -> None:
    """Fetch config.json, for the Hub's own reasons where it does not give it; transformers has one for all of them."""
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError:
        raise HubError(f"{name}: gated; accept its terms on its page on the Hub, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise HubError(f"{name}: no such model on the Hub, or a private one; check the name, or set HF_TOKEN") from None
    except RemoteEntryNotFoundError:
        raise ModelError(
            f"{name}: no config.json there; give a transformers checkpoint, or download a GGUF file and give its path"
        ) from None
    except LocalEntryNotFoundError as error:
        raise HubError(f"{name}: not cached, nor available from the Hub: {first_line(error)}") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(f"{name}: Hub request failed: {first_line(error)}") from None
    except ValueError:
        raise ModelError(f"{name}: no such folder, and not a Hub name (owner/name)") from None


def fetch(name_or_path: str, revision: str = "main") -> Path:
    """The checkpoint's folder, downloaded where it is a Hub name: its shards and what lies beside them, no other form.

    What `gguf_at` finds stays as it is.

    Raises:
        ModelError: no such folder and no Hub name, or a damaged index. HubError: the Hub does not give it.
    """
    if gguf_at(name_or_path) or Path(name_or_path).is_dir():
        return Path(name_or_path)
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise ModelError(f"{name_or_path}: no such folder, and not a Hub name (owner/name)")
    try:
        folder = download(name_or_path, BESIDE, revision=revision)
        # Some repositories hold other forms of the same weights, in folders or under other names.
        return download(name_or_path, listed(folder), revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, KeyError) as error:
        raise HubError(f"{name_or_path}: cannot be downloaded: {first_line(error)}") from None
