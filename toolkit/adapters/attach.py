"""Attach LoRA to a loaded model, or an adapter from disk, and count what was reached.

PEFT targets by name and says nothing when a name matches nothing. Here the parts are enumerated first, named to PEFT,
and counted afterwards: every expert stack and every router that was asked for, or an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from toolkit.adapters.layer import ParamWrapper, register
from toolkit.adapters.layouts import PREFIX
from toolkit.adapters.older import in_own_names, spell_for_peft
from toolkit.adapters.tokens import let_fused_heads_in, require_rows, token_layers, token_targets
from toolkit.adapters.untrusted import CONFIG, check_adapter_files, read_adapter_config
from toolkit.architecture import Architecture, ExpertLayer, describe, is_of_adapter, strip_index
from toolkit.errors import ModelError, did_you_mean, first_line, machine_failed

__all__ = [
    "AdapterCoverage",
    "adapter_coverage",
    "add_adapter",
    "attach_lora",
    "load_adapter",
    "load_own_layout",
    "misfit",
    "targets",
    "unmoved_adapters",
]

_ROLES = {"none": (), "attention": ("attention",), "all-linear": ("attention", "shared", "dense")}
_DORA = ".lora_magnitude_vector.weight"
"""How a state's key ends that PEFT saves without its last part."""
_NEVER = ("selector", "fused")
"""Roles that no adapter can train, even where it is asked for by name."""


@dataclass(frozen=True)
class AdapterCoverage:
    """How many of the model's parts carry an adapter, how many adapters have moved, and trainable parameters.

    How many tokens have trained rows, and how many of those are no longer what they began as.
    """

    stacks: int
    stacks_all: int
    routers: int
    routers_all: int
    linears: int
    moved: int
    adapters: int
    parameters: int
    tokens: int = 0
    tokens_moved: int = 0

    def to_dict(self) -> dict[str, int]:
        """JSON-able."""
        return asdict(self)


