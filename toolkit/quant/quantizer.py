"""transformers' quantizer seam: expert stacks and linears turn int8 one by one as the checkpoint streams in.

bitsandbytes' own quantizer replaces `nn.Linear` only and leaves the experts, nearly all of an MoE, in 16 bit. This
one declares int8 parameters on the meta skeleton and puts its rounding into the family's own key conversions; a
checkpoint that `onecard quantize` or `save_pretrained` wrote holds those parameters as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from toolkit.architecture import LINEAR_ROLES, describe, strip_index
from toolkit.checkpoint.files import METHOD
from toolkit.checkpoint.weights import Unread
from toolkit.ops import DEFAULT_BACKEND
from toolkit.ops.int8 import Int8Linear
from toolkit.quant.rounding import Round, Workspace
from toolkit.quant.stored import declare_stack, is_stored

__all__ = ["Int8Config", "Int8Quantizer", "register"]


class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What is stored rounded: `experts` in int8, int4, mxfp4 or none, `linears` in int8, bnb or none.

    `source` is the quantization_config the checkpoint declared before it was requantised, None for a 16- or 32-bit one;
    `requantised` is what that cost, as `Requantised.to_dict` says it. `stacks` says of each expert stack what it is in,
    where they differ: `experts` is source then, or a mixture.
    """

    def __init__(
        self,
        experts: str = "int8",
        linears: str = "int8",
        source: Mapping[str, Any] | None = None,
        requantised: Mapping[str, Any] | None = None,
        stacks: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(quant_method=METHOD)
        self.experts = experts
        self.linears = linears
        self.source = None if source is None else dict(source)
        self.requantised = None if requantised is None else dict(requantised)
        self.stacks = None if stacks is None else dict(stacks)


class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Declares the int8 parameters before weights load; rounds float ones as they arrive, takes int8 ones as such."""

    requires_calibration = False
    keeps_results = True
    """Whether what is rounded stays in memory, as a model does; a writer lets go of each part."""

    def __init__(self, quantization_config: Int8Config, **kwargs: Any) -> None:
        # The loader casts every tensor to the compute dtype before a quantizer sees it, unless the checkpoint counts as
        # prequantised; then the quantizer says how each tensor is read (`get_new_dtype`), which is what we do for both.
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})
        self.is_stored_int8 = bool(kwargs.get("pre_quantized", True))
        self.workspace = Workspace()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Tensors are rounded on the device the model goes to, where that is one."""
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        self.workspace = Workspace(places.pop() if len(places) == 1 else "cpu")
        return device_map

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Make int8 experts compute with our backend, whatever transformers would have chosen for float ones.

        This is the last that a quantizer sees of the config before the files are looked for.
        """
        if self.is_stored_int8:
            config.__dict__.pop("transformers_weights", None)  # `REQUIRES`, which says that we were missing
        if self.quantization_config.experts != "none" and not str(config._experts_implementation).startswith(
            "onecard_"
        ):
            config._experts_implementation = DEFAULT_BACKEND
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        architecture = describe(model)
        if self.quantization_config.experts != "none":
            for layer in architecture.layers:
                for leaf, stack in zip((layer.up, layer.down), layer.stacks, strict=True):
                    kind = (self.quantization_config.stacks or {}).get(stack, self.quantization_config.experts)
                    declare_stack(model.get_submodule(layer.name), leaf, kind)
            self.workspace.keeps = self.quantization_config.experts == "source"
        names = architecture.linear_names(*LINEAR_ROLES)
        if self.quantization_config.linears == "int8":
            for name in names:
                if type(linear := model.get_submodule(name)) is nn.Linear:
                    model.set_submodule(name, Int8Linear.from_linear(linear))
        for module in _int8_modules(model):
            # Nothing random in here: what is not read is refused afterwards.
            module._is_hf_initialized = True  # type: ignore[assignment]
        if self.quantization_config.linears == "bnb":
            keep = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in names]
            replace_with_bnb_linear(model, keep, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The family's own conversions with our rounding at their end; none for a checkpoint of ours.

        What no conversion makes (a linear, a stack that is stored fused) gets one that only rounds.
        """
        if self.is_stored_int8:
            return []
        if self.keeps_results:
            self.workspace.reserve(model)
        wrapped = [self._rounding(entry) for entry in weight_conversions]
        return [*wrapped, *(self._plain(name) for name in sorted(set(_bare(model))))]

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element that transformers still has to make room for on a card: none of what is reserved already.

        transformers allocates the sum beforehand, to hand it out while loading; our results lie elsewhere.
        """
        if self.workspace.has_reserved(param_name):
            return 0.0
        module_name, _, leaf = param_name.rpartition(".")
        if leaf == "weight" and type(model.get_submodule(module_name)).__name__ == "Linear8bitLt":
            return 1.0
        size: float = super().param_element_size(model, param_name, param)
        return size

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave what goes through our rounding as it is in the file: a page of it, not a copy."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Round):
                operation.dtype = dtype if dtype is not None and dtype.is_floating_point else None
                self.workspace.expect(operation, param)
                return None
        wanted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return torch.float32 if wanted is None and isinstance(param, Unread) else wanted

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.quantization_config.requantised = self.workspace.requantised.to_dict()
        self.workspace = Workspace()
        _refuse_unread(model)
        # Names and shapes in an int8 checkpoint are the model's own, so saving has nothing to convert back.
        model._weight_conversions = []
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes it; bitsandbytes' linears keep state of their own."""
        return bool(self.quantization_config.linears != "bnb")

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the frozen weights train."""
        return True

    def _round(self, operations: list[ConversionOps]) -> Round:
        return Round(operations, self.workspace)

    def _plain(self, name: str) -> WeightConverter:
        """A conversion of a parameter that the checkpoint holds under its own name."""
        return WeightConverter(name, name, [self._round([])], force_cpu=True)

    def _rounding(self, entry: Any) -> Any:
        if not isinstance(entry, WeightConverter):
            return entry
        return entry.copy(
            list(entry._original_source_patterns),
            list(entry._original_target_patterns),
            operations=[self._round(list(entry.operations))],
            force_cpu=True,  # as a page of the file; each part is sent to the device when its turn comes
        )


def _bare(model: nn.Module) -> Iterator[str]:
    """Every 8-bit parameter's name without what differs between layers, as a pattern the loader matches keys with."""
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if is_stored(module, name) or (name == "weight" and type(module).__name__ == "Linear8bitLt"):
                yield strip_index(f"{module_name}.{name}")


def _int8_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(is_stored(module, name) for name, _ in module.named_parameters(recurse=False)):
            yield module


def _refuse_unread(model: nn.Module) -> None:
    """transformers marks every tensor it read and only warns of the others, which then hold whatever lay in memory."""
    modules = set(_int8_modules(model))
    for name, parameter in model.named_parameters():
        if model.get_submodule(name.rpartition(".")[0]) in modules and not hasattr(parameter, "_is_hf_initialized"):
            raise ValueError(
                f"the checkpoint lacks {name}, or has it in another shape than {tuple(parameter.shape)}; download it "
                "again or fix config.json"
            )


def register() -> None:
    """Enter our int8 format into transformers' tables, so that its `from_pretrained` reads our checkpoints.

    Done when this module is imported; again does nothing.
    """
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(Int8Config)
        register_quantizer(METHOD)(Int8Quantizer)


register()
