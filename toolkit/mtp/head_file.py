"""Heads in files: those that checkpoints carry, and `mtp_head.safetensors`, under the family's own key names.

transformers leaves these keys out when it loads a model, and `MtpModel.from_pretrained` reads them only for families
whose config says how many there are. Here the checkpoint's own keys are looked at; what each is called is kept, so that
a trained native head goes back under the same names. A new one takes DeepSeek-V3's names, a decoder layer after the
model's last with `enorm`, `hnorm`, `eh_proj` and `shared_head.norm` in it, which servers with an MTP list read.

EAGLE-3, the draft format of servers for families without such a list, cannot hold this module: its one block has no
projection before attention and takes three of the model's layers. See docs/mtp.md.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_layers import MtpModel
from transformers.modeling_utils import LoadStateDictConfig

from toolkit.architecture import expert_parameters, is_experts
from toolkit.checkpoint.config import quantised_as
from toolkit.checkpoint.conversion import Shards
from toolkit.checkpoint.files import METHOD, headers_in
from toolkit.checkpoint.remote import fetch
from toolkit.checkpoint.weights import Unread
from toolkit.errors import ModelError, first_line
from toolkit.families import MTP_LAYOUTS, MTP_WITHOUT_END_NORM
from toolkit.mtp.build import new_head
from toolkit.mtp.head import MtpHead
from toolkit.ops import DEFAULT_BACKEND
from toolkit.ops.int8 import dequantize, quantize

__all__ = [
    "HEAD_FILE",
    "NativeKeys",
    "config_with_head",
    "head_of",
    "head_state",
    "load_native",
    "merged_head_state",
    "native_keys",
    "prepared",
    "read_head",
]

HEAD_FILE = "mtp_head.safetensors"

_PLACES = {
    "enorm.": "enorm.",
    "hnorm.": "hnorm.",
    "eh_proj.": "eh_proj.",
    "post_norm.": "shared_head.norm.",
    "mtp_block.": "",
}


@dataclass(frozen=True)
class NativeKeys:
    """A head's keys in a checkpoint: each key's file, and the number of layers.

    `source` is the quantization_config of a checkpoint that others quantised, whose keys are those of the plain one.
    """

    files: Mapping[str, Path]
    layers: int
    source: Mapping[str, Any] | None = None


def native_keys(folder: str | Path, config: PretrainedConfig, *, revision: str = "main") -> NativeKeys | None:
    """The keys of the head in a checkpoint, or None where there is none. Reads the shards' headers.

    Raises:
        ModelError: a shard is damaged. HubError: the checkpoint cannot be downloaded.
    """
    text = config.get_text_config()
    where = fetch(str(folder), revision)
    source = None if quantised_as(where) == METHOD else _source(config)
    headers = headers_in(where)
    pattern = re.compile(_pattern(text.num_hidden_layers, headers))
    files = {key: tensor.path for key, tensor in headers.items() if pattern.search(key)}
    if files and source is not None:
        with Shards(str(folder), where, source) as shards:
            plain = [key for key in shards.keys if pattern.search(key)]
        files = {key: files.get(key, next(iter(files.values())).parent) for key in plain}
    if not files:
        return None
    declared = getattr(text, "num_mtp_layers", None) or getattr(text, "mtp_num_hidden_layers", None)
    found = {int(match[1]) for key in files if (match := re.search(r"(?:layers|mtp\w*)\.(\d+)\.", key))}
    return NativeKeys(files, min(int(declared or len(found) or 1), max(1, len(found))), source)


def _source(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """How others quantised the checkpoint of a config, loaded or read; None where they did not."""
    declared = getattr(config, "quantization_config", None) or {}
    told = dict(declared) if isinstance(declared, Mapping) else declared.to_dict()
    source = told.get("source") if told.get("quant_method") == METHOD else told
    return source or None


def load_native(model: PreTrainedModel, keys: NativeKeys) -> MtpHead:
    """The base checkpoint's own head in fp32, its experts in int8 and frozen, on the model's device.

    Raises:
        ModelError: the checkpoint lacks a tensor of it, or the family's head cannot be built.
    """
    if keys.source is not None:
        folder = next(path if path.is_dir() else path.parent for path in keys.files.values())
        with Shards(model.config.name_or_path, folder, keys.source) as shards:
            slices = {key: shards.slice(key) for key in keys.files}
            read = {key: each.read() if isinstance(each, Unread) else each[...] for key, each in slices.items()}
        return head_of(model, keys, read)
    opened = {path: safe_open(path, framework="pt") for path in set(keys.files.values())}
    return head_of(model, keys, {key: opened[path].get_tensor(key) for key, path in keys.files.items()})


def head_of(model: PreTrainedModel, keys: NativeKeys, tensors: Mapping[str, torch.Tensor]) -> MtpHead:
    """As `load_native`, from tensors under the checkpoint's key names."""
    try:
        made, mapping = _skeleton(model, keys)
        _read(made, mapping, tensors)
    except (ValueError, AttributeError, TypeError, RuntimeError, KeyError, StopIteration) as error:
        raise ModelError(
            f"{model.config.name_or_path}: its multi-token-prediction head cannot be loaded: {first_line(error)}; set "
            "mtp.enabled=false"
        ) from None
    if not str(made.config._experts_implementation).startswith("onecard_"):
        made.config._experts_implementation = DEFAULT_BACKEND
    head = MtpHead(list(made.layers), made.config, getattr(made, "shared_post_norm", None))
    head.native = keys
    head.to(model.get_input_embeddings().weight.device).float().requires_grad_(True)
    for module in head.modules():
        if is_experts(module):
            _to_int8(module)
    return head


