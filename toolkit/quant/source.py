"""The weights of a checkpoint as they were before rounding, one decoder layer at a time.

`from_pretrained` loads whole models. Here transformers' own key conversion (fused experts, renamed prefixes) runs on
the few keys of one layer, sliced lazily from the safetensors files and multiplied out where they are quantised, into a
skeleton that is otherwise on meta.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from toolkit.architecture import on_meta
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.conversion import every_target
from toolkit.checkpoint.files import METHOD, declared_format
from toolkit.checkpoint.remote import fetch
from toolkit.checkpoint.stacks import plain_weights
from toolkit.checkpoint.unused import plain_tensor, unused
from toolkit.checkpoint.weights import unread
from toolkit.errors import ModelError, first_line, machine_failed
from toolkit.quant.load import storage
from toolkit.quant.ours import own_weights
from toolkit.quant.quantizer import Int8Config, Int8Quantizer
from toolkit.quant.rounding import first_failure

__all__ = ["SourceWeights"]


_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


class SourceWeights:
    """Reads a checkpoint layer by layer; the weights of at most one layer are alive, in the dtype of the files.

    Args:
        model_of: makes `model`, which the layers are read into, of a config; its parameters are on meta.
        also_ours: read a checkpoint of onecard's own, too, whose weights were rounded before.

    Raises:
        ModelError: no safetensors there, or they are int8 already.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        revision: str = "main",
        model_of: Callable[[PretrainedConfig], PreTrainedModel] = on_meta,
        also_ours: bool = False,
    ) -> None:
        self.name = name_or_path
        config = read_config(name_or_path, revision)
        said = declared_format(name_or_path, config) or {}
        declared = said.get("quant_method")
        if declared == METHOD and also_ours:
            self.model = model_of(config)
            self._quantizer: Int8Quantizer | None = _keeps_floats(self.model)
            self._mapping: list[Any] = []
            self._slices: dict[str, Any] = dict(own_weights(fetch(name_or_path, revision), self.model))
            self._targets: dict[str, tuple[str, ...]] = {key: (key,) for key in self._slices}
            self._split: dict[str, tuple[str, ...]] = {}
            return
        wanted = None if declared == METHOD else storage(name_or_path, config)
        if wanted is None:
            raise ModelError(
                f"{name_or_path}: {said.get('experts', 'int8')} already, so its original weights are not there to "
                "compensate for; take the checkpoint it was made from, or set quantization.error_compensation=none"
            )
        self.model = model_of(config)
        self._quantizer = _keeps_floats(self.model) if wanted.source is not None else None
        self._mapping = get_model_conversion_mapping(self.model, hf_quantizer=self._quantizer)
        self._slices = plain_weights(name_or_path, fetch(name_or_path, revision), wanted.source, self.model)
        self._targets = every_target(self.model, self._mapping, self._slices)
        self._split = {key: names for key, names in self._targets.items() if len(names) > 1}

    @contextmanager
    def layer(self, name: str) -> Iterator[dict[str, torch.Tensor]]:
        """What is stored under module `name`, by full names, on the CPU, freed when the block ends.

        Raises:
            ModelError: a tensor is missing, has another shape than the config says, or cannot be read.
        """
        prefix, beside = f"{name}.", dict[str, torch.nn.Module]()
        wanted = {key: self._slices[key] for key, names in self._targets.items() if names[0].startswith(prefix)}
        for key, names in self._split.items():
            if any(target.startswith(prefix) for target in names):
                wanted[key] = self._slices[key]
                owners = (target.rpartition(".")[0] for target in names if not target.startswith(prefix))
                beside |= {owner: self.model.get_submodule(owner) for owner in owners}
        module = self.model.get_submodule(name)
        for each in (module, *beside.values()):
            each.to(_dtype(wanted))
        try:
            self._read(name, wanted)
            yield dict(module.state_dict(prefix=f"{name}."))
        finally:
            for each in (module, *beside.values()):
                each.to("meta")

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Every decoder layer and every module outside of them, in the files' order, and what is stored of each."""
        known, found = self.model.state_dict(), dict[str, list[str]]()
        for target in dict.fromkeys(chain.from_iterable(self._targets.values())):
            if target in known:
                layer = re.match(r".+?\.\d+(?=\.)", target)
                found.setdefault(layer[0] if layer else target.rpartition(".")[0], []).append(target)
        return {name: tuple(targets) for name, targets in found.items()}

    def unused(self) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
        """What is no parameter of the model, by layer, and what else is left out: names in the files, as `unused`."""
        first = {key: names[0] for key, names in self._targets.items()}
        return unused(first, self.model.state_dict().keys())

    def plain(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by their names in the files, as `plain_tensor`."""
        return {key: plain_tensor(self._slices[key]) for key in keys}

    def stored_as(self, parameter: str) -> set[str]:
        """The dtypes, as safetensors calls them, of the tensors that a parameter is made of, in the files."""
        return {str(self._slices[key].get_dtype()) for key, names in self._targets.items() if parameter in names}

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The coarsest dtype of the tensors that a parameter is made of, in the files."""
        found = self.stored_as(parameter)
        return max((_HALF.get(name, torch.float32) for name in found), key=lambda dtype: torch.finfo(dtype).eps)

    def bits(self, parameter: str) -> float:
        """Of a value in the files, scales included: 4.5, or 16."""
        found = [unread(self._slices[key]) for key, names in self._targets.items() if parameter in names]
        return 8 * sum(part.nbytes for part in found) / sum(part.shape.numel() for part in found)

    def _read(self, name: str, slices: dict[str, Any]) -> None:
        config = LoadStateDictConfig(
            weight_mapping=self._mapping, device_map={"": "cpu"}, dtype=torch.float32, hf_quantizer=self._quantizer
        )
        try:
            with first_failure():
                info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            if machine_failed(error):
                raise
            raise ModelError(f"{self.name}: {name}: {first_line(error)}; download the checkpoint again") from None
        missing = sorted(key for key in info.missing_keys if key.startswith(f"{name}."))
        if bad := [*missing, *(key for key, *_ in info.mismatched_keys), *info.conversion_errors]:
            raise ModelError(f"{self.name}: cannot read {bad[0]} as its config says; download the checkpoint again")


def _keeps_floats(model: PreTrainedModel) -> Int8Quantizer:
    """What reads packed weights inside a family's conversions and leaves them floats."""
    quantizer = Int8Quantizer(Int8Config("none", "none"), pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=torch.float32)
    return quantizer


def _dtype(slices: Mapping[str, Any]) -> torch.dtype:
    """What holds every tensor of the files without loss."""
    found = {str(part.get_dtype()) for part in slices.values()}
    return _HALF.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
