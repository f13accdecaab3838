"""Which tensors of a GGUF file each parameter of a model is made of, and what llama.cpp's converter did to them.

Names come from the `gguf` library's own table, by the names that parameters have in the model and in its original
checkpoint. What that table lacks is told by a parameter's role: expert stacks, routers, latent attention. What the
converter changes is undone here; facts about single architectures are rows of `toolkit/architecture.py`.
Source of both: `conversion/` of llama.cpp (in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from toolkit.architecture import describe
from toolkit.checkpoint.formats.gguf_file import GgufFile, Stored, library
from toolkit.checkpoint.formats.gguf_undo import (
    Numbers,
    ValueHeads,
    can_multiply_out,
    gate_and_up,
    halves,
    latent,
    multiply_out,
    stack,
)
from toolkit.checkpoint.formats.packed import Packed, Part, Tensors
from toolkit.errors import ModelError
from toolkit.families import GGUF_NORMS_FROM_ONE, GGUF_ROTATED_IN_PAIRS, GGUF_TILED_VALUE_HEADS

__all__ = ["CHOOSING", "FROM_ONE", "TILED", "name_table", "original_names", "parameters", "rotated_heads", "spellings"]


_EACH = Fraction(1)


@dataclass(frozen=True)
class _Recipe:
    """Tensors by a name for each, and how their fp32 rows become those of the parameter.

    `rows` are those of the parameter for one element of dimension 0 of every tensor; None where all are needed at once.
    """

    tensors: Mapping[str, Stored]
    make: Callable[[Numbers], torch.Tensor]
    rows: Fraction | None = _EACH
    is_as_stored: bool = False


def parameters(file: GgufFile, model: PreTrainedModel) -> tuple[dict[str, Packed], dict[str, str]]:
    """Every parameter and saved buffer of `model` (on meta), by its own name; tied ones are left out.

    Also the tensors' names of those that are stored just as they are, as floating-point numbers.

    Raises:
        ModelError: an architecture that `gguf` does not know, a parameter without tensors or of another shape, a block
            type that `gguf` cannot multiply out, or a tensor that no parameter takes.
    """
    finder = _Finder(file, model)
    found, plain = {}, {}
    for name, shape in finder.wanted.items():
        recipe = finder.recipe(name)
        if recipe is None:
            raise ModelError(
                f"{finder.where}: no tensor for {name}; the file is no whole {model.config.model_type}, or the gguf "
                "library has another name for that part: give the original checkpoint"
            )
        found[name] = _packed(name, shape, recipe, finder)
        if recipe.is_as_stored and (only := recipe.tensors["it"]).is_plain:
            plain[name] = only.name
    if left := sorted(file.tensors.keys() - finder.used - finder.passed_over):
        raise ModelError(
            f"{finder.where}: {left[0]} (and {len(left) - 1} other tensors) belong to no part of a "
            f"{model.config.model_type}; give the original checkpoint"
        )
    return found, plain


class _Finder:
    """Finds a parameter's tensors, and remembers which were taken."""

    def __init__(self, file: GgufFile, model: PreTrainedModel) -> None:
        self.file, self.model, self.used = file, model, set[str]()
        self.where = str(file.files[0])
        self.config = model.config.get_text_config()
        self.architecture = str(file.metadata.get("general.architecture"))
        self.layers = describe(model).layers
        tied = set(model.all_tied_weights_keys or {})
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        self.wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.original = original_names(model)
        self.table = name_table(self.architecture, self.where)
        is_over = re.compile(_PASSED_OVER + (r"|^output\.weight$" if "lm_head.weight" in tied else ""))
        self.passed_over = {name for name in file.tensors if is_over.search(name)} | set(self._drafts())

    def _drafts(self) -> Iterator[str]:
        """Tensors of the layers that the file itself says are for drafts, behind the model's own."""
        counts = (
            self.file.metadata.get(f"{self.architecture}.{key}") for key in ("block_count", "nextn_predict_layers")
        )
        count, drafts = (value if isinstance(value, int) else 0 for value in counts)
        for name in self.file.tensors:
            match = re.match(r"blk\.(\d{1,4})\.", name)
            if match and max(self.config.num_hidden_layers, count - drafts) <= int(match[1]) < count:
                yield name

    def recipe(self, name: str) -> _Recipe | None:
        """How `name` is made of the file's tensors; None where they are not all there."""
        ways = (self._experts, self._router, self._latent, self._linear_attention, self._simple, self._fused, self._cut)
        return next((recipe for way in ways if (recipe := way(name)) is not None), None)

    def _take(self, layer: str | None, *, is_shared: bool = False, **leaves: str) -> dict[str, Stored] | None:
        """Tensors by name, `leaves` of the layer; None, and none is taken, where one is missing or another's."""
        names = {part: leaf if layer is None else f"blk.{layer}.{leaf}" for part, leaf in leaves.items()}
        wanted = set(names.values())
        if not wanted <= self.file.tensors.keys() or (wanted & self.used and not is_shared):
            return None
        self.used |= set(names.values())
        return {part: self.file.tensors[name] for part, name in names.items()}

    def _experts(self, name: str) -> _Recipe | None:
        """A stack of an experts module, or its biases: gate and up lie in one parameter here, in two tensors there."""
        for layer in self.layers:
            second = layer.stacks[-1]
            for parameter in layer.stacks:
                if name not in (parameter, f"{parameter}_bias"):
                    continue
                number, kind = _number(name), "bias" if name.endswith("_bias") else "weight"
                module = self.model.get_submodule(layer.name)
                is_transposed = layer.is_transposed and kind == "weight"
                if parameter == second or not module.has_gate:
                    which = "down" if parameter == second else "up"
                    found = self._take(number, it=f"ffn_{which}_exps.{kind}")
                    return _recipe(found, stack("it", is_transposed))
                found = self._take(number, gate=f"ffn_gate_exps.{kind}", up=f"ffn_up_exps.{kind}")
                found = found or self._take(number, both=f"ffn_gate_up_exps.{kind}")
                make = gate_and_up(bool(getattr(module, "is_concatenated", True)), is_transposed)
                return _recipe(found, make)
        return None

    def _router(self, name: str) -> _Recipe | None:
        """A router's linear, and what else decides between experts."""
        for layer in self.layers:
            if name.startswith(f"{layer.router}.") and name.rpartition(".")[2] in ("weight", "bias"):
                return self._shaped(name, self._take(_number(name), it=f"ffn_gate_inp.{name.rpartition('.')[2]}"))
        for pattern, places in CHOOSING.items():
            if re.search(pattern, name):
                number = _number(name)
                return next((it for place in places if (it := self._shaped(name, self._take(number, it=place)))), None)
        return None

    def _latent(self, name: str) -> _Recipe | None:
        """Latent attention's second projection, stored in two tensors."""
        if not name.endswith(".kv_b_proj.weight"):
            return None
        found = self._take(_number(name), keys="attn_k_b.weight", values="attn_v_b.weight")
        if found is None or len(found["keys"].shape) != 3:
            return None
        size = Fraction(found["keys"].shape[2] + found["values"].shape[1])
        return _Recipe(found, latent, size)

    def _linear_attention(self, name: str) -> _Recipe | None:
        """What the converter joins or reorders by value heads."""
        leaf, number = name.rpartition(".linear_attn.")[2], _number(name)
        if leaf == name or number is None:
            return None
        heads, shape = ValueHeads.of(self.config), self.wanted[name]
        if leaf == "in_proj_qkvz.weight":
            found = self._take(number, qkv="attn_qkv.weight", z="attn_gate.weight")
            return _recipe(found, heads.joined, None)
        if self.architecture not in GGUF_TILED_VALUE_HEADS or heads.per_key == 1 or leaf not in TILED:
            return None
        place, undo = TILED[leaf]
        found = self._take(number, it=place)
        return _recipe(found, lambda it: undo(heads, _plain(name, it["it"])).reshape(shape), None)

    def _simple(self, name: str) -> _Recipe | None:
        """A parameter that is one tensor."""
        for spelled in spellings(name, self.original):
            known = self.table.get_name(spelled, (".weight", ".bias"))
            if known is None:
                continue
            known = known.replace("blk.0.", f"blk.{_number(name)}.")
            for key in (known, f"{known}.weight", f"{known}.bias"):
                if (found := self._take(None, it=key)) and (recipe := self._shaped(name, found)):
                    return recipe
        return None

    def _shaped(self, name: str, found: dict[str, Stored] | None) -> _Recipe | None:
        """One tensor as the parameter `name`, undoing what is done to tensors of that kind."""
        if found is None:
            return None
        stored, shape = found["it"], self.wanted[name]
        if not _same_but_for_ones(stored.shape, shape):
            self.wrong(name, stored)
        leaf = re.sub(r"^blk\.\d+\.", "", stored.name)
        if (heads := rotated_heads(self.config, leaf)) is not None:
            return _Recipe(found, lambda it: halves(it["it"], heads).reshape(shape), None)
        is_from_one = self.architecture in GGUF_NORMS_FROM_ONE and re.search(FROM_ONE, leaf) is not None
        is_one_row = len(stored.shape) == 1 and not stored.is_plain
        rows = _EACH if stored.shape[0] == shape[0] and not is_one_row else None

        def make(it: Numbers) -> torch.Tensor:
            return (it["it"] - 1 if is_from_one else _plain(name, it["it"])).reshape(-1, *shape[1:])

        is_changed = is_from_one or name.endswith("A_log") or stored.shape != shape
        return _Recipe(found, make, rows, not is_changed)

    def _fused(self, name: str) -> _Recipe | None:
        """What is one parameter here and several tensors there: convolutions, a gate and an up projection."""
        if name.endswith(".conv1d.weight"):
            q, k, v = (f"ssm_conv1d_{which}.weight" for which in "qkv")
            found = self._take(_number(name), q=q, k=k, v=v)
            shape = self.wanted[name]
            return _recipe(found, lambda it: torch.cat([it[which].reshape(-1, *shape[1:]) for which in "qkv"]), None)
        if not name.endswith((".input_linear.weight", ".gate_up_proj.weight")):
            return None
        number = _number(name)
        for kind in ("_shexp", ""):
            found = self._take(number, gate=f"ffn_gate{kind}.weight", up=f"ffn_up{kind}.weight")
            if found:
                return _Recipe(found, lambda it: torch.cat([it["gate"], it["up"]]), None)
        return None

    def _cut(self, name: str) -> _Recipe | None:
        """A query, key or value whose rows lie in one tensor with the others', in this order."""
        match = re.search(r"^(.*\.)([qkv])_proj\.(weight|bias)$", name)
        if match is None:
            return None
        sizes = [self.wanted.get(f"{match[1]}{which}_proj.{match[3]}", (0,))[0] for which in "qkv"]
        found = self._take(_number(name), is_shared=True, it=f"attn_qkv.{match[3]}")
        if found is None or found["it"].shape[0] != sum(sizes):
            return None
        place = "qkv".index(match[2])
        rows = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
        heads = rotated_heads(self.config, f"attn_{match[2]}.{match[3]}")
        return _Recipe(found, lambda it: halves(it["it"][rows], heads) if heads else it["it"][rows], None)

    def scale(self, stored: Stored) -> Stored | None:
        """The number, or one for each expert, that NVFP4 is still to be multiplied by, if no parameter is just that."""
        name = f"{stored.name.removesuffix('.weight')}.scale"
        has_own = any(key.endswith("per_expert_scale") for key in self.wanted) and name.endswith("ffn_down_exps.scale")
        if stored.kind != "NVFP4" or has_own or name not in self.file.tensors:
            return None
        self.used.add(name)
        return self.file.tensors[name]

    def wrong(self, name: str, stored: Stored) -> NoReturn:
        """Refuse a tensor that does not fit the config."""
        raise ModelError(
            f"{self.where}: {stored.name} is {_times(stored.shape)}, and {name} would be {_times(self.wanted[name])}; "
            "the config is another model's, or the file is damaged"
        )