def _native_names(head: MtpHead, model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head's tensors under the key names that they were read from.

    Every key of the checkpoint is asked which parameter it became; where several became one (experts), transformers'
    own conversions are run backwards.
    """
    assert head.native is not None
    made, mapping = _skeleton(model, head.native, meta=True)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, torch.Tensor] = {}
    made_of: dict[str, dict[str, list[str]]] = {}
    for key in sorted(head.native.files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, made.base_model_prefix, made.state_dict())
        if pattern is None and name in state:
            found[key] = state[name]
        elif pattern is not None:
            made_of.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, sources in made_of.items():
        converter = next(entry for entry in converters if next(iter(sources)) in entry.source_patterns)
        found |= _taken_apart(converter, name, state[name], sources)
    return found


def _taken_apart(
    converter: WeightConverter, name: str, tensor: torch.Tensor, sources: Mapping[str, list[str]]
) -> dict[str, torch.Tensor]:
    """What `converter` had merged into one tensor, under the keys it had."""
    back = converter.reverse_transform()
    parts: Any = {back.source_patterns[0]: tensor}
    for operation in back.operations:
        parts = operation.convert(
            parts, source_patterns=back.source_patterns, target_patterns=back.target_patterns, full_layer_name=name
        )
    result: dict[str, torch.Tensor] = {}
    for pattern, keys in sources.items():
        index = converter.source_patterns.index(pattern)
        named = [part for target, part in parts.items() if _belongs(target, back.target_patterns[index])]
        flat = [piece for part in named for piece in (part if isinstance(part, list) else [part])]
        result |= dict(zip(keys, flat, strict=True))
    return result


def _belongs(name: str, pattern: str) -> bool:
    return (
        re.fullmatch(r"\d+".join(map(re.escape, pattern.strip("^$").split("*"))), name) is not None or name == pattern
    )


class _StandIn:
    """A model as `MtpModel` looks at it, with a config that tells of the head: the model's own is left as it is."""

    def __init__(self, model: PreTrainedModel, config: PretrainedConfig) -> None:
        self.config = config
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _pattern(num_hidden_layers: int, keys: Iterable[str]) -> str:
    """Keys of a head: under a name of its own, or as a layer after the decoder's last.

    `keys` are those of the checkpoint: towers for images and sound may have more layers than the decoder, which is what
    has experts.
    """
    layers = [found for found in map(re.compile(r"^(.*?)\blayers\.\d+\.(.*)").match, keys) if found]
    decoders = {found[1] for found in layers if "experts." in found[2]} or {found[1] for found in layers}
    numbers = "|".join(str(num_hidden_layers + index) for index in range(8))
    beyond = rf"^(?:{'|'.join(map(re.escape, sorted(decoders)))})layers\.(?:{numbers})\."
    return rf"(?:^|\.)mtp\w*\.|{beyond}"


def prepared(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy that tells `get_mtp_config` of the head; full attention and experts where the config says nothing."""
    prepared = copy.deepcopy(config)
    text = prepared.get_text_config()
    if getattr(text, "num_mtp_layers", None) != layers:
        text.num_mtp_layers = layers
    for name, usual in (("layer_types", "full_attention"), ("mlp_layer_types", "sparse")):
        if getattr(text, name, None) is not None and getattr(text, f"mtp_{name}", None) is None:
            setattr(text, f"mtp_{name}", [usual] * layers)
    return prepared


def _skeleton(model: PreTrainedModel, keys: NativeKeys, *, meta: bool = False) -> tuple[MtpModel, list[Any]]:
    """An empty head, and what maps the checkpoint's keys onto it: rows of ours first, then transformers' own."""
    config = prepared(model.config, keys.layers)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        made = MtpModel(_StandIn(model, config), keys.layers)
    count = config.get_text_config().num_hidden_layers
    own = [WeightRenaming(source, target) for source, target in MTP_LAYOUTS]
    numbered = [WeightRenaming(f"layers.{count + i}.", f"layers.{i}.mtp_block.") for i in range(keys.layers)]
    family = get_model_conversion_mapping(model, add_legacy=True)
    return made, [*own, *numbered, *get_model_conversion_mapping(made, add_legacy=False), *family]


def _read(made: MtpModel, mapping: list[Any], tensors: Mapping[str, torch.Tensor]) -> None:
    info, _ = convert_and_load_state_dict_in_model(
        model=made,
        state_dict=dict(tensors),
        load_config=LoadStateDictConfig(weight_mapping=mapping, device_map={"": "cpu"}, dtype=torch.float32),
    )
    shared = ("embed_tokens.", "shared_head.", "rotary_emb.")
    missing = sorted(key for key in info.missing_keys if not key.startswith(shared))
    ends = [f"layers.{index}.post_norm.weight" for index in range(len(made.layers))]
    if missing == ends and any(map(MTP_WITHOUT_END_NORM.match, tensors)):
        for layer in made.layers:
            layer.post_norm = nn.Identity()
    elif missing:
        raise ValueError(f"the checkpoint lacks {missing[0]} ({len(missing)} in all)")


def _to_int8(experts: nn.Module) -> None:
    """Expert stacks to int8 with their scales, as `load_int8` stores them; frozen."""
    for name in expert_parameters(experts):
        weight = getattr(experts, name)
        stored, scale = quantize(weight.detach(), -2 if experts.is_transposed else -1)
        setattr(experts, name, nn.Parameter(stored, requires_grad=False))
        experts.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))
    experts.requires_grad_(False)


def head_state(head: MtpHead, model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The whole head under the family's key names, int8 experts multiplied out, on the CPU.

    Args:
        model: the bare model. dtype: of the tensors, the model's by default.
    """
    plain = _plain_state(head)
    names = _native_names(head, model, plain) if head.native is not None else _usual_names(plain, model.config)
    dtype = dtype or model.dtype
    return {name: tensor.to("cpu", dtype, copy=True).contiguous() for name, tensor in names.items()}


def merged_head_state(folder: str | Path, *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The head's tensors of an artifact, to be written beside a merged base's own; empty where it has none.

    Their keys replace those of the same name in the base. `config_with_head` gives what config.json must say then.

    Raises:
        ModelError: the file is damaged.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        return {}
    state = _load(path)
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in state.items()}


def config_with_head(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A config.json that declares `layers` of a head; 0 says that there is none, which servers otherwise look for.

    Servers read one name of the number, transformers another; a family's own third one is kept in step.
    """
    known = [
        "num_nextn_predict_layers",
        "num_mtp_layers",
        *(["mtp_num_hidden_layers"] * ("mtp_num_hidden_layers" in config)),
    ]
    kinds = {"layer_types": "full_attention", "mlp_layer_types": "sparse"} if layers else {}
    told = {f"mtp_{field}": [kind] * layers for field, kind in kinds.items() if config.get(field)}
    said = {key: value for key, value in config.items() if value is not None or key not in told}
    return {**told, **said, **dict.fromkeys(known, layers)}


def read_head(folder: str | Path, model: PreTrainedModel, native: NativeKeys | None) -> MtpHead:
    """The head of an artifact, on a bare loaded model.

    Args:
        native: the base checkpoint's own head's keys, where it has one.

    Raises:
        ModelError: there is no head, the file is damaged, or it is the head of another base.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: has no {HEAD_FILE}: it was trained with mtp.enabled=false")
    state = _load(path)
    try:
        if native is not None and set(state) <= set(native.files):
            head = head_of(model, native, state)
        else:
            head = _new_from(state, model)
    except (ModelError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: is not a head of this base: {first_line(error)}") from None
    return head.to(model.get_input_embeddings().weight.device, model.dtype).eval()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged ({first_line(error)}); copy or download the artifact again") from None
    return state


def _new_from(state: Mapping[str, torch.Tensor], model: PreTrainedModel) -> MtpHead:
    count = model.config.get_text_config().num_hidden_layers
    own: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            raise ModelError(f"has a key {name!r}")
        rest = match[2]
        place = next((ours for ours, theirs in _PLACES.items() if theirs and rest.startswith(theirs)), "mtp_block.")
        own[f"layers.{int(match[1]) - count}.{place}{rest.removeprefix(_PLACES[place])}"] = tensor
    head = new_head(model, num_mtp_layers=1 + max(int(name.split(".")[1]) for name in own))
    wanted = head.state_dict()
    if lost := sorted(wanted.keys() ^ own.keys()):
        raise ModelError(f"{'lacks' if lost[0] in wanted else 'has'} {lost[0]} ({len(lost)} keys differ)")
    head.load_state_dict(own)
    return head


def _plain_state(head: MtpHead) -> dict[str, torch.Tensor]:
    """Under the names of `MtpModel`, int8 multiplied out."""
    transposed = {name for name, module in head.named_modules() if is_experts(module) and module.is_transposed}
    state = {name.replace("shared_norm.", "shared_post_norm."): tensor for name, tensor in head.state_dict().items()}
    scales = {f"{name}_scale" for name, tensor in state.items() if tensor.dtype == torch.int8}
    return {
        name: dequantize(tensor, state[f"{name}_scale"], -2 if name.rpartition(".")[0] in transposed else -1)
        if f"{name}_scale" in scales
        else tensor.detach()
        for name, tensor in state.items()
        if name not in scales
    }


def _usual_names(state: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    count = config.get_text_config().num_hidden_layers
    named = {}
    for name, tensor in state.items():
        _, index, rest = name.split(".", 2)
        place = next(ours for ours in _PLACES if rest.startswith(ours))
        named[f"model.layers.{count + int(index)}.{_PLACES[place]}{rest.removeprefix(place)}"] = tensor
    return named
