"""transformers knows our int8 format whichever of the two is imported first, and `toolkit` alone imports no torch.

transformers keeps its quantisation formats in a table inside one module and has no entry point that another package
could declare. So the table gets a stand-in as soon as it exists; the first checkpoint of ours that is read brings in
`toolkit.quant`, which puts the real classes in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["METHOD", "make_room", "register"]

METHOD = "onecard_int8"
"""`quantization_config.quant_method` of our int8 checkpoints."""

_TABLES = "transformers.quantizers.auto"


def register(config_class: Callable[[], Any]) -> None:
    """Enter our format into transformers' table, now or when transformers is imported.

    Args:
        config_class: imports the real classes, which registers them, and gives that of the config.
    """
    stand_in = _Deferred(config_class)
    if (tables := sys.modules.get(_TABLES)) is not None:
        _announce(tables, stand_in)
    else:
        sys.meta_path.insert(0, _Watcher(stand_in))


def make_room(table: dict[str, Any]) -> None:
    """Take the stand-in out of transformers' table of config classes, for the real class to be registered."""
    if isinstance(table.get(METHOD), _Deferred):
        del table[METHOD]


class _Deferred:
    """In transformers' table for the config class, until a config of ours is read."""

    def __init__(self, config_class: Callable[[], Any]) -> None:
        self.config_class = config_class

    def from_dict(self, config: Mapping[str, Any], **kwargs: Any) -> Any:
        return self.config_class().from_dict(config, **kwargs)


class _Watcher(MetaPathFinder):
    """Finds nothing by itself: lets transformers' table be loaded as ever, and enters our format afterwards."""

    def __init__(self, stand_in: _Deferred) -> None:
        self.stand_in = stand_in

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _announce(module, self.stand_in)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _announce(tables: ModuleType, stand_in: _Deferred) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, stand_in)
