"""Error compensation of a loaded int8 model: walk its layers in order, watch what each part is given, round again.

One decoder layer at a time: its original weights come from the checkpoint, its inputs from the layers before it, which
are compensated already. Experts are calibrated one by one, on the rows routed to each. Libraries that calibrate keep
the 16-bit model in memory and know `nn.Linear` only.

    N rows of one expert, T rows of all, E experts, B of them at a time, H hidden, O outputs, I inputs of a projection
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.architecture import Architecture, ExpertLayer, describe
from toolkit.errors import ModelError
from toolkit.ops.experts import ExpertStack, expert_weights
from toolkit.ops.four_bit import packed_codes
from toolkit.ops.int8 import Int8Linear, quantize
from toolkit.quant.gptq.error_feedback import Solved, blend, compensate, compensate_int4, rounded_to_int4, row_errors
from toolkit.quant.gptq.observe import Batch, ExpertInputs, LayerVisit, LinearInputs, decoder_layers, observe, walk
from toolkit.quant.gptq.search import effort_for
from toolkit.quant.source import SourceWeights
from toolkit.recipe.sizes import MOST_CALIBRATION_TOKENS
from toolkit.steps import advance

__all__ = ["Compensation", "ExpertError", "PartError", "calibration_examples", "compensate_model", "make_batches"]

_GROUP_ELEMENTS = 1 << 25
_TYPICAL_ROWS = 128.0
"""How many rows of its layer's mean are added to an expert's own."""
_DAMPING, _FEW_ROWS = 0.01, 0.3
"""GPTQ's usual damping, and how it grows with inputs per row: the fewer rows, the less they say about others. Measured
on held-out text with 24 / 96 / 384 examples: 0.49 / 0.46 / 0.43 of the plain error, 0.55 / 0.47 / 0.42 without."""
_WORST = 10


@dataclass(frozen=True)
class PartError:
    """A linear or an expert stack: rows it saw, and |X(W - Ŵ)ᵀ| / |XWᵀ| over them, rounded plainly and compensated.

    A linear counts as one expert. An expert's rows count with their routing weight. `unseen` experts met no row, `kept`
    ones stay rounded plainly.
    """

    layer: str
    part: str
    rows: int
    rounded: float
    compensated: float
    experts: int
    unseen: int
    kept: int


@dataclass(frozen=True)
class ExpertError:
    """One expert of a stack, as `PartError`."""

    part: str
    expert: int
    rows: int
    rounded: float
    compensated: float


@dataclass(frozen=True)
class Compensation:
    """What was compensated: every part in model order, and the experts whose error stays largest, worst first."""

    examples: int
    tokens: int
    parts: tuple[PartError, ...]
    worst: tuple[ExpertError, ...]

    @property
    def rounded(self) -> float:
        """Mean over the parts, rounded plainly."""
        return sum(part.rounded for part in self.parts) / len(self.parts)

    @property
    def compensated(self) -> float:
        """Mean over the parts, compensated."""
        return sum(part.compensated for part in self.parts) / len(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "rounded": self.rounded, "compensated": self.compensated}


@torch.no_grad()
def compensate_model(
    model: PreTrainedModel, name_or_path: str, examples: Sequence[Sequence[int]], *, revision: str = "main"
) -> Compensation:
    """Round the int8 linears and expert stacks of a loaded model again, with error feedback, in place.

    Args:
        model: as `load_int8` gave it, without an adapter.
        name_or_path: the checkpoint it came from; its weights are read again, one decoder layer at a time.
        examples: token ids of the calibration examples.

    Deterministic. Parts outside the decoder layers, and those that no token reaches, stay as they are.

    Raises:
        ModelError: the checkpoint holds no unrounded weights, or none of its layers is in int8.
    """
    architecture = describe(model)
    source = SourceWeights(name_or_path, revision=revision)
    batches = make_batches(examples, model.device)
    parts: list[PartError] = []
    experts: list[ExpertError] = []
    depth = len({layer.name for layer in architecture.layers})
    for number, visit in enumerate(walk(model, decoder_layers(architecture), batches), 1):
        # In a call of its own: a part left in a variable here would keep its weights through the next layer.
        for total, group in _solve_layer(model, visit, architecture, source):
            parts.append(total)
            experts += group if total.experts > 1 else ()
        advance(number, max(number, depth), "layers")
    if not parts:
        raise ModelError(f"{name_or_path}: nothing in int8 to compensate; set quantization.experts or linears to int8")
    experts.sort(key=lambda expert: (-expert.compensated, expert.part, expert.expert))
    return Compensation(len(examples), sum(map(len, examples)), tuple(parts), tuple(experts[:_WORST]))


def calibration_examples(examples: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The first examples, as many as make up 262,144 tokens at most; at least one.

    A layer's inputs are held for all of them, 4·H bytes a token.
    """
    tokens = accumulate(map(len, examples))
    return examples[: max(1, bisect_right(list(tokens), MOST_CALIBRATION_TOKENS))]


