"""Load an MoE checkpoint, frozen and in int8, and prove that what should be int8 is.

Everything about files, revisions and key layouts is transformers' `from_pretrained`; this adds the refusals it lacks
(missing keys are only warnings there) and the coverage count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from toolkit.architecture import (
    LINEAR_ROLES,
    Architecture,
    auto_class,
    bare_modules,
    describe,
    is_of_adapter,
)
from toolkit.checkpoint.config import built, read_config, read_generation_config
from toolkit.checkpoint.files import METHOD, declared_format
from toolkit.checkpoint.remote import fetch
from toolkit.checkpoint.stacks import plain_weights
from toolkit.errors import ModelError, first_line, machine_failed
from toolkit.ops.experts import ExpertStack, expert_weights
from toolkit.quant.kept import kept_stacks
from toolkit.quant.quantizer import Int8Config
from toolkit.quant.rounding import first_failure
from toolkit.quant.stored import EXPERT_KINDS, multiplied_out, rounded_in

__all__ = ["Coverage", "dequantize_state", "load_int8", "measure", "storage"]


@dataclass(frozen=True)
class Coverage:
    """What is rounded, counted: stacks and linears in 8 bit of all, and the bytes of the expert stacks.

    `stacks_stored` counts all stacks by what they are in: int8, int4, mxfp4, grouped or float.
    """

    stacks_int8: int
    stacks: int
    linears_8bit: int
    linears: int
    expert_bytes: int
    expert_bytes_fp32: int
    model_bytes: int
    stacks_stored: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def load_int8(
    name_or_path: str,
    *,
    revision: str = "main",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    experts: str = "int8",
    linears: str = "int8",
    attn_implementation: str = "auto",
    experts_implementation: str = "onecard_per_expert",
    stacks: Mapping[str, str] | None = None,
) -> tuple[PreTrainedModel, Coverage]:
    """Load a frozen model whose expert stacks and linears become int8 as the shards stream in.

    A checkpoint of 16- or 32-bit weights is rounded, one that others quantised is multiplied out and requantised, and
    one that `onecard quantize` wrote is mapped from the disk as it is.

    Args:
        name_or_path: local folder or Hub repository with safetensors, or a GGUF file.
        dtype: of everything that is not int8.
        experts: int8, int4, mxfp4, source or none. linears: int8, bnb or none.
        experts_implementation: the expert backend, by the name `toolkit.ops` registered it under.
        stacks: full names of expert stacks to int8 or int4, where they are not all what `experts` says.

    Raises:
        ModelError: no MoE, a damaged or missing shard, keys that do not fit, an unknown format, a stack left in 16 bit.
    """
    config = read_config(name_or_path, revision)
    wanted = storage(name_or_path, config, experts, linears, stacks)
    kind, weights = auto_class(config), None
    if wanted is not None and wanted.source is not None:
        kind, config, weights = _plain(name_or_path, revision, config, wanted)
    try:
        with first_failure():
            model, info = kind.from_pretrained(
                name_or_path if weights is None else None,
                config=config,
                revision=revision,
                state_dict=weights,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=None if attn_implementation == "auto" else attn_implementation,
                experts_implementation=experts_implementation,
                quantization_config=wanted,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if machine_failed(error):
            raise
        raise ModelError(f"{name_or_path}: {first_line(error)}") from None
    _refuse_incomplete(name_or_path, info)
    if weights is not None:
        _as_if_from(model, name_or_path, revision)
    model.requires_grad_(False).eval()
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_in_one_piece)
    return model, _covered(name_or_path, measure(model), experts, linears)


def _in_one_piece(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A slice is copied before it is multiplied: `generate` wants the logits of each prompt's last token.

    torch takes such a slice sequence by sequence, and copies the weight for each: 16 prompts and 49,152 words in bf16
    take 0.9 GB and 0.4 s instead of 4 ms (torch 2.13 on a CPU, `findings/torch_linear_of_a_slice_copies_weight.sh`).
    """
    hidden, *others = given
    return hidden.contiguous(), *others


def _covered(name_or_path: str, coverage: Coverage, experts: str, linears: str) -> Coverage:
    """The coverage, where nothing is left in float that should be rounded."""
    if experts in EXPERT_KINDS and (floats := coverage.stacks_stored.get("float")):
        raise ModelError(f"{name_or_path}: {floats} of {coverage.stacks} expert stacks are not {experts}")
    if linears != "none" and coverage.linears_8bit != coverage.linears:
        raise ModelError(f"{name_or_path}: only {coverage.linears_8bit} of {coverage.linears} linears are 8-bit")
    return coverage