def original_names(model: PreTrainedModel) -> dict[str, str]:
    """What parameters that no conversion joins or splits are called in the family's own files, by their names here."""
    stacks = {name for layer in describe(model).layers for name in layer.stacks}
    single = {name: tensor for name, tensor in model.state_dict().items() if name not in stacks}
    reverted = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(single)).items()}
    return {name: reverted[id(tensor)] for name, tensor in single.items() if id(tensor) in reverted}


def spellings(name: str, original: Mapping[str, str]) -> Iterator[str]:
    """A parameter's names that the library's table of one block may know, most likely first."""
    for spelled in (name, original.get(name, name)):
        for variant in (spelled, spelled.replace(".dt_bias", ".dt_proj.bias")):
            yield re.sub(r"\.\d+\.", ".0.", variant, count=1)


def rotated_heads(config: Any, leaf: str) -> int | None:
    """The heads of a query or key whose rows are reordered from halves to pairs; `leaf`: a tensor's name in a layer."""
    if str(config.model_type) not in GGUF_ROTATED_IN_PAIRS:
        return None
    count = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return count.get(leaf.rpartition(".")[0])


def name_table(architecture: str, where: str) -> Any:
    """gguf's names of one block of that architecture."""
    gguf = library()
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ModelError(
            f"{where}: the gguf library knows no architecture {architecture[:80]}; give the original model"
        )
    return gguf.get_tensor_name_map(arch, 1)


