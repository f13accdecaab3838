"""LoRA on expert stacks and routers: PEFT's container and file layout, our computation.

PEFT's `ParamWrapper` rebuilds `W + BA` for every expert at every forward and cannot touch int8. This subclass keeps its
parameters, names and nesting, so that state dicts are stock, and hands the factors to the expert backend instead. It is
registered through `LoraConfig`'s own seam for custom modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from toolkit.architecture import is_experts, is_plain_linear
from toolkit.errors import ModelError
from toolkit.ops import BACKENDS, DEFAULT_BACKEND, FACTORS, LoraFactors, adapted_linear
from toolkit.ops.few_rows import is_better_in_fp32
from toolkit.ops.int8 import Int8Linear

__all__ = ["Int8LoraLinear", "ParamWrapper", "factors_from_layout", "register"]

_ADDED_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16)
"""Types of a weight to which an update is simply added; PEFT goes through a wider one with others."""


class ParamWrapper(StockParamWrapper):  # type: ignore[misc]
    """The update of one expert stack, or of a router's weight; wrappers nest. PEFT looks for the class by this name."""

    keeps_factors = False
    """Whether nobody trains it: a token that is generated hits few experts, and putting the factors in order takes all
    experts' in hand. What is kept takes the memory of B again."""
    _made: tuple[tuple[Any, ...], Any] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the experts with this stack's factors in place, any other module with its weight and the update."""
        if not is_experts(self.get_base_layer()):
            return self._with_weight(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        factors = None if self.disable_adapters else self._factors()
        if factors is not None and self.keeps_factors and x.is_cpu and not torch.is_grad_enabled():
            factors = self._ready(factors, torch.float32 if is_better_in_fp32(x, factors.A) else x.dtype)
        if factors is None:
            output: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return output
        experts = self.get_base_layer()
        if (backend := experts.config._experts_implementation) not in BACKENDS:
            raise ModelError(
                f"the expert backend {backend} knows nothing of adapters and would leave them out: "
                f"model.set_experts_implementation({DEFAULT_BACKEND!r}) first"
            )
        active = experts.__dict__.setdefault(FACTORS, {})
        active[self.parameter_name] = factors
        try:
            output = self.base_layer(x, *args, **kwargs)
        finally:
            # Gone already where several micro-batches are in this layer at once; each read it when it entered.
            active.pop(self.parameter_name, None)
        return output

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """As PEFT reads them off the float parameter [E, …], also where two inputs share a byte."""
        sizes: tuple[int, int] = super()._get_in_out_features(module)
        experts, parameter = self.get_base_layer(), self.get_param()
        if not is_experts(experts) or parameter.dtype != torch.uint8:
            return sizes
        _, half, outputs = parameter.shape
        return (2 * half, outputs) if experts.is_transposed else (outputs, 2 * half)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused on int8: adding to rounded weights would round the adapter away."""
        if not self.get_param().is_floating_point():
            raise ModelError("an adapter cannot be merged into int8 experts: merge it into the original checkpoint")
        super().merge(safe_merge, adapter_names)

    def _with_weight(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """W + BA stands in for the weight. PEFT registers a parametrization each time, which takes 0.3 ms."""
        base, names = self.get_base_layer(), [name for name in self.active_adapters if name in self.lora_A]
        weight = self.get_param()
        if self.disable_adapters or self.merged or not names or weight.dtype not in _ADDED_AS_THEY_ARE:
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        if self.keeps_factors and not torch.is_grad_enabled():
            updated: torch.Tensor = self._kept(
                (weight.data_ptr(), weight._version), lambda: self._updated(weight, names)
            )
        else:
            updated = self._updated(weight, names)
        base.__dict__[self.parameter_name] = updated  # is found before the parameter
        try:
            output = self.base_layer(x, *args, **kwargs)
        finally:
            base.__dict__.pop(self.parameter_name, None)
        return output

    def _updated(self, weight: torch.Tensor, names: list[str]) -> torch.Tensor:
        for name in names:
            weight = weight + self.get_delta_weight(name)
        return weight

    def _ready(self, factors: LoraFactors, dtype: torch.dtype) -> LoraFactors:
        """In the order and dtype that they are computed in."""
        A, B, scaling = factors.A, factors.B, factors.scaling
        made: LoraFactors = self._kept((dtype,), lambda: LoraFactors(A.to(dtype), B.to(dtype).contiguous(), scaling))
        return made

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Made once, and again after any change of the factors or the key."""
        weights = [layers[name].weight for layers in (self.lora_A, self.lora_B) for name in layers]
        written = ((weight.data_ptr(), weight._version) for weight in weights)
        whole = (*key, *self.active_adapters, *self.scaling.items(), *written)
        if self._made is None or self._made[0] != whole:
            self._made = whole, make()
        return self._made[1]

    def _factors(self) -> LoraFactors | None:
        pairs = [
            factors_from_layout(
                self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts, self.scaling[name]
            )
            for name in self.active_adapters
            if name in self.lora_A
        ]
        if len(pairs) <= 1:
            return pairs[0] if pairs else None
        return LoraFactors(torch.cat([p.A for p in pairs], dim=1), torch.cat([p.scaling * p.B for p in pairs], dim=2))


class Int8LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer on an int8 linear, its usual case computed in one piece; everything else is PEFT's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        name = self._only_adapter()
        if args or kwargs or name is None:
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.base_layer
        return adapted_linear(
            x,
            base.weight,
            base.weight_scale,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )

    def _only_adapter(self) -> str | None:
        """The one active adapter, where it is plain LoRA; None where PEFT has to look closer."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
            return None
        (name,) = names
        has_dropout = self.training and not isinstance(self.lora_dropout[name], nn.Identity)
        return None if has_dropout or self.lora_B[name].bias is not None else name


def factors_from_layout(A: torch.Tensor, B: torch.Tensor, num_experts: int, scaling: float) -> LoraFactors:
    """PEFT's A (R·E, I), expert slowest, and B (O, R·E), expert fastest, as [E, R, I] and [E, O, R]; nothing is copied.

    Source: `get_delta_weight` of peft's `ParamWrapper`.
    """
    A_ERI = A.reshape(num_experts, -1, A.shape[1])
    # As a matrix transposed once: torch copies that, and its gradient, several times faster than three permuted axes.
    B_EOR = B.reshape(-1, num_experts).t().reshape(num_experts, B.shape[0], -1)
    return LoraFactors(A_ERI, B_EOR, scaling)


def register(config: LoraConfig) -> LoraConfig:
    """Make PEFT build our layer for expert stacks under this config; everything else stays PEFT's. Returns it."""
    config._register_custom_module({nn.Module: _dispatch})
    return config


def _dispatch(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    by_parameter = kwargs.get("parameter_name") is not None
    # Linears that are named by their parameter get the same adapter under the same names as PEFT's wrapper of
    # `weight`, which would rebuild W + BA.
    as_module = {**kwargs, "parameter_name": None}
    layer: nn.Module | None = None
    if type(base) is Int8Linear:
        layer = Int8LoraLinear(target, adapter_name, **as_module)
    elif by_parameter and is_plain_linear(base):
        layer = Linear(target, adapter_name, **as_module)
    elif by_parameter:
        layer = ParamWrapper(target, adapter_name, **kwargs)
    return layer