def _plain(
    name_or_path: str, revision: str, config: PretrainedConfig, wanted: Int8Config
) -> tuple[type[PreTrainedModel], PretrainedConfig, dict[str, Any]]:
    """The model's class, what it takes of the config, and every weight as a plain checkpoint has it, unread."""
    model = built(name_or_path, config)
    weights = plain_weights(name_or_path, fetch(name_or_path, revision), wanted.source, model)
    if wanted.experts == "source":
        wanted.stacks = kept_stacks(name_or_path, model, weights)
    is_part = type(model).config_class is config.sub_configs.get("text_config")
    return type(model), config.get_text_config() if is_part else config, weights


def _as_if_from(model: PreTrainedModel, name_or_path: str, revision: str) -> None:
    """What `from_pretrained` sets beside the weights where it is given a name."""
    model.config.name_or_path = name_or_path
    if (said := read_generation_config(name_or_path, revision)) is not None:
        model.generation_config = said


def storage(
    name_or_path: str,
    config: PretrainedConfig,
    experts: str = "int8",
    linears: str = "int8",
    stacks: Mapping[str, str] | None = None,
) -> Any:
    """The `Int8Config` to load with, or None where the checkpoint is int8 already and says how itself.

    A foreign `quantization_config` is taken out of `config`, since transformers would insist on it, and recorded.

    Raises:
        ModelError: it is stored otherwise than asked for, or in a format that cannot be requantised.
    """
    declared = declared_format(name_or_path, config)
    if declared is None:
        if experts == "source":
            raise ModelError(
                f"{name_or_path}: quantization.experts=source keeps what is stored in four bits, and these weights are "
                "floats; set it to int8 or int4"
            )
        return Int8Config(experts, linears, stacks=stacks or None)
    if declared["quant_method"] == METHOD:
        stored = Int8Config.from_dict(declared)
        if (stored.experts, stored.linears) != (experts, linears):
            raise ModelError(
                f"{name_or_path}: stored with experts {stored.experts} and linears {stored.linears}, not {experts} and "
                f"{linears}; change the recipe's quantization section, or take the checkpoint it was made from"
            )
        if stacks and stacks != stored.stacks:
            raise ModelError(f"{name_or_path}: stored with other layers in int8 than asked for; write it again")
        return None
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "quantization"):
            if hasattr(part, name):
                delattr(part, name)
    return Int8Config(experts, linears, source=declared, stacks=stacks or None)


def measure(model: nn.Module, architecture: Architecture | None = None) -> Coverage:
    """Count what is int8 in a loaded model, adapted or bare; an adapter's own parameters are not counted."""
    architecture, modules = architecture or describe(model), bare_modules(model)
    weights = [expert_weights(modules[layer.name]) for layer in architecture.layers]
    stacks = [stack for layer in weights for stack in (layer.up, layer.down)]
    linears = [modules[name] for name in architecture.linear_names(*LINEAR_ROLES)]
    return Coverage(
        stacks_int8=sum(stack.weight.dtype == torch.int8 for stack in stacks),
        stacks=len(stacks),
        linears_8bit=sum(linear.weight.dtype == torch.int8 for linear in linears),
        linears=len(linears),
        expert_bytes=sum(_nbytes(stack.weight) + _nbytes(stack.scale) + _nbytes(stack.step) for stack in stacks),
        expert_bytes_fp32=sum(stack.experts * stack.outputs * stack.inputs * 4 for stack in stacks),
        model_bytes=sum(_nbytes(p) for name, p in model.named_parameters() if not is_of_adapter(name)),
        stacks_stored=Counter(_kind(stack) for stack in stacks),
    )


def dequantize_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in fp32 under the stock parameter names, rounded weights multiplied out."""
    transposed = {name for layer in describe(model).layers if layer.is_transposed for name in layer.stacks}
    state = model.state_dict()
    rounded = rounded_in(state)
    beside = {key for name, keys in rounded.items() for key in keys if key != name}
    result: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name in rounded:
            result[name] = multiplied_out(state, name, is_transposed=name in transposed)
        elif name not in beside:
            result[name] = value.float() if value.is_floating_point() else value
    return result


def _kind(stack: ExpertStack) -> str:
    return stack.four_bits or ("int8" if stack.weight.dtype == torch.int8 else "float")


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _refuse_incomplete(name_or_path: str, info: dict[str, Any]) -> None:
    shapes = [f"{name} ({_shape(there)}, not {_shape(wanted)})" for name, there, wanted in info["mismatched_keys"]]
    for found, what in ((info["missing_keys"], "lacks"), (shapes, "has the wrong shape for"), (info["error_msgs"], "")):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ModelError(
                f"{name_or_path}: the checkpoint {what} {min(found)}{more}; download it again or fix config.json"
            )


def _shape(size: Any) -> str:
    return "×".join(map(str, size))