def make_batches(examples: Sequence[Sequence[int]], device: torch.device, *, most_tokens: int = 4096) -> list[Batch]:
    """Examples of like length together. Padding on the right is out of sight of causal layers, so it needs no mask."""
    batches, group = [], list[Sequence[int]]()
    for example in sorted(filter(len, examples), key=len, reverse=True):
        if group and len(group[0]) * (len(group) + 1) > most_tokens:
            batches.append(_pad(group, device))
            group = []
        group.append(example)
    return [*batches, _pad(group, device)] if group else batches


def _pad(group: list[Sequence[int]], device: torch.device) -> Batch:
    ids = torch.zeros(len(group), len(group[0]), dtype=torch.long)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(group):
        ids[row, : len(example)] = torch.tensor(example)
        real[row, : len(example)] = True
    return Batch(ids.to(device), real.flatten().to(device))


@dataclass(frozen=True)
class _Part:
    """A stack at work: its original weights, as stored there, and each expert's sum of x xᵀ [I, I], when asked for."""

    layer: str
    name: str
    stack: ExpertStack
    source: torch.Tensor
    moment_of: Callable[[int], torch.Tensor]
    rows: torch.Tensor
    is_transposed: bool = False
    """Whether the original is [E, I, O]."""

    def mean_moment(self) -> torch.Tensor:
        """Of one row, whichever expert it went to: [I, I]."""
        total = self.moment_of(0).clone()
        for expert in range(1, len(self.rows)):
            total += self.moment_of(expert)
        return total / self.rows.sum().clamp_min(1)

    def original(self, group: range) -> torch.Tensor:
        """These experts' weights [B, O, I] in fp32, where the stack lies."""
        weight = self.source[group.start : group.stop].to(self.stack.weight.device)
        return (weight.transpose(-1, -2) if self.is_transposed else weight).float()

    def write(self, expert: int, solved: Solved, position: int) -> None:
        """Replace one expert's integers and scales by those of a matrix that was solved."""
        stack, stored = self.stack, solved.stored[position]
        assert stack.scale is not None
        stack.scale[expert].copy_(solved.scale[position])
        if stack.step is None or solved.step is None:
            stack.weight[expert].copy_(stored.t() if stack.is_transposed else stored)
            return
        step = solved.step[position]
        stack.step[expert].copy_(step)
        codes = stored.unflatten(-1, (len(step), -1)) // step.t().unsqueeze(-1)
        stack.weight[expert].copy_(packed_codes(codes.flatten(-2)))


def _solve_layer(
    model: nn.Module, visit: LayerVisit, architecture: Architecture, source: SourceWeights
) -> list[tuple[PartError, list[ExpertError]]]:
    return [_solve(part) for part in _parts(model, visit, architecture, source)]


def _parts(model: nn.Module, visit: LayerVisit, architecture: Architecture, source: SourceWeights) -> Iterator[_Part]:
    """Every int8 part of one decoder layer that a token reached. A part must be solved before the next is asked for."""
    inside = f"{visit.name}."
    linears = [linear.name for linear in architecture.linears if linear.name.startswith(inside)]
    linears = [name for name in linears if isinstance(model.get_submodule(name), Int8Linear)]
    layers = [layer for layer in architecture.layers if layer.name.startswith(inside)]
    layers = [layer for layer in layers if expert_weights(model.get_submodule(layer.name)).up.row_scale is not None]
    if not linears and not layers:
        return
    seen = observe(model, visit, linears, [layer.name for layer in layers])
    with source.layer(visit.name) as weights:
        for name in linears:
            yield _linear_part(visit.name, name, model.get_submodule(name), weights, seen.linears[name])
        for layer in layers:
            yield from _expert_parts(
                visit.name, layer, model.get_submodule(layer.name), weights, seen.experts[layer.name]
            )


def _linear_part(
    layer: str, name: str, linear: nn.Module, source: Mapping[str, torch.Tensor], inputs: LinearInputs
) -> _Part:
    """A linear as a stack of one."""
    stack = ExpertStack(linear.weight[None], linear.weight_scale[None], None, False)  # type: ignore[index]
    return _Part(
        layer, name, stack, source[f"{name}.weight"][None], lambda _: inputs.moment, torch.tensor([inputs.rows])
    )


