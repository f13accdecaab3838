"""The head as a file: `mtp_head.safetensors` under the family's own key names, read back, and stitched into a base.

A native head goes back under the keys it was read from. A new one takes DeepSeek-V3's names, a decoder layer after the
model's last with `enorm`, `hnorm`, `eh_proj` and `shared_head.norm` in it, which servers with an MTP list read.

EAGLE-3, the draft format of servers for families without such a list, cannot hold this module: its one block has no
projection before attention and takes three of the model's layers. See docs/mtp.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

from toolkit.architecture import is_experts
from toolkit.errors import ModelError, first_line
from toolkit.mtp.build import new_head
from toolkit.mtp.head import MtpHead
from toolkit.mtp.native import NativeKeys, head_of, native_names
from toolkit.ops.int8 import dequantize

__all__ = ["HEAD_FILE", "config_with_head", "head_state", "merged_head_state", "read_head"]

HEAD_FILE = "mtp_head.safetensors"

_PLACES = {
    "enorm.": "enorm.",
    "hnorm.": "hnorm.",
    "eh_proj.": "eh_proj.",
    "post_norm.": "shared_head.norm.",
    "mtp_block.": "",
}


def head_state(head: MtpHead, model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The whole head under the family's key names, int8 experts multiplied out, on the CPU.

    Args:
        model: the bare model. dtype: of the tensors, the model's by default.
    """
    plain = _plain_state(head)
    names = native_names(head, model, plain) if head.native is not None else _usual_names(plain, model.config)
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
