"""Tensors of a checkpoint that are no parameter of its model: layers for drafts, parts of another modality, tables.

transformers leaves them out when it loads, and would leave them out of what it saves. A checkpoint that is written anew
keeps them, under the names and with the values that they have.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.formats.beside import OF_ACTIVATIONS
from toolkit.checkpoint.weights import Unread

__all__ = ["plain_tensor", "unused", "unused_lines"]

_LAYER = re.compile(r".+?\.\d+(?=\.)")


def unused(targets: Mapping[str, str], known: Container[str]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The keys that become no parameter: those to keep, by the layer or module they lie in, and those to leave out.

    Left out is what says how activations and caches were quantised, which is not so any more.

    Args:
        targets: of every key the parameter it becomes. known: the model's parameters and buffers.
    """
    kept, left_out = dict[str, list[str]](), list[str]()
    for key, target in targets.items():
        if target in known:
            continue
        if OF_ACTIVATIONS.search(key):
            left_out.append(key)
        else:
            layer = _LAYER.match(key)
            kept.setdefault(layer[0] if layer else key.rpartition(".")[0], []).append(key)
    return {name: tuple(keys) for name, keys in kept.items()}, tuple(sorted(left_out))


def plain_tensor(stored: Any) -> Tensor:
    """A slice of a file, read: as it is, or multiplied out into bf16 where it was quantised."""
    tensor: Tensor = stored.read("cpu", torch.bfloat16) if isinstance(stored, Unread) else stored[...]
    return tensor.contiguous()


def unused_lines(kept: Sequence[str], left_out: Sequence[str]) -> Iterator[str]:
    """What is told of both, a line each; all names are in `--json` and in export.json."""
    for keys, what in ((kept, "kept"), (left_out, "left out")):
        if keys:
            named = f"{', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''}"
            yield f"{len(keys)} tensors that the model does not use are {what}: {named}"
