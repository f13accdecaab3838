"""Races between streams, by the bookkeeping of torch's own CUDA sanitizer: which stream touched what, and who waited.

The sanitizer stops at the first error, and knows tensors by their first element. Here all are counted, by the line of
the program, and memory is known by its storage, so that views of it are the same. Torch's own reports of events and
waits break gradient checkpointing (an exception on its way is lost), so those come from the library.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.card import library
from tests.card.replay import where

_activate, torch._C._activate_gpu_trace = torch._C._activate_gpu_trace, lambda: None  # the import would switch it on
from torch.cuda import _sanitizer  # noqa: E402

torch._C._activate_gpu_trace = _activate

__all__ = ["Races"]


class Races:
    """Watches operators (`operator`) and launches of Triton's (`launch`) from its making on."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self._handler = _sanitizer.EventHandler()
        self._lock = threading.RLock()

    def operator(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """One operator has been put into the current stream."""
        if func.is_view or func._schema.name == "aten::record_stream":
            return
        read: set[int] = set()
        written = _memory([result])
        for argument, value in _sanitizer.zip_arguments(func._schema, tuple(args), dict(kwargs)):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            (written if writes else read).update(_memory([value]))
        self._note(func._schema.name, read, written)

    def launch(self, name: str, values: Mapping[str, Any], written: Iterable[str]) -> None:
        """One kernel of Triton's has been put into the current stream."""
        names = set(written)
        read = _memory(value for key, value in values.items() if key not in names)
        self._note(name, read, _memory(values[key] for key in names))

    def _note(self, name: str, read: set[int], written: set[int]) -> None:
        if not read and not written:
            return
        stream = torch.cuda.current_stream().cuda_stream
        aliases: dict[int, list[str]] = defaultdict(list)
        with self._lock:
            self._follow()
            errors = self._handler._handle_kernel_launch(stream, read - written, written, set(), name, aliases)
            for error in errors:
                place = f"{name} at {where()}"
                self.found[place] += 1
                self.first.setdefault(place, str(error)[:4000])

    def _follow(self) -> None:
        """Tell the sanitizer what has been recorded and waited for."""
        for order, event, stream in library.traced():
            match order:
                case 0:
                    self._handler._handle_event_record(event, stream)
                case 1:
                    self._handler._handle_event_wait(event, stream)
                case 2:
                    self._handler._handle_event_synchronization(event)
                case 3:
                    self._handler._handle_stream_synchronization(stream)
                case 4:
                    self._handler._handle_device_synchronization()


def _memory(values: Iterable[Any]) -> set[int]:
    tensors = (leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, torch.Tensor) and leaf.is_cuda)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