def targets(
    architecture: Architecture,
    *,
    experts: bool = True,
    router: bool = True,
    target_modules: str | Sequence[str] = "attention",
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Full names of the modules and of the parameters to adapt, in PEFT's two kinds.

    Raises:
        ModelError: a name in `target_modules` matches no linear; the nearest names are given.
    """
    layers = _trainable(architecture)
    parameters = [name for layer in layers if experts for name in layer.stacks]
    modules = [layer.router for layer in layers if router and layer.router_is_linear]
    parameters += [f"{layer.router}.weight" for layer in layers if router and not layer.router_is_linear]
    if isinstance(target_modules, str):
        modules += architecture.linear_names(*_ROLES[target_modules])
    else:
        for wanted in target_modules:
            modules += _match(architecture, wanted)
    return tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(parameters))


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    experts: bool = True,
    router: bool = True,
    target_modules: str | Sequence[str] = "attention",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    new_token_ids: Sequence[int] = (),
) -> PeftModel:
    """Put a fresh adapter on every part asked for; only the adapter trains.

    Args:
        target_modules: attention, all-linear, none, or names as PEFT matches them.
        rank_pattern: rank for `experts`, `router` or a module name.
        alpha_pattern: alpha likewise.
        new_token_ids: tokens whose rows of embedding and head are trained; the rows are there (`add_rows`).

    Raises:
        ModelError: something that was asked for is not in the model, or PEFT cannot train its tokens' rows.
    """
    architecture = describe(model)
    modules, parameters = targets(architecture, experts=experts, router=router, target_modules=target_modules)
    modules, parameters = spell_for_peft(model, modules, parameters)
    names = [name for name, _ in model.named_modules()]
    stacks = [name for name, _ in model.named_parameters()]
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        target_modules=_shorten(modules, names) or None,
        target_parameters=_shorten(parameters, stacks, leaf_too=False) or None,
        rank_pattern=_patterns(rank_pattern or {}, architecture, (*modules, *parameters)),
        alpha_pattern=_patterns(alpha_pattern or {}, architecture, (*modules, *parameters)),
        trainable_token_indices=token_targets(model, new_token_ids) if new_token_ids else None,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = _wrapped(model, config)
    except ValueError as error:
        raise ModelError(f"PEFT refuses this adapter: {first_line(error)}") from None
    _assert_reached(peft_model, architecture, modules, parameters)
    return peft_model


def _wrapped(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT looks for rank_pattern keys among modules only and calls those of parameters unmatched; they do apply.
        warnings.filterwarnings("ignore", message=".*pattern keys did not match any targeted module")
        peft_model: PeftModel = get_peft_model(model, register(config))
    let_fused_heads_in(peft_model)
    return peft_model


def load_adapter(model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Put an adapter in PEFT's layout (ours or a stock one) on a loaded model.

    Raises:
        ModelError: not an adapter, made for another model, with keys missing, left over or of another shape, or with
            numbers that are not finite.
    """
    check_adapter_files(Path(folder))
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder}: not a PEFT adapter ({first_line(error)})") from None
    require_rows(model, read_adapter_config(Path(folder) / CONFIG), folder)
    try:
        config.base_model_name_or_path = None  # whatever it was called where it was trained
        tensors = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
        peft_model = _wrapped(model, in_own_names(config, model, tensors))
        if load_own_layout(peft_model, tensors):
            return _freeze(_finite(peft_model, folder), is_trainable)
        result = peft_model.load_adapter(str(folder), "default", is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if machine_failed(error):
            raise
        raise ModelError(f"{folder}: does not fit this base model: {misfit(error)}") from None
    for what, keys in (("lacks", _own(result.missing_keys)), ("has a key the model has not:", result.unexpected_keys)):
        if keys:
            raise ModelError(f"{folder}: the adapter {what} {keys[0]} ({len(keys)} in all); it is for another model")
    return _freeze(_finite(peft_model, folder), is_trainable)


def _finite(model: PeftModel, folder: str | Path) -> PeftModel:
    broken = [n for n, p in model.named_parameters() if is_of_adapter(n) and not torch.isfinite(p).all()]
    if broken:
        raise ModelError(f"{folder}: {broken[0]} is not finite ({len(broken)} in all); copy or train it again")
    return model


def add_adapter(model: PeftModel, folder: str | Path, name: str) -> None:
    """Put one more adapter on a model that has one, frozen and under its own name; `set_adapter` switches to it.

    Raises:
        ModelError: not an adapter in PEFT's layout, or made for another model.
    """
    try:
        model.add_adapter(name, register(LoraConfig.from_pretrained(str(folder))))
        file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        if file.is_file() and load_own_layout(model, load_file(file), name):
            model.requires_grad_(False)
            return
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if machine_failed(error):
            raise
        reason = misfit(error)
    else:
        reason = "its tensors have other names"
    if name in model.peft_config:
        model.delete_adapter(name)
    raise ModelError(f"{folder}: not an adapter of this model: {reason}")


def load_own_layout(model: PeftModel, tensors: Mapping[str, Tensor], name: str = "default") -> bool:
    """Load tensors whose keys are exactly this model's adapter; False, and nothing done, where they are not.

    PEFT renames every key it loads as if it came from the family's original checkpoint, and some families' patterns
    then match names that are right already, which would be lost. Where a shape is another, torch raises `RuntimeError`.
    """
    own = {key.replace(f".{name}.", "."): key for key in model.state_dict() if f".{name}." in key and ".lora_" in key}
    own = {saved.removesuffix(".weight") if saved.endswith(_DORA) else saved: key for saved, key in own.items()}
    own |= {key.removesuffix(f".{name}"): key for key in _token_rows(model, name)}
    if own.keys() != tensors.keys():
        return False
    model.load_state_dict({own[key]: tensor for key, tensor in tensors.items()}, strict=False)
    return True


def _token_rows(model: PeftModel, name: str) -> list[str]:
    """The state's keys of tokens' rows; a head that is tied shares those of the embedding, and has none."""
    layers = ((path, layer) for path, layer in token_layers(model) if layer.tied_adapter is None)
    return [f"{path}.trainable_tokens_delta.{name}" for path, layer in layers if name in layer.trainable_tokens_delta]


def misfit(error: BaseException) -> str:
    """What a library says of tensors that do not fit: torch names the first of them in the second line."""
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch for" in line]
    return lines[0].replace("copying a param with shape ", "").rstrip(".") if lines else first_line(error)


def _freeze(model: PeftModel, is_trainable: bool) -> PeftModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable and is_of_adapter(name))
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.keeps_factors = not is_trainable
    return model


