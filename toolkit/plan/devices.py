"""What a plan is made for: this machine, a card by its name, or so many bytes; and how bytes are read and written.

torch knows the card that is there. A plan is most useful before one is bought or the download begun.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.errors import RecipeError, ResourceError, did_you_mean
from toolkit.plan.cards import CARDS, Card
from toolkit.plan.driver import find_driver, is_built_for, why_unusable
from toolkit.recipe.sizes import size_of

__all__ = ["Device", "choose_device", "device_memory", "free_memory", "parse_bytes", "this_device", "unusable_card"]

_SHORT = {"rtx-3060": "rtx-3060-12gb", "rtx-4060-ti": "rtx-4060-ti-16gb"}
_SMALLEST = 1 << 20
"""Bytes: what is less was meant in another unit."""
_CONTEXT = 256 << 20
"""Bytes of a card that this process's own CUDA context has by the time its free memory is asked for, at least."""


@dataclass(frozen=True)
class Device:
    """One device: cuda or cpu, its bytes, the card where it is one of `CARDS`, and the host's bytes where known."""

    kind: str
    name: str
    memory: int
    card: Card | None = None
    host_memory: int | None = None
    is_here: bool = False
    """Whether it is this machine's own."""
    capability: tuple[int, int] | None = None
    """Compute capability of a card, where it is known."""
    taken: int = 0
    """Bytes of it that other programs hold now."""
    visible: int = 1
    """Cards that this process sees; it uses one."""

    @property
    def free(self) -> int:
        """Bytes that a run can have."""
        return self.memory - self.taken


def this_device(use_cpu: bool = False) -> Device:
    """This machine's card, this process's where there are several, or its processor where there is none.

    Raises:
        ResourceError: there is a card, but torch cannot use it. Training on the processor in its place is not what
            anybody wants who has one; `training.use_cpu` says so where it is.
    """
    host = device_memory("cpu")
    if use_cpu or not _has_card():
        return Device("cpu", "cpu", host, None, host, True)
    import torch

    index = _index()
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower().partition("geforce ")[2] or name.lower())
    return Device(
        "cuda",
        name,
        device_memory("cuda"),
        CARDS.get(_SHORT.get(plain, plain)),
        host,
        is_here=True,
        capability=capability,
        taken=_taken(),
        visible=torch.cuda.device_count(),
    )


def unusable_card() -> str | None:
    """Why torch cannot use the card that is here, and what to do; None where it can, or where there is none."""
    if not _has_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        driver = find_driver()
        return None if driver is None else why_unusable(driver, torch.version.cuda, torch.__version__)
    (major, minor), built = torch.cuda.get_device_capability(_index()), torch.cuda.get_arch_list()
    if not built or is_built_for((major, minor), built):
        return None
    return (
        f"{torch.cuda.get_device_name(_index())} is sm_{major}{minor}, and torch {torch.__version__} is built for "
        f"{', '.join(built)}; set ONECARD_TORCH_INDEX to the index of another build and run bash scripts/setup.sh"
    )


def _has_card() -> bool:
    """Whether torch computes on one here; it is not loaded where the driver's library is not there at all."""
    if not _has_driver():
        return False
    if (problem := unusable_card()) is not None:
        raise ResourceError(f"{problem}; or set training.use_cpu=true")
    import torch

    return bool(torch.cuda.is_available())


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _index() -> int:
    """Number of the card that is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _taken() -> int:
    """Bytes of the card that neither are free nor this process's own."""
    import torch

    free, total = torch.cuda.mem_get_info(_index())
    return max(0, total - free - torch.cuda.memory_reserved(_index()) - _CONTEXT)


def choose_device(name: str | None = None, memory: str | None = None, *, use_cpu: bool = False) -> Device:
    """The device of `--device` and `--memory`; this machine's where neither is given.

    Raises:
        RecipeError: no such card, or not a size.
    """
    found = this_device(use_cpu) if name is None else _card(name)
    if memory is None:
        return found
    size = parse_bytes(memory)
    if name is None and found.kind == "cpu" and not use_cpu:
        return Device("cuda", f"a card of {memory}", size)
    return replace(found, name=f"{found.name}, {memory}", memory=size, is_here=False, taken=0)


def _card(name: str) -> Device:
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    if wanted == "cpu":
        return this_device(use_cpu=True)
    wanted = wanted if wanted.startswith("rtx-") else f"rtx-{wanted}"
    card = CARDS.get(_SHORT.get(wanted, wanted))
    if card is None:
        raise RecipeError(f"--device: {name} is not known{did_you_mean(wanted, [*CARDS, *_SHORT], 3)}; give --memory")
    return Device("cuda", card.name, card.memory, card, capability=card.capability)


def parse_bytes(text: str) -> int:
    """Bytes of `12GiB`, `12 GB` or `12g`: as memory is sold, a thousand is 1,024.

    Raises:
        RecipeError: not a size.
    """
    try:
        size = size_of(text)
    except ValueError:
        size = 0
    if size < _SMALLEST:
        raise RecipeError(f"--memory: {text} is not a size; write 12GiB")
    return size


def device_memory(device: str) -> int:
    """Bytes of the device: the card's, or the machine's RAM (the cgroup's share of it)."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(_index()).total_memory)
    pages = Path("/proc/meminfo").read_text(encoding="ascii").split("MemTotal:")[1].split()[0]
    limit = Path("/sys/fs/cgroup/memory.max")
    bounded = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    total = int(pages) * 1024
    return min(total, int(bounded)) if bounded.isdigit() else total


def free_memory(device: str) -> int:
    """Bytes that this process could still have: of the card, or of memory, under the limits set for the process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(_index())[0])
    used, available = _fields("/proc/self/status"), _fields("/proc/meminfo")["MemAvailable"]
    rooms = [min(available, device_memory("cpu"))]
    for limit, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        rooms += [] if soft == resource.RLIM_INFINITY else [soft - used[field]]
    return max(0, min(rooms))


def _fields(path: str) -> dict[str, int]:
    """Bytes by name, of a file that gives kB."""
    lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines() if line.endswith("kB")]
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in lines}
