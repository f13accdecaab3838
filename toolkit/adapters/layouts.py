"""An adapter's layouts as invertible data: PEFT's fused tensors, per-expert 2-D keys, what is added to a checkpoint.

PEFT knows only its own layout; servers want a key an expert and projection. Where a row of a fused stack lives in the
checkpoint is read off transformers' own reverse conversion, by sending row numbers through it, so there is no table.

Shapes: E experts (1 for a linear or router), R rank, O outputs, I inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from toolkit.architecture import describe
from toolkit.errors import ModelError, first_line

__all__ = [
    "MAGNITUDES",
    "PREFIX",
    "ROWS",
    "Factors",
    "Piece",
    "deltas",
    "from_per_expert",
    "largest_difference",
    "per_expert",
    "pieces",
    "read_factors",
    "split",
]

PREFIX = "base_model.model."
"""What PEFT puts before every name."""
MAGNITUDES = "lora_magnitude_vector"
"""How a tensor ends that holds DoRA's magnitudes, one of each output of a linear, which are no pair either."""
ROWS = "token_adapter.trainable_tokens_delta"
"""How a tensor ends that holds trained rows of tokens, which is no pair."""


@dataclass(frozen=True)
class Factors:
    """The update of one parameter: `scaling · B[e] @ A[e]`, transposed where the parameter is [E, I, O].

    `key` is PEFT's name of the pair, `parameter` the model's name of what it changes. DoRA's `magnitude` [O] is the
    length of each row of the changed weight: where `weight` reads what is changed [O, I], the update has that, too.
    """

    key: str
    parameter: str
    A_ERI: Tensor
    B_EOR: Tensor
    scaling: float
    is_transposed: bool = False
    is_stack: bool = False
    magnitude: Tensor | None = None
    weight: Callable[[], Tensor] | None = None

    def update(self, expert: int) -> Tensor:
        """[O, I] in fp32."""
        update = self.scaling * (self.B_EOR[expert].float() @ self.A_ERI[expert].float())
        if self.magnitude is None or self.weight is None:
            return update
        weight = self.weight().float()
        changed = update.add_(weight)
        lengths = torch.linalg.vector_norm(changed, dim=1)  # as PEFT's `DoraLinearLayer.get_weight_norm`
        return changed.mul_((self.magnitude.float() / lengths)[:, None]).sub_(weight)

    def full(self) -> Tensor:
        """In the parameter's own shape."""
        update = torch.stack([self.update(expert) for expert in range(len(self.A_ERI))])
        update = update.transpose(-1, -2).contiguous() if self.is_transposed else update
        return update if self.is_stack else update[0]

    def add_to(self, weight: Tensor) -> None:
        """Add the update to the parameter, fp32, in place, one expert at a time: in full it is as large as a stack."""
        if not self.is_stack:
            weight.add_(self.update(0))
            return
        for expert, matrix in enumerate(weight):
            update = self.update(expert)
            matrix.add_(update.T if self.is_transposed else update)


@dataclass(frozen=True)
class Piece:
    """A 2-D weight of a checkpoint: its key, and the expert and rows of the model's parameter that it holds.

    `is_turned` says that it lies there as [I, O], rows as columns. `place` is where these rows begin, where those of
    other parameters lie in it too.
    """

    key: str
    expert: int
    rows: Tensor
    is_turned: bool = False
    place: int | None = None