def _recipe(
    found: dict[str, Stored] | None, make: Callable[[Numbers], torch.Tensor], rows: Fraction | None = _EACH
) -> _Recipe | None:
    return None if found is None else _Recipe(found, make, rows)


def _packed(name: str, shape: tuple[int, ...], recipe: _Recipe, finder: _Finder) -> Packed:
    """The recipe over raw tensors, tried on their shapes.

    Raises:
        ModelError: it does not give `shape`, or a type that cannot be multiplied out.
    """
    try:
        made = tuple(
            recipe.make({part: torch.empty(it.shape, device="meta") for part, it in recipe.tensors.items()}).shape
        )
    except RuntimeError:  # shapes that do not even fit each other
        made = ()
    if made != shape:
        finder.wrong(name, next(iter(recipe.tensors.values())))
    parts: dict[str, Part] = {}
    axis = None if recipe.rows is None else 0
    for part, stored in recipe.tensors.items():
        if not can_multiply_out(stored.kind):
            raise ModelError(
                f"{finder.where}: {stored.name} is {stored.kind}, which the gguf library cannot multiply out"
            )
        parts[part] = Part(stored.name, axis, recipe.rows or _EACH)
        if (scale := finder.scale(stored)) is not None:
            is_each = axis is not None and len(stored.shape) == 3 and scale.shape == stored.shape[:1]
            parts[f"{part}{_SCALE}"] = Part(scale.name, axis if is_each else None, recipe.rows or _EACH)
    kinds = {part: stored.kind for part, stored in recipe.tensors.items()}

    def unpack(raw: Tensors) -> torch.Tensor:
        numbers = {part: multiply_out(raw[part], kind, raw.get(f"{part}{_SCALE}")) for part, kind in kinds.items()}
        return recipe.make(numbers)

    words = " and ".join(sorted(set(kinds.values())))
    size = sum(finder.file.tensors[part.key].bytes for part in parts.values())
    return Packed(name, shape, MappingProxyType(parts), unpack, words, size)


