"""LoRA on experts, router and linears, in the layout stock PEFT writes."""

from toolkit.adapters.attach import (
    AdapterCoverage,
    adapter_coverage,
    add_adapter,
    attach_lora,
    load_adapter,
    targets,
    unmoved_adapters,
)
from toolkit.adapters.layer import ParamWrapper, factors_from_layout
from toolkit.adapters.starting import check_start
from toolkit.adapters.tokens import TokenRows, add_rows

__all__ = [
    "AdapterCoverage",
    "ParamWrapper",
    "TokenRows",
    "adapter_coverage",
    "add_adapter",
    "add_rows",
    "attach_lora",
    "check_start",
    "factors_from_layout",
    "load_adapter",
    "targets",
    "unmoved_adapters",
]
