"""The NVIDIA driver, asked directly, where torch says that there is no card: why it cannot use the one that is there.

`torch.cuda.is_available()` is False for a missing card, for a driver older than torch's CUDA, for a torch without CUDA
and for a driver that does not start. Only the first of these means that a processor is what the user has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DRIVER_OF", "Driver", "find_driver", "is_built_for", "why_unusable"]

DRIVER_OF = {11: 450, 12: 525, 13: 580}
"""The oldest Linux driver of a CUDA major version: table 2 and 3 of NVIDIA's CUDA release notes."""

_NO_DEVICE, _STUB_LIBRARY = 100, 34
_MAJOR, _MINOR = 75, 76
"""Attributes of `cuDeviceGetAttribute`: the compute capability's two parts."""
_LAST_OF_CUDA_12 = (9, 0)
"""What torch's CUDA 12 builds are compiled for at most; a card after it needs CUDA 13's."""


@dataclass(frozen=True)
class Driver:
    """What the driver's library says: its CUDA version, its cards' names and capabilities, and an error's number."""

    cuda: tuple[int, int] = (0, 0)
    cards: tuple[tuple[str, tuple[int, int]], ...] = ()
    error: int = 0


def find_driver() -> Driver | None:
    """The driver of this machine with the cards that this process may see; None where it has no driver or no card."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    error = library.cuInit(0)
    if error in (_NO_DEVICE, _STUB_LIBRARY):
        return None
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = divmod(version.value // 10, 100)
    if error or library.cuDeviceGetCount(ctypes.byref(count)):
        return Driver(cuda, error=error or 1)
    return Driver(cuda, tuple(_card(library, number) for number in range(count.value))) if count.value else None


def why_unusable(driver: Driver, cuda: str | None, torch_version: str) -> str:
    """One line: why torch, built for `cuda` ("13.0", or None), does not see the driver's cards, and what to do."""
    if driver.error:
        return (
            f"an NVIDIA driver is here but does not start (CUDA error {driver.error}); restart the machine, or install "
            "the driver again"
        )
    [name, capability], *_ = driver.cards
    if cuda is None:
        return f"{name} is here, but torch {torch_version} has no CUDA; {_mend(driver, capability)}"
    wanted = int(cuda.partition(".")[0])
    if driver.cuda[0] < wanted:
        return (
            f"{name} is here, but its driver is for CUDA {driver.cuda[0]}.{driver.cuda[1]} and torch {torch_version} "
            f"for {cuda}; {_mend(driver, capability, wanted)}"
        )
    return f"{name} is here, but torch {torch_version} does not see it; look at what nvidia-smi and onecard doctor say"


def is_built_for(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a torch with these targets (`torch.cuda.get_arch_list()`: sm_86, compute_120, …) runs on a capability.

    Machine code runs on the same major version from its minor version on, PTX on all that is later.
    """
    for target in built:
        kind, _, number = target.partition("_")
        digits = "".join(filter(str.isdigit, number))
        major, minor = int(digits[:-1]), int(digits[-1])
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return True
    return False


def _mend(driver: Driver, capability: tuple[int, int], wanted: int = 13) -> str:
    """Another driver, or another build of torch, whichever suits the card."""
    newer = f"install NVIDIA driver {DRIVER_OF.get(wanted, DRIVER_OF[13])} or later"
    if driver.cuda[0] >= wanted:
        return "bash scripts/setup.sh installs the build with CUDA"
    if driver.cuda[0] == 12 and capability <= _LAST_OF_CUDA_12:
        return f"{newer}, or run bash scripts/setup.sh, which takes torch's build for CUDA 12"
    return newer


def _card(library: ctypes.CDLL, number: int) -> tuple[str, tuple[int, int]]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), number)
    name = ctypes.create_string_buffer(96)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return name.value.decode(errors="replace"), (major.value, minor.value)
