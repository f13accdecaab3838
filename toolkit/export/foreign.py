"""Adapters that other toolkits wrote: which experts of which layers they move, and whether they are of a base.

Nothing is converted. Every key of the files is followed to the parameter of the base that it changes: linears, experts
one by one, PEFT's fused stacks (a chain of `base_layer`), stacks as Unsloth splits them, KTransformers' fused file.
Keys that lead nowhere are what a program would drop. Only the config of the base is needed, no weight of it.

    E experts, R rank, O outputs, I inputs
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.adapters.untrusted import CONFIG, WEIGHTS, check_patterns, read_adapter_config
from toolkit.architecture import describe
from toolkit.checkpoint.config import skeleton
from toolkit.checkpoint.conversion import targets
from toolkit.checkpoint.files import read_header
from toolkit.errors import ModelError, first_line
from toolkit.export.server_rules import llama_cpp_problems, server_problems
from toolkit.parts import ExpertLayer

__all__ = ["FUSED", "ForeignReport", "LayerMoved", "verify_foreign"]

FUSED = "fused_expert_lora.safetensors"
"""KTransformers' file of expert adapters: `layers.N.experts.gate_lora_a` and so on, [E, R, I] and [E, O, R]."""

_PARTS = {
    **dict.fromkeys(("gate_proj", "w1", "gate"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "up"), "up"),
    **dict.fromkeys(("down_proj", "w2", "down"), "down"),
    "gate_up_proj": "gate_up",
}
"""Names of an expert's projections, to what they compute."""
_PREFIX = re.compile(r"^(?:(?:base_model\.model|base_model|_orig_mod|module)\.)+")
_INSIDE = re.compile(r"\.(?:_orig_mod|orig_module|_checkpoint_wrapped_module)(?=\.)")
_SIDE = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>\w+))?\.weight$")
_FUSED_KEY = re.compile(r"^layers\.(?P<layer>\d+)\.experts\.(?P<part>gate|up|down)_lora_(?P<side>[ab])$")
_SPLIT = re.compile(r"^(?P<stack>.+)\.(?P<part>gate_up|down)_projs\.(?P<expert>\d+)$")
_ONE = re.compile(rf"^(?P<stack>.+)\.(?P<expert>\d+)\.(?P<part>{'|'.join(_PARTS)})$")
_EXPERT = re.compile(r"\.(?P<expert>\d+)\.(?P<part>\w+)$")
_SPELLINGS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("", "model."),
)
"""How toolkits and versions of transformers name the text model of one checkpoint."""


@dataclass(frozen=True)
class LayerMoved:
    """One MoE layer: how many of its experts have an adapter that moved on all their projections, and on some."""

    name: str
    experts: int
    moved: int
    partly: int


@dataclass(frozen=True)
class ForeignReport:
    """What an adapter without a manifest changes of a base."""

    folder: str
    base: str
    layouts: tuple[str, ...]
    """In what forms its experts lie."""
    layers: tuple[LayerMoved, ...]
    slots: tuple[int, int]
    """Projections of single experts that are moved, and all that the base has."""
    routers: tuple[int, int]
    linears: tuple[int, int]
    """Other linears that moved, of those that the adapter has."""
    fitting: tuple[int, int]
    """Tensors that have their place in the base and its shape there, of all."""
    misfits: tuple[str, ...]
    beside: tuple[str, ...]
    """What it holds or asks for beyond pairs of A and B."""
    servers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def problem(self) -> str | None:
        """The first thing that makes it not what it should be, in words; None where all experts move."""
        moved, every = self.slots
        if self.fitting[0] < self.fitting[1]:
            return f"{self.fitting[1] - self.fitting[0]} of {self.fitting[1]} tensors do not fit: {self.misfits[0]}"
        if moved < every:
            return f"moves {moved:,} of the {every:,} projections of experts"
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "problem": self.problem}


