"""Shapes of a model without its weights: from its config, or from the published configs that come with the package.

transformers asks the Hub for a config of 2 kB; the models of our recipes are planned without any connection.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from toolkit.architecture import auto_class, skeleton

__all__ = ["is_published", "published", "published_config", "shape_of", "stated_billions"]

_FOLDER = Path(__file__).parent / "published"


def published() -> tuple[str, ...]:
    """Models whose config.json comes with the package, by their names on the Hub."""
    return tuple(sorted(path.stem.replace("__", "/") for path in _FOLDER.glob("*.json")))


def published_config(name: str) -> dict[str, Any]:
    """What decides shapes in that model's config.json, `model_type` among it."""
    values = _read(name)
    values.pop("stated_billions")
    return values


def stated_billions(name: str) -> float:
    """Parameters as the model's card states them, which shows that the config is the right one."""
    return float(_read(name)["stated_billions"])


def is_published(name: str, revision: str) -> bool:
    """Whether no connection is needed for this model's shapes."""
    return revision == "main" and not Path(name).exists() and _file(name).is_file()


def shape_of(name: str, revision: str = "main", attn_implementation: str = "auto") -> PreTrainedModel:
    """The model on the meta device.

    Raises:
        ModelError: as `toolkit.architecture.skeleton`.
    """
    if not is_published(name, revision):
        model = skeleton(name, revision=revision)
    else:
        values = published_config(name)
        with torch.device("meta"):
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            model = auto_class(config).from_config(config, trust_remote_code=False)
    if attn_implementation in ("eager", "sdpa"):
        model.set_attn_implementation(attn_implementation)
    return model


def _file(name: str) -> Path:
    return _FOLDER / f"{name.replace('/', '__')}.json"


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(_file(name).read_text(encoding="utf-8"))
    return values
