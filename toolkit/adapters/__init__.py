"""LoRA on experts, router and linears, in the layout stock PEFT writes."""

from toolkit.adapters.attach import (
    AdapterCoverage,
    adapter_coverage,
    attach_lora,
    load_adapter,
    targets,
    unmoved_adapters,
)
from toolkit.adapters.layer import factors_from_layout

__all__ = [
    "AdapterCoverage",
    "adapter_coverage",
    "attach_lora",
    "factors_from_layout",
    "load_adapter",
    "targets",
    "unmoved_adapters",
]
