"""What a run really takes: the peak of a card's allocations, or of a process's anonymous memory, sampled.

`ru_maxrss` counts pages of mapped files, which the system takes back at will; only anonymous memory must be there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "anonymous_memory", "peak_of"]

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
