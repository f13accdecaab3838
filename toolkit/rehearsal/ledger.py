"""Bytes of live storages while operators run, with the highest count between any two marks.

`torch.distributed._tools.mem_tracker` does this for modules whose parameters train; it refuses frozen ones, which here
are nearly all, and has no marks inside a backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Ledger"]


class Ledger(TorchDispatchMode):
    """Counts each storage once, from the operator that made it until nothing holds it. Storages known before are free.

    Args:
        known: tensors whose bytes are counted elsewhere: parameters and buffers.
        granule: bytes that the device's allocator rounds a storage up to.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), granule: int = 1) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.peaks: dict[str, int] = {}
        """Highest count of each stretch, by the mark that opens it."""
        self.bares: dict[str, int] = {}
        """As `peaks`, without what `left_out` gave where the stretch began."""
        self.left_out: Callable[[], int] = int
        """Bytes among those alive that a caller counts apart."""
        self._left_out = 0
        self.waits: dict[str, int] = {}
        """Highest count of each stretch, without what is left out, at places that the caller names."""
        self._granule, self._mark = granule, "start"
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in known:
            self._hold(tensor.untyped_storage(), 0)

    def mark(self, name: str) -> None:
        """End a stretch and begin one of this name."""
        self.peaks[self._mark] = max(self.peak, self.peaks.get(self._mark, 0))
        self.bares[self._mark] = max(self.peak - self._left_out, self.bares.get(self._mark, 0))
        self._mark, self.peak, self._left_out = name, self.live, self.left_out()

    def wait(self) -> None:
        """Note what is alive here."""
        self.waits[self._mark] = max(self.live - self.left_out(), self.waits.get(self._mark, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._held:
                    self._hold(storage, -(-storage.nbytes() // self._granule) * self._granule)
        return result

    def _hold(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self.live += size
        self.peak = max(self.peak, self.live)

        def let_go(_: object) -> None:
            self.live -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, let_go)
