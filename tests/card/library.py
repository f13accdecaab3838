"""The rehearsed card's library as Python sees it: work in the streams, and what was counted."""

from __future__ import annotations

import ctypes
import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = [
    "Counts",
    "RehearsalError",
    "counts",
    "finish",
    "is_loaded",
    "poison",
    "put",
    "require_no_failure",
    "take",
    "traced",
    "waits",
]

_COUNTED = ("launches", "synchronizations", "bytes_to_device", "bytes_to_host", "allocations")


class RehearsalError(Exception):
    """The rehearsal itself is wrong: an operator that it cannot replay, or one whose replay failed."""


@dataclass(frozen=True)
class Counts:
    """What was counted since the process began; `peak` is bytes of the first device, the context's share left out."""

    launches: int
    synchronizations: int
    bytes_to_device: int
    bytes_to_host: int
    allocations: int
    used: int
    peak: int


_library = ctypes.CDLL(None)
_work: dict[int, Callable[[], None]] = {}
_tokens = itertools.count(1)
_failures: list[str] = []


def is_loaded() -> bool:
    """Whether this process has the card: the library is preloaded."""
    return hasattr(_library, "rehearsed_card_put")


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def _run(token: int) -> None:
    try:
        with torch.inference_mode(False), torch.no_grad():
            _work.pop(token)()
    except BaseException:
        _failures.append(traceback.format_exc())


if is_loaded():
    _library.rehearsed_card_put.argtypes = (ctypes.c_size_t, ctypes.c_void_p, ctypes.c_long)
    _library.rehearsed_card_count.restype = ctypes.c_long
    for _name in ("rehearsed_card_used", "rehearsed_card_peak"):
        getattr(_library, _name).restype = ctypes.c_size_t
    _library.rehearsed_card_trace.restype = ctypes.c_long
    _library.rehearsed_card_waits.restype = ctypes.c_long
    _library.rehearsed_card_take.argtypes = (ctypes.c_size_t,)
    _library.rehearsed_card_finish.argtypes = (ctypes.c_size_t,)


def put(stream: int, work: Callable[[], None]) -> None:
    """Queue work in a stream, by the stream's handle; it runs in whichever thread has to wait for it."""
    token = next(_tokens)
    _work[token] = work
    _library.rehearsed_card_put(stream, _run, token)


def finish(stream: int) -> None:
    """All that is queued in a stream is done when this returns; no synchronisation is counted."""
    _library.rehearsed_card_finish(stream)
    require_no_failure()


def require_no_failure() -> None:
    """Raises: RehearsalError: replayed work has failed since the last time."""
    if _failures:
        raise RehearsalError("a replay failed:\n" + _failures[0])


def traced() -> Iterator[tuple[int, int, int]]:
    """What has ordered streams since the last time: its kind, as in runtime/card.h, an event and a stream."""
    room = (ctypes.c_long * (3 * 1024))()
    while count := int(_library.rehearsed_card_trace(room, 1024)):
        for start in range(0, 3 * count, 3):
            yield room[start], room[start + 1], room[start + 2]


def waits() -> int:
    """How often this thread has waited for the card."""
    return int(_library.rehearsed_card_waits())


def counts() -> Counts:
    """As of now."""
    numbers = [_library.rehearsed_card_count(index) for index in range(len(_COUNTED))]
    return Counts(*numbers, _library.rehearsed_card_used(0), _library.rehearsed_card_peak(0))


def take(size: int) -> None:
    """Another program takes so many bytes of the card."""
    _library.rehearsed_card_take(size)


def poison() -> None:
    """Every call from now on fails, as after an illegal address."""
    _library.rehearsed_card_poison()
