"""Put a loaded model's expert stacks behind a stream: the parameters keep their names and shapes, but not their bytes.

An experts module asks its `StreamedStacks` for the weights in forward and again in backward (`quant.experts.SOURCE`);
nothing is patched, and autograd never saves a slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from toolkit.architecture import ExpertLayer, bare_modules, describe
from toolkit.errors import ModelError, RecipeError
from toolkit.offload.cache import int8_folder
from toolkit.offload.place import streamed
from toolkit.offload.store import FromFiles, HostArena, Layout, Staged
from toolkit.offload.stream import ExpertStream
from toolkit.ops.experts import SOURCE, ExpertWeights
from toolkit.quant import Coverage, load_int8

__all__ = ["StreamedStacks", "load_streamed", "stream_experts", "stream_of"]


class StreamedStacks:
    """Where one experts module gets its int8 stacks from."""

    def __init__(self, stream: ExpertStream, layer: str, layout: Layout) -> None:
        self.stream, self.layer = stream, layer
        self._layout = layout

    @contextmanager
    def present(self, weights: ExpertWeights, index_TK: torch.Tensor, *, trains: bool) -> Iterator[ExpertWeights]:
        """`weights` with both stacks filled in, for the block; of the experts in `index_TK` at least."""
        with self.stream.present(self.layer, self._experts_to_read(index_TK, trains), trains=trains) as image:
            up, down = self._layout.views(image)
            yield replace(weights, up=replace(weights.up, weight=up), down=replace(weights.down, weight=down))

    def _experts_to_read(self, index_TK: torch.Tensor, trains: bool) -> list[int] | None:
        """The experts hit, where they are so few that reading just those pays; None for all."""
        if trains or 2 * index_TK.numel() > self._layout.up[0]:
            return None
        return [expert for expert in index_TK.unique().tolist() if expert < self._layout.up[0]]


def load_streamed(
    name_or_path: str,
    placement: Mapping[str, str],
    *,
    revision: str = "main",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cache: Path | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Coverage]:
    """As `quant.load_int8`, with the expert stacks that `placement` streams left where they are.

    A checkpoint that is not int8 is written in int8 first, once. No streamed stack is ever in anonymous memory whole,
    but for those that `placement` puts into host memory beside a card.

    Args:
        placement: MoE layer to resident, host or disk. cache: folder of int8 files. options: to `load_int8`.

    Raises:
        RecipeError: it is to be stored otherwise than in int8, or no layer is streamed. ResourceError, ModelError,
            HubError: as the parts say.
    """
    experts, linears = options.get("experts", "int8"), options.get("linears", "int8")
    if experts == "none" or linears != "int8":
        part, kind = ("experts", experts) if experts == "none" else ("linears", linears)
        raise RecipeError(f"placement.experts: streaming reads an int8 file; set quantization.{part}=int8, not {kind}")
    if not streamed(placement):
        raise RecipeError("placement.experts: no layer is streamed; load it with quant.load_int8")
    stacks = options.get("stacks")
    folder = int8_folder(name_or_path, revision=revision, dtype=dtype, experts=experts, stacks=stacks, root=cache)
    model, coverage = load_int8(str(folder), dtype=dtype, device="cpu", **options)
    stream_experts(model, placement, folder, torch.device(device))
    model.name_or_path = model.config._name_or_path = name_or_path
    return model, coverage


def stream_experts(
    model: PreTrainedModel, placement: Mapping[str, str], folder: Path, device: torch.device
) -> ExpertStream:
    """Stream the stacks of a bare model from the int8 checkpoint it was mapped from; the rest goes to `device`.

    On a CPU `host` is the same as `disk`: the file is what lies outside of anonymous memory.

    Raises:
        ModelError: a layer is not in the model, or not in int8 in the files.
    """
    wanted = streamed(placement)
    layers = {layer.name: layer for layer in describe(model).layers}
    if lost := [name for name in wanted if name not in layers]:
        raise ModelError(f"{lost[0]}: no MoE layer of this model, so it cannot be streamed")
    files = FromFiles(folder, {name: layers[name].stacks for name in layers if name in wanted})
    sizes = {name: layout.bytes for name, layout in files.layouts.items()}
    filler = files if device.type == "cpu" else Staged(files, _arena(files, placement), device)
    stream = ExpertStream(sizes, filler, device)
    for name, layout in files.layouts.items():
        module = model.get_submodule(name)
        _register_placeholders(module, layers[name], layout, device)
        module.__dict__[SOURCE] = StreamedStacks(stream, name, layout)
        module.register_state_dict_post_hook(_Stored(folder, files, layers[name]))
    if device.type != "cpu":
        model.to(device)
        model.hf_device_map = {"": device}
    return stream


def stream_of(model: nn.Module) -> ExpertStream | None:
    """What streams this model's experts, adapted or bare; None where all are resident."""
    sources = (module.__dict__.get(SOURCE) for module in bare_modules(model).values())
    return next((source.stream for source in sources if source is not None), None)


def _arena(files: FromFiles, placement: Mapping[str, str]) -> HostArena:
    return HostArena(files, [layer for layer in files.layouts if placement[layer] == "host"])


def _register_placeholders(module: nn.Module, layer: ExpertLayer, layout: Layout, device: torch.device) -> None:
    """One byte that looks like a whole stack: PEFT and accelerate read shapes, dtypes and devices off parameters."""
    for name, shape, dtype in zip((layer.up, layer.down), (layout.up, layout.down), layout.dtypes, strict=True):
        if tuple(getattr(module, name).shape) != shape:
            raise ModelError(f"{layer.name}.{name}: the file holds another shape than the model; write it again")
        placeholder = torch.zeros((), dtype=dtype, device=device).expand(shape)
        module.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))


class _Stored:
    """State dicts of a streamed module hold the stacks themselves, mapped from the file."""

    def __init__(self, folder: Path, files: FromFiles, layer: ExpertLayer) -> None:
        self._paths = [(piece.path, name) for piece, name in zip(files.pieces(layer.name), layer.stacks, strict=True)]
        self._leaves: Sequence[str] = (layer.up, layer.down)

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
        for (path, name), leaf in zip(self._paths, self._leaves, strict=True):
            with safe_open(path, framework="pt") as file:
                state[f"{prefix}{leaf}"] = file.get_tensor(name)
