"""What the cards can do that a plan or a benchmark reckons with, from NVIDIA's own tables; no driver is asked.

Peaks follow from the number of multiprocessors and the boost clock: on GeForce, in all three generations, one does 512
bf16 operations a clock with fp32 sums (half of what it does with fp16 sums) and 2,048 int8 operations. The products
agree with the peaks that the white papers print: 71, 165.2 and 209.5 TFLOP/s for the 3090, 4090 and 5090. Each figure
was also found in a second place, which docs/planning.md names. Memory is what CUDA reports on Linux, from public logs:
docs/planning.md says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CARDS", "Card"]

_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_PAGE_30 = "https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/"
_PAGE_40 = "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/"

_BF16_OPERATIONS, _INT8_OPERATIONS = 512, 2048
_GENERATION_4_X16, _GENERATION_4_X8, _GENERATION_5_X16 = 31.5, 15.75, 63.0


@dataclass(frozen=True)
class Card:
    """One card. Size in GB as it is sold, memory in MiB as CUDA reports it, clock in GHz, memory and PCIe rates in GB/s
    (each direction), dense operations."""

    name: str
    size: int
    memory_mib: int
    multiprocessors: int
    clock: float
    memory_rate: float
    pcie_rate: float
    capability: tuple[int, int]
    source: str

    @property
    def memory(self) -> int:
        """Bytes that a Linux driver of today lets programs see: less than what is printed on the box."""
        return self.memory_mib << 20

    @property
    def bf16_tflops(self) -> float:
        """Tensor-core TFLOP/s in bf16 with fp32 accumulation."""
        return self.multiprocessors * self.clock * _BF16_OPERATIONS / 1e3

    @property
    def int8_tops(self) -> float:
        """Tensor-core TOP/s in int8."""
        return self.multiprocessors * self.clock * _INT8_OPERATIONS / 1e3

    def seconds(self, operations: float, moved: float, *, is_int8: bool = False) -> float:
        """The least time for so many operations and bytes of device memory, at the peak of either."""
        peak = self.int8_tops if is_int8 else self.bf16_tflops
        return max(operations / (peak * 1e12), moved / (self.memory_rate * 1e9))


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card("rtx-3060-12gb", 12, 11906, 28, 1.777, 360, _GENERATION_4_X16, (8, 6), _PAGE_30),
        Card("rtx-3060-ti", 8, 7833, 38, 1.665, 448, _GENERATION_4_X16, (8, 6), _PAGE_30),
        Card("rtx-3070", 8, 7819, 46, 1.725, 448, _GENERATION_4_X16, (8, 6), _AMPERE),
        Card("rtx-3080", 10, 9875, 68, 1.710, 760, _GENERATION_4_X16, (8, 6), _AMPERE),
        Card("rtx-3090", 24, 24123, 82, 1.695, 936, _GENERATION_4_X16, (8, 6), _AMPERE),
        Card("rtx-4060-ti-16gb", 16, 15944, 34, 2.535, 288, _GENERATION_4_X8, (8, 9), _PAGE_40),
        Card("rtx-4070", 12, 11864, 46, 2.475, 504, _GENERATION_4_X16, (8, 9), _PAGE_40),
        Card("rtx-4070-ti-super", 16, 15934, 66, 2.610, 672, _GENERATION_4_X16, (8, 9), _PAGE_40),
        Card("rtx-4080", 16, 15945, 76, 2.505, 717, _GENERATION_4_X16, (8, 9), _ADA),
        Card("rtx-4090", 24, 24080, 128, 2.520, 1008, _GENERATION_4_X16, (8, 9), _ADA),
        Card("rtx-5070-ti", 16, 15808, 70, 2.452, 896, _GENERATION_5_X16, (12, 0), _BLACKWELL),
        Card("rtx-5080", 16, 15820, 84, 2.617, 960, _GENERATION_5_X16, (12, 0), _BLACKWELL),
        Card("rtx-5090", 32, 32086, 170, 2.407, 1792, _GENERATION_5_X16, (12, 0), _BLACKWELL),
    )
}
"""By the name that `--device` takes."""
