"""The 16-bit checkpoint that a quantised base was made from: whether it is that, before an adapter is merged into it.

Nothing in a quantised checkpoint names its origin by hash. Weights tell: those that were left plain are equal in both,
and the others are as far apart as their bits allow. Quantisers that move scales from weights into norms (AWQ,
SmoothQuant) leave a base that no adapter of the result fits; this finds them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from toolkit.adapters.layouts import Factors
from toolkit.architecture import strip_index
from toolkit.checkpoint.config import quantised_as, skeleton
from toolkit.checkpoint.files import GGUF
from toolkit.errors import ModelError
from toolkit.quant.source import SourceWeights
from toolkit.steps import advance, part

__all__ = ["require_merge_base", "require_same_weights"]

_PLAIN = 0.01
"""Relative error between floats of 16 bits or more: one may have been rounded to bf16, by 2⁻⁹."""
_FLOATS = ("BF16", "F16", "F32")
_CORRECT = "correct model.merge_base, or give --base"


@part("compare the merge base")
def require_merge_base(
    merge_base: Path, source: Path, adapter: Sequence[Factors], model: PreTrainedModel
) -> tuple[str, float]:
    """The parameter that is furthest apart, for how it is stored, and its relative error.

    Args:
        source: the checkpoint that was trained on. model: of that, on meta.

    Raises:
        ModelError: `merge_base` is of another shape or quantised, lacks a tensor, or is not what `source` was made
            from.
    """
    _require_floats(merge_base)
    return require_same_weights(merge_base, source, adapter, model)


def require_same_weights(
    merge_base: Path, source: Path, adapter: Sequence[Factors], model: PreTrainedModel, correct: str = _CORRECT
) -> tuple[str, float]:
    """As `require_merge_base`, of two checkpoints in any form; `correct` is what an error says is to be done."""
    _require_same_shapes(merge_base, source, model, correct)
    ours, theirs = SourceWeights(str(source), also_ours=True), SourceWeights(str(merge_base))
    there = {name for names in theirs.parts().values() for name in names}
    if missing := sorted({factors.parameter for factors in adapter} - there):
        raise ModelError(f"{merge_base}: lacks {missing[0]}, which the adapter changes; give another model.merge_base")
    worst, off, most = "", 0.0, 1.0
    sampled = list(_sampled(ours, adapter))
    for number, name in enumerate(sampled, 1):
        module = name.rpartition(".")[0]
        with ours.layer(module) as one, theirs.layer(module) as other:
            found = _apart(one[name], other[name])
        allowed = _allowed(ours, name)
        if not found <= allowed:
            raise ModelError(
                f"{merge_base}: {name} is {found:.2g} apart from that of {source.name}, and its storage there explains "
                f"{allowed:.2g} at most: it was not made from this checkpoint; {correct}"
            )
        if found / allowed >= off / most:
            worst, off, most = name, found, allowed
        advance(number, len(sampled), "tensors")
    return worst, off


def _require_floats(merge_base: Path) -> None:
    if kind := quantised_as(merge_base):
        kind = "a GGUF file" if kind == GGUF else f"quantised as {kind}"
        raise ModelError(f"{merge_base}: {kind}, and a merge base is the original in floats; correct model.merge_base")


def _require_same_shapes(merge_base: Path, source: Path, model: PreTrainedModel, correct: str) -> None:
    other = skeleton(str(merge_base))
    if type(other) is not type(model):
        raise ModelError(
            f"{merge_base}: a {other.config.model_type}, and {source.name} is a {model.config.model_type}; {correct}"
        )
    shapes = {name: tuple(value.shape) for name, value in other.state_dict().items()}
    for name, value in model.state_dict().items():
        if shapes.get(name) != tuple(value.shape):
            found = "×".join(map(str, shapes[name])) if name in shapes else "missing"
            raise ModelError(
                f"{merge_base}: {name} is {found}, and {'×'.join(map(str, value.shape))} in {source.name}; {correct}"
            )


def _sampled(source: SourceWeights, adapter: Sequence[Factors]) -> Iterator[str]:
    """One parameter of each kind that is adapted, spread over the layers, and the norms of two parts."""
    kinds: dict[str, list[str]] = {}
    for factors in adapter:
        kinds.setdefault(strip_index(factors.parameter), []).append(factors.parameter)
    yield from (names[number * len(names) // len(kinds)] for number, names in enumerate(kinds.values()))
    shapes = {name: value.dim() for name, value in source.model.state_dict().items()}
    parts = [[name for name in names if shapes[name] == 1] for names in source.parts().values()]
    norms = [names for names in parts if names]
    yield from dict.fromkeys(name for names in norms[:1] + norms[-1:] for name in names)


def _apart(one: Tensor, other: Tensor) -> float:
    size = float(other.float().norm())
    return float((one.float() - other.float()).norm()) / max(size, 1e-30)


def _allowed(source: SourceWeights, name: str) -> float:
    """Twice what rounding to so many bits adds to weights whose largest is four times their spread."""
    bits = source.bits(name)
    return _PLAIN if bits >= 16 else min(1.0, max(0.08, 5 / (2 ** int(bits) - 1)))