def adapter_coverage(model: PeftModel) -> AdapterCoverage:
    """Count adapted parts; an adapter has moved when its B is no longer all zero."""
    layers = {_base_name(name): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    architecture = describe(model.get_base_model())
    stacks = {name for layer in _trainable(architecture) for name in layer.stacks}
    routers = {layer.router for layer in _trainable(architecture)}
    reached = [_part_name(name, module) for name, module in layers.items()]
    moved = [each for of_layer in _moved(layers).values() for each in of_layer]
    tokens, tokens_moved = _tokens(model)
    return AdapterCoverage(
        stacks=sum(name in stacks for name in reached),
        stacks_all=len(stacks),
        routers=sum(name in routers for name in reached),
        routers_all=len(routers),
        linears=sum(name not in stacks and name not in routers for name in reached),
        moved=sum(moved),
        adapters=len(moved),
        parameters=sum(p.numel() for n, p in model.named_parameters() if is_of_adapter(n)),
        tokens=tokens,
        tokens_moved=tokens_moved,
    )


def _tokens(model: PeftModel) -> tuple[int, int]:
    """Tokens with trained rows, and those of them whose row of the embedding has moved."""
    embedding = next((layer for _, layer in token_layers(model)), None)
    if embedding is None:
        return 0, 0
    name = next(iter(embedding.trainable_tokens_delta))
    rows, began = embedding.trainable_tokens_delta[name].detach(), embedding.trainable_tokens_original[name]
    return len(rows), int((rows.to(began.dtype) != began).any(1).sum())


def unmoved_adapters(model: PeftModel) -> list[str]:
    """The adapted parts whose B is still all zero, by name."""
    layers = {_base_name(name): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    return [_part_name(name, layers[name]) for name, moved in _moved(layers).items() if not any(moved)]


def _moved(layers: Mapping[str, LoraLayer]) -> dict[str, list[bool]]:
    """Of each layer's Bs whether they are anything but zero; a card is waited for once."""
    counts = [B.weight.detach().count_nonzero() for layer in layers.values() for B in layer.lora_B.values()]
    found = iter(torch.stack(counts).bool().tolist() if counts else [])
    return {name: [next(found) for _ in layer.lora_B] for name, layer in layers.items()}


def _trainable(architecture: Architecture) -> list[ExpertLayer]:
    return [layer for layer in architecture.layers if layer.sees_text]


def _match(architecture: Architecture, wanted: str) -> list[str]:
    names = [linear.name for linear in architecture.linears if linear.role not in _NEVER]
    found = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if not found:
        known = sorted({strip_index(name) for name in names} | {name.rpartition(".")[2] for name in names})
        hint = did_you_mean(wanted, known, most=3) or f"; known: {', '.join(known[:8])}"
        raise ModelError(f"lora.target_modules: {wanted} matches no linear layer of this model{hint}")
    return found


def _shorten(wanted: Sequence[str], every: Sequence[str], *, leaf_too: bool = True) -> list[str]:
    """Suffixes (`q_proj`, `mlp.experts.down_proj`) in place of full names where they mean exactly the same parts."""
    short: list[str] = []
    chosen = set(wanted)
    for name in wanted:
        suffix = strip_index(name)
        for candidate in (suffix.rpartition(".")[2], suffix) if leaf_too else (suffix,):
            if {n for n in every if n == candidate or n.endswith(f".{candidate}")} <= chosen:
                short.append(candidate)
                break
        else:
            short.append(name)
    return sorted(dict.fromkeys(short))


def _patterns(pattern: Mapping[str, Any], architecture: Architecture, wanted: Sequence[str]) -> dict[str, Any]:
    """Part words to the names PEFT matches; a name that matches nothing is an error."""
    parts = {
        "experts": {strip_index(name) for layer in _trainable(architecture) for name in layer.stacks},
        "router": {
            strip_index(layer.router if layer.router_is_linear else f"{layer.router}.weight")
            for layer in _trainable(architecture)
        },
    }
    result: dict[str, Any] = {}
    for key, value in pattern.items():
        names = sorted(parts.get(key, {key}))
        for name in names:
            if not any(w == name or w.endswith(f".{name}") for w in wanted):
                if key in parts:
                    raise ModelError(f"lora.rank_pattern/alpha_pattern: {key}: not adapted here; remove the line")
                near = did_you_mean(key, ["experts", "router", *sorted({strip_index(w) for w in wanted})], most=3)
                raise ModelError(f"lora.rank_pattern/alpha_pattern: {key} is not adapted in this model{near}")
            result[name] = value
    return result


def _assert_reached(
    model: PeftModel, architecture: Architecture, modules: Sequence[str], parameters: Sequence[str]
) -> None:
    layers = {_part_name(_base_name(n), m) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if lost := [name for name in (*modules, *parameters) if name.removesuffix(".weight") not in layers]:
        raise ModelError(
            f"{lost[0]}: PEFT did not adapt it ({len(lost)} of {len(modules) + len(parameters)} parts lost)"
        )


def _base_name(name: str) -> str:
    return name.removeprefix(PREFIX)


def _part_name(name: str, module: nn.Module) -> str:
    """What a LoRA layer adapts: the module's path, and the stack's name where it adapts a stack."""
    path = name.replace(".base_layer", "")
    parameter = getattr(module, "parameter_name", "weight")
    return path if parameter == "weight" else f"{path}.{parameter}"


def _own(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if is_of_adapter(key)]
