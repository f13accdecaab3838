"""Nested state (optimizer, schedule, random numbers, counters) as JSON and tensors, and back, bit for bit.

`torch.save` keeps such trees as pickles, which run code when they are opened and whose damage shows late or never.
JSON and safetensors run nothing, and Python's JSON gives every float back exactly.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["flatten", "random_state", "restore_random_state", "unflatten"]

_TENSOR, _ARRAY, _TUPLE, _ITEMS = "$tensor", "$array", "$tuple", "$items"


def flatten(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """`value` as something JSON can hold; its tensors go into `tensors`, copied to the CPU, under names below `name`.

    Dictionaries with any keys, lists, tuples, NumPy arrays, numbers, strings and None are kept. Raises `TypeError` for
    anything else.
    """
    match value:
        case torch.Tensor():
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        case np.ndarray():
            return {_ARRAY: str(value.dtype), "values": value.tolist()}
        case np.generic():
            return value.item()
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, tensors, f"{name}.{key}") for key, item in value.items()}
        case dict():
            return {_ITEMS: [[key, flatten(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
        case tuple():
            return {_TUPLE: [flatten(item, tensors, f"{name}.{n}") for n, item in enumerate(value)]}
        case list():
            return [flatten(item, tensors, f"{name}.{n}") for n, item in enumerate(value)]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint")


def unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `flatten` was given. Raises `KeyError` where a tensor is missing."""
    match value:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$array": str(dtype), "values": list(values)}:
            return np.array(values, dtype=dtype)
        case {"$tuple": list(items)}:
            return tuple(unflatten(item, tensors) for item in items)
        case {"$items": list(pairs)}:
            return {key: unflatten(item, tensors) for key, item in pairs}
        case dict():
            return {key: unflatten(item, tensors) for key, item in value.items()}
        case list():
            return [unflatten(item, tensors) for item in value]
    return value


def random_state() -> dict[str, Any]:
    """The state of every random number generator that training draws from: Python, NumPy, torch, each card."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.random.set_rng_state_all(state["cuda"])