def _expert_parts(
    name: str, layer: ExpertLayer, module: nn.Module, source: Mapping[str, torch.Tensor], inputs: ExpertInputs
) -> Iterator[_Part]:
    """Both stacks of an experts module; the second sees what the first, compensated by then, gives it."""
    if not inputs.hidden:
        return
    weights, x_TH = expert_weights(module), torch.cat(inputs.hidden)
    routed = inputs.by_expert(layer.num_experts)
    rows = torch.tensor([len(token) for token, _ in routed])

    def up_moment(expert: int) -> torch.Tensor:
        token, weight = routed[expert]
        return _moment(x_TH[token].float(), weight)

    def down_moment(expert: int) -> torch.Tensor:
        token, weight = routed[expert]
        return _moment(weights.gate(_project(x_TH[token].float(), weights.up, expert)), weight)

    up, down = layer.stacks
    yield _Part(name, up, weights.up, source[up], up_moment, rows, layer.is_transposed)
    yield _Part(name, down, weights.down, source[down], down_moment, rows, layer.is_transposed)


def _moment(x_NI: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """Sum of x xᵀ, each row as strong as its expert's share in the layer's output."""
    x_NI = x_NI * weight_N[:, None]
    return x_NI.t() @ x_NI


def _project(x_NI: torch.Tensor, stack: ExpertStack, expert: int) -> torch.Tensor:
    y_NO = x_NI @ stack.of(expert).dequantized()[0].t()
    return y_NO if stack.bias is None else y_NO + stack.bias[expert].float()


def _solve(part: _Part) -> tuple[PartError, list[ExpertError]]:
    """Compensate a stack a few experts at a time, and write what is better than before."""
    experts, mean = len(part.rows), part.mean_moment()
    size = max(1, _GROUP_ELEMENTS // max(mean.numel(), part.stack.weight[0].numel()))
    groups = [range(start, min(start + size, experts)) for start in range(0, experts, size)]
    squares = torch.cat([_solve_group(part, group, mean) for group in groups])
    return _part_errors(part, squares.double())


def _solve_group(part: _Part, group: range, mean: torch.Tensor) -> torch.Tensor:
    """[B, 4], squared: each expert's |XWᵀ|, its error rounded plainly and as written; and 1 where it stays plain."""
    weight, moment = part.original(group), torch.stack([part.moment_of(expert) for expert in group])
    rows = part.rows[group.start : group.stop].to(moment.device)
    damping = (_DAMPING + _FEW_ROWS * weight.shape[-1] / (rows + _TYPICAL_ROWS)).clamp(max=1.0)
    blended = blend(moment, rows, mean, _TYPICAL_ROWS)
    if part.stack.four_bits:
        solved = compensate_int4(weight, blended, damping)
        found = rounded_to_int4(weight)
        plain, scale = found.stored, found.scale
    else:
        solved = compensate(weight, blended, damping, effort_for(*weight.shape[1:]))
        plain, scale = quantize(weight)
    before = row_errors(weight, plain, scale, moment).sum(-1)
    after = row_errors(weight, solved.stored, solved.scale, moment).sum(-1)
    signal = row_errors(weight, plain, torch.zeros_like(scale), moment).sum(-1)
    # Solved on a mixture with other experts' rows: on its own rows an expert may have fared worse.
    worse = after > before
    for position, expert in enumerate(group):
        if not worse[position]:
            part.write(expert, solved, position)
    return torch.stack([signal, before, torch.where(worse, before, after), worse.float()], dim=-1).cpu()


def _part_errors(part: _Part, squares: torch.Tensor) -> tuple[PartError, list[ExpertError]]:
    signal, before, after, worse = squares.unbind(-1)
    rounded, compensated = _relative(before, signal), _relative(after, signal)
    rows = part.rows.tolist()
    total = PartError(
        layer=part.layer,
        part=part.name,
        rows=sum(rows),
        rounded=float(_relative(before.sum(), signal.sum())),
        compensated=float(_relative(after.sum(), signal.sum())),
        experts=len(rows),
        unseen=rows.count(0),
        kept=int(worse.sum()),
    )
    each = zip(rows, rounded.tolist(), compensated.tolist(), strict=True)
    return total, [ExpertError(part.name, number, *values) for number, values in enumerate(each) if values[0]]


def _relative(error: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    return torch.where(signal > 0, error / signal, torch.zeros_like(signal)).sqrt()