_SCALE = ".scale"

CHOOSING: Mapping[str, tuple[str, ...]] = {
    r"(e_score_correction|expert)_bias$": ("exp_probs_b.bias", "exp_probs_b"),
    r"router\.scale$": ("ffn_gate_inp.scale",),
    r"router\.per_expert_scale$": ("ffn_down_exps.scale",),
}
"""Parameters beside a router's matrix, and their tensors: biases of scores, scales of its inputs and its choices."""

FROM_ONE = r"(?<!ssm_)norm\.weight$"
"""Of architectures whose norms multiply by one more than their weight: those are stored with the one. The norm inside
linear attention multiplies by its weight alone."""

_PASSED_OVER = r"^rope_(freqs|factors_\w+)\.weight$|\.(input_scale|rope_freqs\.weight|attn_rot_embd\.weight)$"
"""Tensors that follow from the config, and the scales of activations."""

TILED: Mapping[str, tuple[str, Callable[[ValueHeads, torch.Tensor], torch.Tensor]]] = {
    "in_proj_qkv.weight": ("attn_qkv.weight", ValueHeads.after_keys),
    "in_proj_z.weight": ("attn_gate.weight", ValueHeads.of_values),
    "in_proj_a.weight": ("ssm_alpha.weight", ValueHeads.of_heads),
    "in_proj_b.weight": ("ssm_beta.weight", ValueHeads.of_heads),
    "A_log": ("ssm_a", ValueHeads.of_heads),
    "dt_bias": ("ssm_dt.bias", ValueHeads.of_heads),
    "conv1d.weight": ("ssm_conv1d.weight", ValueHeads.after_keys),
    "out_proj.weight": ("ssm_out.weight", ValueHeads.columns),
}
"""By the part of linear attention: its tensor, and how value heads come back into their groups."""


def _plain(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """As they are, but a decay is stored as `-exp(A_log)`."""
    return (-numbers).log() if name.endswith("A_log") else numbers


def _number(name: str) -> str | None:
    match = re.search(r"\.(\d+)\.", name)
    return match and match[1]


def _same_but_for_ones(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a reshape cannot mix anything up: only dimensions of one come or go, or all become one dimension."""
    kept = [[size for size in shape if size != 1] for shape in (stored, wanted)]
    return kept[0] == kept[1] or (len(wanted) == 1 and len(stored) == 2 and stored[0] * stored[1] == wanted[0])


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