def verify_foreign(folder: Path, base: str) -> ForeignReport:
    """Follow every tensor of an adapter into a base.

    Args:
        folder: adapter_config.json with adapter_model.safetensors, KTransformers' fused file, or both.
        base: a checkpoint's folder or Hub name; its config.json is enough.

    Raises:
        ModelError: not a LoRA adapter in safetensors, a damaged file, or a base that is no MoE.
    """
    config = read_adapter_config(folder / CONFIG)
    check_patterns(config, folder / CONFIG)
    _check_fields(config, folder / CONFIG)
    files = [folder / name for name in (WEIGHTS, FUSED) if (folder / name).is_file()]
    if not files:
        raise ModelError(f"{folder}: holds no {WEIGHTS}; pickles are not read")
    return _Reading(folder, config, files, base).report()


class _Pair:
    """A and B of one module, or of one stack: what is known of both."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, tuple[Path, str]] = {}


class _Reading:
    """One adapter beside one base."""

    def __init__(self, folder: Path, config: Mapping[str, Any], files: Sequence[Path], base: str) -> None:
        self.folder, self.config, self.base = folder, config, base
        self.model = skeleton(base)
        self.layers = describe(self.model).layers
        self.shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        self.pairs: dict[str, _Pair] = {}
        self.other: list[str] = []
        self.layouts: dict[str, None] = {}
        self.moved: dict[str, set[tuple[int, str]]] = {}
        """By stack: experts and parts of them that moved."""
        self.modules: dict[str, bool] = {}
        self.misfits: list[str] = []
        self.raw = {key: (place, tensor.shape) for place in files for key, tensor in _header(place).items()}
        for key, (place, shape) in self.raw.items():
            self._take(key, place, shape)
        self.names = _names(self.model, [pair.module for pair in self.pairs.values()], self.layers)

    def report(self) -> ForeignReport:
        """After every tensor was looked at."""
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {p for p, _ in self.raw.values()}}
            try:
                fitting = sum(self._follow(pair, opened) for pair in self.pairs.values())
            except (SafetensorError, ValueError, RuntimeError) as error:
                raise ModelError(f"{self.folder}: damaged ({first_line(error)[:120]}); copy it again") from None
        seen = [layer for layer in self.layers if layer.sees_text]
        layers, slots, every = [], 0, 0
        for layer in seen:
            wanted = _wanted(self.model, layer)
            parts = [set(self._parts_moved(layer, expert)) for expert in range(layer.num_experts)]
            slots, every = slots + sum(len(found & wanted) for found in parts), every + len(wanted) * len(parts)
            whole = sum(wanted <= found for found in parts)
            layers.append(LayerMoved(layer.name, len(parts), whole, sum(map(bool, parts)) - whole))
        routers = {layer.router for layer in seen}
        linears = [moved for name, moved in self.modules.items() if name not in routers]
        return ForeignReport(
            str(self.folder),
            self.base,
            tuple(self.layouts),
            tuple(layers),
            (slots, every),
            (sum(self.modules.get(name, False) for name in routers), len(routers)),
            (sum(linears), len(linears)),
            (fitting, sum(len(pair.keys) for pair in self.pairs.values())),
            tuple(self.misfits),
            tuple(self._beside()),
            self._servers(),
        )

    def _take(self, key: str, place: Path, shape: tuple[int, ...]) -> None:
        plain = _INSIDE.sub("", _PREFIX.sub("", key))
        if place.name == FUSED and (match := _FUSED_KEY.match(key)):
            module, side = f"layers.{match['layer']}.experts.{match['part']}_lora", match["side"].upper()
        elif match := _SIDE.match(plain):
            module, side = match["module"], match["side"]
        else:
            self.other.append(key)
            return
        pair = self.pairs.setdefault(module, _Pair(module))
        pair.keys[side], pair.shapes[side] = (place, key), shape

    def _follow(self, pair: _Pair, opened: Mapping[Path, Any]) -> int:
        """How many of a pair's tensors have a place of their shape in the base; what they move is noted."""
        if pair.keys.keys() != {"A", "B"}:
            return self._misfit(f"{pair.module} has only its {min(pair.keys)}")
        A, B = (opened[pair.keys[side][0]].get_tensor(pair.keys[side][1]) for side in "AB")
        if A.dim() != B.dim() or A.dim() not in (2, 3):
            return self._misfit(f"{pair.module}: {_pair_shape(A, B)} are no A and B")
        if not all(side.is_floating_point() and bool(side.isfinite().all()) for side in (A, B)):
            return self._misfit(f"{pair.module} is not finite")
        found = self.names.get(pair.module)
        if found is None:
            return self._misfit(f"nothing in this base is called {pair.module}")
        stack, expert, part = found
        if expert is None and stack in self._stacks():
            return self._follow_stack(pair, stack, part, A, B)
        outputs, inputs = self._sides(stack)
        if part in ("gate", "up") and expert is not None:
            outputs //= 2 if _is_joined(self.model, stack) else 1
        if (B.shape[0], A.shape[-1]) != (outputs, inputs) or A.shape[0] != B.shape[-1]:
            return self._misfit(f"{pair.module}: {_pair_shape(A, B)}, where this base has {outputs}×{inputs}")
        moved = bool(A.any()) and bool(B.any())
        if expert is None:
            self.modules[stack.removesuffix(".weight")] = moved
        else:
            is_split = re.search(r"_projs\.\d+$", pair.module)
            self.layouts["stacks split into linears, as Unsloth does" if is_split else "linears, an expert each"] = None
            self._note(stack, [expert] if moved else [], part)
        return 2

    def _follow_stack(self, pair: _Pair, layer_name: str, part: str, A: Tensor, B: Tensor) -> int:
        """PEFT's fused layout, (R·E, I) and (O, R·E), or KTransformers', [E, R, I] and [E, O, R]."""
        layer = next(each for each in self.layers if each.name == layer_name)
        count = layer.num_experts
        if A.dim() == 3:
            self.layouts["KTransformers' fused file"] = None
            moved = A.flatten(1).any(1) & B.flatten(1).any(1)
            stack, sides = layer.stacks[part == "down"], (B.shape[1], A.shape[2])
            wanted = self._sides(stack)
            wanted = (wanted[0] // 2, wanted[1]) if part != "down" and _is_joined(self.model, stack) else wanted
            if len(A) != count or sides != wanted:
                return self._misfit(
                    f"{pair.module}: {_pair_shape(A, B)}, where this base has {count} of {wanted[0]}×{wanted[1]}"
                )
        else:
            self.layouts["PEFT's fused stacks"] = None
            fit = self._stack_of(layer, pair, (B.shape[0], A.shape[1]))
            if fit is None or A.shape[0] % count or A.shape[0] != B.shape[1]:
                both = " or ".join(f"{count} of {'×'.join(map(str, self._sides(each)))}" for each in layer.stacks)
                return self._misfit(f"{pair.module}: {_pair_shape(A, B)}, where this base has {both}")
            stack, part = fit, "down" if fit == layer.stacks[1] else "gate_up"
            moved = A.reshape(count, -1, A.shape[1]).flatten(1).any(1) & B.reshape(len(B), -1, count).any(0).any(0)
        self._note(stack, moved.nonzero().flatten().tolist(), part)
        return 2

    def _stack_of(self, layer: ExpertLayer, pair: _Pair, sides: tuple[int, int]) -> str | None:
        """Which stack a wrapper is of, by its shape; where both have it, the inner one of a chain is the first."""
        fitting = [stack for stack in layer.stacks if self._sides(stack) == sides]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        names = [name.rpartition(".")[2] for name in self.config.get("target_parameters") or ()]
        named = [stack for stack in fitting if stack.rpartition(".")[2] in names]
        return named[0] if len(named) == 1 else fitting[not pair.module.endswith(".base_layer")]

    def _note(self, stack: str, experts: Sequence[int], part: str) -> None:
        parts = ("gate", "up") if part == "gate_up" else (part,)
        self.moved.setdefault(stack, set()).update((expert, each) for expert in experts for each in parts)

    def _parts_moved(self, layer: ExpertLayer, expert: int) -> Iterator[str]:
        for stack in layer.stacks:
            yield from (part for number, part in self.moved.get(stack, ()) if number == expert)

    def _stacks(self) -> set[str]:
        return {layer.name for layer in self.layers}

    def _sides(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a parameter, of one expert of it where it is a stack."""
        shape = self.shapes[name][-2:]
        turned = any(layer.is_transposed and name in layer.stacks for layer in self.layers)
        return (shape[1], shape[0]) if turned else (shape[0], shape[1])

    def _misfit(self, what: str) -> int:
        self.misfits.append(what)
        return 0

    def _beside(self) -> Iterator[str]:
        from toolkit.adapters.starting import BEYOND_PAIRS

        for name, what in BEYOND_PAIRS.items():
            if self.config.get(name):
                yield f"{name}: {what}"
        if self.other:
            yield f"{len(self.other)} tensors that are no A or B of a linear: {', '.join(sorted(self.other)[:3])}"

    def _servers(self) -> dict[str, list[str]]:
        shapes = {key: shape for key, (place, shape) in self.raw.items() if place.name == WEIGHTS}
        config = {"r": 0, **self.config}
        experts = max(layer.num_experts for layer in self.layers)
        found = {**server_problems(shapes, config, experts), "llama.cpp": llama_cpp_problems(shapes, config, experts)}
        if any(place.name == FUSED for place, _ in self.raw.values()):
            found = {name: [f"{FUSED} is not read", *problems] for name, problems in found.items()}
        return found


def _check_fields(config: Mapping[str, Any], path: Path) -> None:
    """Those that are read here; they may be a stranger's."""
    rank, named = config.get("r", 0), config.get("target_parameters") or []
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ModelError(f"{path}: r: {str(rank)[:40]} is no rank")
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise ModelError(f"{path}: target_parameters: not a list of names")


def _header(path: Path) -> Mapping[str, Any]:
    return read_header(path, "copy it again", 32 << 20)


def _names(
    model: PreTrainedModel, modules: Sequence[str], layers: Sequence[ExpertLayer]
) -> dict[str, tuple[str, int | None, str]]:
    """By module of the adapter: the base's parameter, or its layer of experts where a stack is meant; the expert; the
    part of it. Modules that lead nowhere are left out."""
    mapping, state = get_model_conversion_mapping(model), model.state_dict().keys()
    stacks = {stack: layer for layer in layers for stack in layer.stacks}
    by_name = {layer.name: layer for layer in layers}
    found: dict[str, tuple[str, int | None, str]] = {}
    for before, after in (("", ""), *_SPELLINGS):
        left = {
            each: after + each.removeprefix(before) for each in modules if each not in found and each.startswith(before)
        }
        asked = {f"{spelt}.weight": each for each, spelt in left.items()}
        reached = targets(model, mapping, asked)
        for key, target in reached.items():
            each, spelt = asked[key], key.removesuffix(".weight")
            if (special := _special(spelt, by_name)) is not None:
                found[each] = special
            elif target in stacks:
                match = _EXPERT.search(spelt)
                if match and (part := _PARTS.get(match["part"])) and int(match["expert"]) < stacks[target].num_experts:
                    found[each] = (target, int(match["expert"]), part)
            elif target in state:
                found[each] = (target, None, "")
    return found


def _special(module: str, layers: Mapping[str, ExpertLayer]) -> tuple[str, int | None, str] | None:
    """Names that are no checkpoint's: wrappers around stacks, KTransformers' file, stacks taken apart into linears."""
    bare = module.replace(".base_layer", "")
    if bare in layers:
        return bare, None, ""
    if match := re.match(r"(?:model\.)?layers\.(\d+)\.experts\.(gate|up|down)_lora$", module):
        named = [name for name in layers if re.search(rf"\blayers\.{match[1]}\.", name)]
        return (named[0], None, match[2]) if named else None
    split = _SPLIT.match(module) or _ONE.match(module)
    if split and (layer := layers.get(split["stack"])) and int(split["expert"]) < layer.num_experts:
        part = _PARTS.get(split["part"], split["part"])
        return layer.stacks[part == "down"], int(split["expert"]), part
    return None


def _wanted(model: PreTrainedModel, layer: ExpertLayer) -> set[str]:
    """The projections of each expert."""
    return {"gate", "up", "down"} if getattr(model.get_submodule(layer.name), "has_gate", True) else {"up", "down"}


def _is_joined(model: PreTrainedModel, stack: str) -> bool:
    """Whether a stack holds gate and up of each expert."""
    return bool(getattr(model.get_submodule(stack.rpartition(".")[0]), "has_gate", True))


def _pair_shape(A: Tensor, B: Tensor) -> str:
    return " and ".join("×".join(map(str, side.shape)) for side in (A, B))
