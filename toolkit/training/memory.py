"""What a run really takes, and the longest batch first: what does not fit fails before step 1, in one line.

The peak is that of a card's allocations, or of a process's anonymous memory, sampled: `ru_maxrss` counts pages of
mapped files, which the system takes back at will. transformers' `auto_find_batch_size` starts over with smaller batches
when memory runs out, wherever in a run that is; trying the longest batch first changes no number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from toolkit.data.storage import sequence_lengths
from toolkit.errors import ResourceError, out_of_memory
from toolkit.training.checkpoint import random_state, restore_random_state

__all__ = ["Peak", "anonymous_memory", "longest_rows", "peak_of", "probe", "within_memory"]

_SECONDS = 0.005
"""Between two looks: a layer of any size that matters takes longer."""


@dataclass
class Peak:
    """The highest count of bytes seen in a block."""

    bytes: int = 0


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def peak_of(device: str) -> Iterator[Peak]:
    """Watch the block. On a card torch's allocator counts; the process is looked at from a thread."""
    peak = Peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = int(torch.cuda.max_memory_allocated())
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, over), daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def _watch(peak: Peak, over: threading.Event) -> None:
    with Path("/proc/self/status").open(encoding="ascii") as status:
        while True:
            status.seek(0)
            for line in status:
                if line.startswith("RssAnon:"):
                    peak.bytes = max(peak.bytes, int(line.split()[1]) * 1024)
                    break
            if over.wait(_SECONDS):
                return


def longest_rows(dataset: Dataset, count: int) -> list[int]:
    """Indices of the `count` longest rows by `input_ids`, longest first."""
    longest: list[int] = np.argsort(-sequence_lengths(dataset), kind="stable")[:count].tolist()
    return longest


def probe(
    step: Callable[[], Any], forget: Callable[[], None], *, tokens: int, held: int, device: Any, advice: str
) -> None:
    """Run a step, drop what it leaves, and put the random numbers back.

    Args:
        step: forward and backward of the longest batch. forget: drops gradients and counts.
        held: bytes that will be held beside, once there is an optimizer. tokens, advice: for the message.

    Raises:
        ResourceError: there is not enough memory.
    """
    with _same_random_numbers():
        try:
            with within_memory(f"longest batch ({tokens} tokens)", advice):
                room = torch.empty(held, dtype=torch.uint8, device=device)
                step()
                del room
        finally:
            forget()


@contextmanager
def within_memory(what: str, advice: str) -> Iterator[None]:
    """Raise `ResourceError`, which says both, where memory runs out in the block, before the first step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(f"out of memory before step 1, {what}; cheapest fix: {advice}") from error


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The random numbers that are drawn after the block are those that would have been without it."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)
