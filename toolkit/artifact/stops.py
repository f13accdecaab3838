"""What ends an answer: the run's stop tokens, in the files where programs look for them.

A run may end its turns with a token that its base never stops at, and then every program goes on writing. transformers
and vLLM read generation_config.json, converters and older servers config.json; PEFT saves neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig

from toolkit.artifact.manifest import GENERATION_CONFIG, read_json, write_json
from toolkit.errors import ModelError

__all__ = ["declare_stops", "put_stops", "read_stops", "write_generation_config"]

_CONFIG = "config.json"
_EOS = "eos_token_id"
_FROM_CONFIG = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def write_generation_config(folder: Path, stops: Iterable[int], base: Path | None = None) -> None:
    """Write generation_config.json: the base's own, or what its config.json says, with `stops` as its end tokens.

    Args:
        stops: token ids, the base's own among them; nothing is written where there are none.
    """
    ids = sorted(set(stops))
    if not ids:
        return
    own = read_json(base / GENERATION_CONFIG) if base else {}
    if base and not own:
        config = read_json(base / _CONFIG)
        told = {**config.get("text_config", {}), **config}
        own = {key: told[key] for key in _FROM_CONFIG if isinstance(told.get(key), int)}
    # What was derived from a model's configuration would be derived again, without these ends.
    own.pop("_from_model_config", None)
    write_json(folder / GENERATION_CONFIG, {**own, _EOS: ids})


def read_stops(folder: Path) -> list[int]:
    """The end tokens of a folder's generation_config.json, sorted; none where it has no such file."""
    return sorted(_ids(read_json(folder / GENERATION_CONFIG)))


def put_stops(artifact: Path, folder: Path) -> None:
    """Put an artifact's generation_config.json into an export, in place of the base's, and read it back.

    Raises:
        ModelError: transformers reads other end tokens there.
    """
    stops = read_stops(artifact)
    if not stops:
        return
    (folder / GENERATION_CONFIG).write_bytes((artifact / GENERATION_CONFIG).read_bytes())
    found = GenerationConfig.from_pretrained(folder).eos_token_id
    if found != stops:
        raise ModelError(f"{folder / GENERATION_CONFIG}: ends at {found}, the adapter at {stops}: not exported")


def declare_stops(checkpoint: Path, stops: Iterable[int], base: Path) -> None:
    """Say in a checkpoint's config.json what ends an answer, where `stops` are more than the base says in its files.

    A family whose configuration takes one number keeps the base's; generation_config.json has them all either way.
    """
    path, ids = checkpoint / _CONFIG, sorted(set(stops))
    known = _ids(read_json(base / GENERATION_CONFIG)) | set().union(*map(_ids, _sections(read_json(base / _CONFIG))))
    if not path.is_file() or set(ids) <= known:
        return
    before = path.read_bytes()
    config = json.loads(before)
    for section in [one for one in _sections(config) if _EOS in one] or [config]:
        section[_EOS] = ids if len(ids) > 1 else ids[0]
    write_json(path, config)
    try:
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError):
        path.write_bytes(before)


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration, and the part of the text model in a multimodal one."""
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def _ids(config: Mapping[str, Any]) -> set[int]:
    found = config.get(_EOS)
    return set(found) if isinstance(found, list) else {found} if isinstance(found, int) else set()
