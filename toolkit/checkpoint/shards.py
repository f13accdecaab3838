"""The tensors of a safetensors checkpoint, unread: which there are, and which parameter each one becomes.

`from_pretrained` opens all files inside; code that goes through a checkpoint in parts needs the keys before the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from toolkit.checkpoint.files import shards_of
from toolkit.errors import ModelError, first_line

__all__ = ["Shards", "targets"]


class Shards:
    """The files of one checkpoint folder, mapped while the block lasts; `name` is what errors call it.

    Raises:
        ModelError: no safetensors there, or a shard is missing or damaged.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = [folder / file for file in shards_of(folder, name)]
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}

    def __enter__(self) -> Shards:
        for path in self.files:
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise ModelError(
                    f"{self.name}: {path.name} cannot be read: {first_line(error)}; download the checkpoint again"
                ) from None
            self._opened |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened = {}
        self._stack.close()

    @property
    def keys(self) -> tuple[str, ...]:
        """Of every tensor, in the files' order."""
        return tuple(self._opened)

    @property
    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor with its shape."""
        return ((key, tuple(self.slice(key).get_shape())) for key in self._opened)

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(path.stat().st_size for path in self.files)

    def slice(self, key: str) -> Any:
        """The tensor, unread until it is indexed."""
        return self._opened[key].get_slice(key)


def targets(model: PreTrainedModel, mapping: Iterable[Any], keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint key to the name of the parameter it becomes (the first, where there are several).

    As `convert_and_load_state_dict_in_model` decides it; a key that no parameter takes keeps the name it would have.
    """
    entries = list(mapping)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    result = {}
    for key in keys:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        result[key] = key if target not in state and key in state else target
    return result