def read_factors(folder: str | Path, skeleton: PreTrainedModel) -> list[Factors]:
    """The pairs of a PEFT adapter, by what they change in `skeleton` (the base on meta, which is left wrapped).

    Ranks, alphas, patterns and rsLoRA are applied by PEFT itself. Rows of tokens, which are no pairs, are left out.

    Raises:
        ModelError: the adapter does not fit this base.
    """
    transposed = {name for layer in describe(skeleton).layers if layer.is_transposed for name in layer.stacks}
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    stored = load_file(Path(folder) / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith((ROWS, MAGNITUDES))}
    magnitudes = {name: tensor for name, tensor in stored.items() if name.endswith(MAGNITUDES)}
    found = []
    for name, module in _lora_layers(folder, skeleton):
        leaf = getattr(module, "parameter_name", None) or "weight"
        parameter = f"{name.removeprefix(PREFIX).replace('.base_layer', '')}.{leaf}"
        A, B = (tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
        if A is None or B is None or parameter not in shapes:
            raise ModelError(f"{folder}: no pair for {name}: the adapter is for another model")
        experts = shapes[parameter][0] if len(shapes[parameter]) == 3 else 1
        A_ERI = A.reshape(experts, -1, A.shape[1])
        B_EOR = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        is_stack, magnitude = len(shapes[parameter]) == 3, magnitudes.get(f"{name}.{MAGNITUDES}")
        scaling, is_transposed = module.scaling["default"], parameter in transposed
        found.append(Factors(name, parameter, A_ERI, B_EOR, scaling, is_transposed, is_stack, magnitude))
    if tensors:
        raise ModelError(f"{folder}: nothing in this base takes {min(tensors)}: the adapter is for another model")
    return found


def pieces(factors: Factors, skeleton: PreTrainedModel) -> list[Piece] | None:
    """The checkpoint's 2-D weights that make up one parameter, or None where it is stored as one stack."""
    experts, outputs = factors.B_EOR.shape[:2]
    shape = (experts, 1, outputs) if factors.is_transposed else (experts, outputs, 1)
    numbers = torch.arange(experts * outputs).reshape(shape if factors.is_stack else shape[1:])
    try:
        stored = revert_weight_conversion(skeleton, {factors.parameter: numbers})
    except (ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None
    if any(part.dim() != 2 for part in stored.values()):
        return None
    found = []
    for key, part in stored.items():
        flat = part.reshape(-1)
        expert = int(flat[0]) // outputs
        if not torch.equal(flat // outputs, torch.full_like(flat, expert)):
            return None
        place = None if factors.is_stack else _place(key, factors.parameter, numbers, skeleton)
        found.append(Piece(key, expert, flat % outputs, part.shape[0] < part.shape[1], place))
    return found


def _place(key: str, parameter: str, numbers: Tensor, skeleton: PreTrainedModel) -> int | None:
    """Where a linear's rows begin in a tensor that the files make of it and its neighbours; None where it is alone."""
    path, _, leaf = parameter.rpartition(".")
    block, _, own = path.rpartition(".")
    weights = {name: getattr(child, leaf, None) for name, child in skeleton.get_submodule(block).named_children()}
    matrices = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() == 2}
    rows = {f"{block}.{name}.{leaf}": torch.full((len(weight), 1), -1) for name, weight in matrices.items()}
    rows[f"{block}.{own}.{leaf}"] = numbers
    try:
        stored = revert_weight_conversion(skeleton, rows)[key].reshape(-1)
    except (ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None
    return None if len(stored) == len(numbers) else int((stored >= 0).nonzero()[0])


def deltas(factors: Factors, skeleton: PreTrainedModel) -> Iterator[tuple[str, Tensor, int | None]]:
    """What the adapter adds to each tensor of the checkpoint, by key, fp32; one expert at a time where it can be.

    The number is the row from which on it is added, where other parameters lie in that tensor too.
    """
    if parts := pieces(factors, skeleton):
        for part in parts:
            update = factors.update(part.expert)[part.rows]
            yield part.key, update.T if part.is_turned else update, part.place
        return
    try:
        stored = revert_weight_conversion(skeleton, {factors.parameter: factors.full()})
    except (ValueError, RuntimeError, IndexError, KeyError):
        raise ModelError(
            f"{factors.parameter}: the checkpoint stores it together with others: export as peft or per-expert"
        ) from None
    yield from ((key, delta, None) for key, delta in stored.items())


def per_expert(adapter: Sequence[Factors], skeleton: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
    """Per-expert 2-D keys, and the rank; every scaling is folded into B and every rank padded to the largest.

    Servers read one rank and one alpha for the whole adapter: alpha is to be that rank.
    """
    rank = max(factors.A_ERI.shape[1] for factors in adapter)
    result: dict[str, Tensor] = {}
    for factors in adapter:
        for part in split(factors, skeleton):
            A = factors.A_ERI[part.expert]
            B = factors.scaling * factors.B_EOR[part.expert][part.rows].float()
            name = f"{PREFIX}{part.key.removesuffix('.weight')}"
            missing = rank - A.shape[0]
            result[f"{name}.lora_A.weight"] = torch.nn.functional.pad(A.float(), (0, 0, 0, missing)).contiguous()
            result[f"{name}.lora_B.weight"] = torch.nn.functional.pad(B, (0, missing)).contiguous()
    return result, rank


def from_per_expert(tensors: Mapping[str, Tensor], like: Sequence[Factors], skeleton: PreTrainedModel) -> list[Factors]:
    """The inverse of `per_expert`: the same parameters as `like`, with scaling 1 and the padded rank."""
    result = []
    for factors in like:
        A_ERI, B_EOR = None, None
        for part in split(factors, skeleton):
            name = f"{PREFIX}{part.key.removesuffix('.weight')}"
            A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            if A_ERI is None or B_EOR is None:
                experts, outputs = factors.B_EOR.shape[:2]
                A_ERI, B_EOR = A.new_zeros(experts, *A.shape), B.new_zeros(experts, outputs, B.shape[1])
            A_ERI[part.expert], B_EOR[part.expert, part.rows] = A, B
        if A_ERI is None or B_EOR is None:
            raise ModelError(f"{factors.parameter}: no per-expert keys in the export")
        result.append(
            Factors(factors.key, factors.parameter, A_ERI, B_EOR, 1.0, factors.is_transposed, factors.is_stack)
        )
    return result


def largest_difference(one: Sequence[Factors], other: Sequence[Factors]) -> float:
    """Largest difference of two adapters' updates over the largest update; parameters must be the same."""
    theirs = {factors.parameter: factors for factors in other}
    worst, largest = 0.0, 0.0
    for factors in one:
        for expert in range(len(factors.A_ERI)):
            mine, found = factors.update(expert), theirs[factors.parameter].update(expert)
            worst, largest = max(worst, float((mine - found).abs().max())), max(largest, float(mine.abs().max()))
    return worst / largest if largest else worst


def split(factors: Factors, skeleton: PreTrainedModel) -> list[Piece]:
    """As the checkpoint splits the parameter; a stack that it holds whole is named by the projections' plain words."""
    found = pieces(factors, skeleton)
    if found is not None and all(piece.place is None for piece in found):
        return found
    if not factors.is_stack:
        raise ModelError(f"{factors.parameter}: the checkpoint stores it fused with others: export as peft or merged")
    path, _, leaf = factors.parameter.rpartition(".")
    experts = skeleton.get_submodule(path)
    count, outputs = factors.B_EOR.shape[:2]
    rows = torch.arange(outputs)
    names = {f"{leaf.removesuffix('.weight')}": rows}
    if leaf == "gate_up_proj":
        half = outputs // 2
        joined = bool(getattr(experts, "is_concatenated", True))
        names = (
            {"gate_proj": rows[:half], "up_proj": rows[half:]}
            if joined
            else {"gate_proj": rows[::2], "up_proj": rows[1::2]}
        )
    return [Piece(f"{path}.{e}.{name}.weight", e, part) for e in range(count) for name, part in names.items()]


def _lora_layers(folder: str | Path, skeleton: PreTrainedModel) -> list[tuple[str, LoraLayer]]:
    """PEFT's own layers of this adapter on the base; the base itself is put back as it was."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.init_lora_weights, config.trainable_token_indices = False, None
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ranks per parameter are called unmatched, though they apply
            wrapped = PeftModel(skeleton, config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder}: PEFT cannot apply it to this base: {first_line(error)}") from None
    found = [(name, module) for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)]
    wrapped.unload()
    return found
