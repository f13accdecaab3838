"""Two slots that streamed layers pass through: one is computed with while the next one is filled.

accelerate's offloading moves a module's weights in a forward hook, when they are needed, and again for every
micro-batch. Here a thread fills the other slot meanwhile, in the direction the computation goes: up in forward, down in
backward, where the last layers are still in the slots when it turns. A wrong guess costs a read, never a number.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Condition

import torch

from toolkit.offload.place import SLOTS
from toolkit.offload.store import Filler

__all__ = ["ExpertStream", "Traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes and layers moved so far, and the seconds that the computation waited for them."""

    bytes: int = 0
    layers: int = 0
    waited: float = 0.0


@dataclass(eq=False)
class _Slot:
    image: torch.Tensor
    layer: str | None = None
    experts: frozenset[int] | None = None
    users: int = 0
    stamp: int = 0
    ready: Future[None] = field(default_factory=Future)

    def holds(self, layer: str, experts: frozenset[int] | None) -> bool:
        return self.layer == layer and (self.experts is None or (experts is not None and experts <= self.experts))


class ExpertStream:
    """Hands out the images of streamed layers.

    Args:
        sizes: streamed layers to the bytes of their images, in model order.
        device: where the slots are.
    """

    def __init__(self, sizes: Mapping[str, int], filler: Filler, device: torch.device) -> None:
        self.layers = tuple(sizes)
        self.traffic = Traffic()
        self.gate: Callable[[str], None] | None = None
        """Called with a layer's name before it is handed out: layer-major training lets micro-batches through by it."""
        self._index = {layer: number for number, layer in enumerate(sizes)}
        self._filler, self._device, self._size = filler, device, max(sizes.values())
        self._slots: list[_Slot] = []
        self._free = Condition()
        self._stamps = itertools.count()
        self._here, self._way = -1, 1
        self._mover = ThreadPoolExecutor(1, "onecard-expert-stream")

    @contextmanager
    def present(self, layer: str, experts: Sequence[int] | None, *, trains: bool) -> Iterator[torch.Tensor]:
        """The layer's image [bytes] int8 on the device, valid until the block ends.

        Args:
            experts: those needed, where they are few: only their rows are read. None for all.
            trains: whether a backward will follow this use, so that the last layers are kept at the turn.

        Raises:
            ResourceError: it cannot be read.
        """
        if self.gate is not None:
            self.gate(layer)
        slot = self._claim(layer, None if experts is None else frozenset(experts))
        try:
            if experts is None:
                self._look_ahead(layer, trains)
            self._wait(slot)
            yield slot.image
        finally:
            self._filler.release(slot.image)
            with self._free:
                slot.users -= 1
                self._free.notify_all()

    def _claim(self, layer: str, experts: frozenset[int] | None) -> _Slot:
        with self._free:
            while True:
                slot = next((slot for slot in self._all_slots() if slot.holds(layer, experts)), None)
                if slot is None and (slot := self._oldest_idle()) is not None:
                    self._fill(slot, layer, experts)
                if slot is not None:
                    slot.users += 1
                    slot.stamp = next(self._stamps)
                    return slot
                self._free.wait()

    def _all_slots(self) -> list[_Slot]:
        """Made when first used, and touched, so that no page of them is ever fresh again.

        The zeros are queued on the computing stream: a copy on another one may come only after them.
        """
        if not self._slots:
            count = min(SLOTS, len(self.layers))
            with torch.inference_mode(False):
                images = [torch.zeros(self._size, dtype=torch.int8, device=self._device) for _ in range(count)]
            for image in images:
                self._filler.release(image)
            self._slots = [_Slot(image) for image in images]
        return self._slots

    def _oldest_idle(self, but: str = "") -> _Slot | None:
        idle = [slot for slot in self._all_slots() if not slot.users and slot.layer != but]
        return min(idle, key=lambda slot: slot.stamp, default=None)

    def _fill(self, slot: _Slot, layer: str, experts: frozenset[int] | None) -> None:
        """One thread moves all, so a slot is never filled twice at a time."""
        slot.layer, slot.experts, slot.stamp = layer, experts, next(self._stamps)
        slot.ready = self._mover.submit(self._move, slot.image, layer, None if experts is None else sorted(experts))

    def _move(self, image: torch.Tensor, layer: str, experts: Sequence[int] | None) -> None:
        moved = self._filler.fill(image, layer, experts)
        with self._free:
            self.traffic = replace(self.traffic, bytes=self.traffic.bytes + moved, layers=self.traffic.layers + 1)

    def _look_ahead(self, layer: str, trains: bool) -> None:
        following = self._following(layer, trains)
        with self._free:
            if following is None or any(slot.holds(following, None) for slot in self._all_slots()):
                return
            if (slot := self._oldest_idle(but=layer)) is not None:
                self._fill(slot, following, None)

    def _following(self, layer: str, trains: bool) -> str | None:
        """The layer that will be needed next, None at a turn: what comes then is in the slots already."""
        here, last = self._index[layer], len(self.layers) - 1
        if here != self._here:
            has_begun_again = here == 0 and self._here == last > 1
            self._way = 1 if here > self._here or has_begun_again else -1
            self._here = here
        if 0 <= here + self._way <= last:
            return self.layers[here + self._way]
        return self.layers[0] if self._way > 0 and not trains else None

    def _wait(self, slot: _Slot) -> None:
        start = time.perf_counter()
        try:
            slot.ready.result()
        except BaseException:
            slot.layer = None
            raise
        finally:
            waited = time.perf_counter() - start
            with self._free:
                self.traffic = replace(self.traffic, waited=self.traffic.waited + waited)
