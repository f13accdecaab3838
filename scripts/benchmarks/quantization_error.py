#!/usr/bin/env python3
"""What fewer bits cost a model, rounded plainly and with error compensation: held-out loss, and output error by layer.

    .venv/bin/python scripts/benchmarks/quantization_error.py MODEL CALIBRATION.jsonl[,…] HELD_OUT.jsonl[,…] \
        [--calibration 512] [--held-out 300] [--max-length 256] [--four-bit] [--bits 6] [--linears none] [--json]

Calibration and held-out examples come from different files. The output error of a part (a linear, an expert stack) is
|X(W - Ŵ)ᵀ| / |XWᵀ| for X the inputs it has in the fp32 model on the held-out examples, an expert's rows weighted by its
routing weights; a layer's is the mean over its parts. `whole` is the error of what a decoder layer adds to its input,
|L̂(x) - L(x)| / |L(x) - x| on the fp32 model's inputs x, routing included. The loss is that of every held-out token; its
difference to fp32 has the standard error over examples, since tokens of one example are not independent. With
--four-bit the experts are also in int4, plain and compensated; in a mixture of int4 and int8 layers of at most --bits
bits a weight, scales included, chosen as `quantization.budget` does, likewise; in MXFP4; and in bitsandbytes' NF4 in
blocks of 64, whose linears stay fp32, where ours are int8. With --linears none all stay fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import toolkit.ops.registry  # noqa: F401  (registers the expert backends)
from toolkit.architecture import LINEAR_ROLES, Architecture, describe, expert_parameters, is_experts
from toolkit.data import build_batches
from toolkit.ops.experts import ExpertStack, expert_weights
from toolkit.plan.skeletons import shape_of, shapes_of
from toolkit.plan.stacks import mixture_of, stack_bytes, with_budget, with_stacks
from toolkit.quant import load_int8
from toolkit.quant.gains import measure_gains
from toolkit.quant.gptq.calibrate import compensate_model, make_batches
from toolkit.quant.gptq.error_feedback import row_errors
from toolkit.quant.gptq.observe import ExpertInputs, LayerVisit, decoder_layers, observe, walk

Models = dict[str, PreTrainedModel]
Weights = tuple[torch.Tensor, ...]


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    logging.disable_progress_bar()
    calibration = _examples(arguments, arguments.calibration_files, arguments.calibration)
    held_out = _examples(arguments, arguments.held_out_files, arguments.held_out)
    original, _ = load_int8(arguments.model, experts="none", linears="none")
    kinds = ("int8", "int4") if arguments.four_bit else ("int8",)
    models: Models = {}
    for kind in kinds:
        models[kind] = load_int8(arguments.model, experts=kind, linears=arguments.linears)[0]
        models[f"{kind}+gptq"] = load_int8(arguments.model, experts=kind, linears=arguments.linears)[0]
        started = time.monotonic()
        report = compensate_model(models[f"{kind}+gptq"], arguments.model, calibration)
        seconds = time.monotonic() - started
    if arguments.four_bit:
        chosen = _mixture(arguments, calibration, models["int4"])
        for name in ("mixed", "mixed+gptq"):
            models[name] = load_int8(arguments.model, experts="int4", linears=arguments.linears, stacks=chosen)[0]
        compensate_model(models["mixed+gptq"], arguments.model, calibration)
        models["mxfp4"] = load_int8(arguments.model, experts="mxfp4", linears=arguments.linears)[0]
        models["nf4"] = _in_nf4(load_int8(arguments.model, experts="none", linears="none")[0])
    layers, whole = {}, {}
    for layer, errors, outputs in _layer_errors(original, models, held_out):
        layers[layer], whole[layer] = errors, outputs
    losses = {name: _losses(model, held_out) for name, model in {"fp32": original, **models}.items()}
    tokens = torch.tensor([len(row) - 1 for row in sorted(filter(len, held_out), key=len, reverse=True)]).double()
    found = {
        "model": arguments.model,
        "calibration": {"examples": len(calibration), "tokens": report.tokens, "seconds": round(seconds, 1)},
        "held_out": {"examples": len(held_out), "tokens": sum(map(len, held_out))},
        "loss": {name: float(each.sum() / tokens.sum()) for name, each in losses.items()},
        "gap": {name: _gap(losses[name], losses["fp32"], tokens) for name in models},
        "layer_error": {name: sum(e[name] for e in layers.values()) / len(layers) for name in models},
        "whole_error": {name: sum(e[name] for e in whole.values()) / len(whole) for name in models},
        "layers": layers,
        "whole": whole,
    }
    print(json.dumps(found, indent=2) if arguments.json else _table(found))


def _mixture(arguments: argparse.Namespace, calibration: list[list[int]], int4: PreTrainedModel) -> dict[str, str]:
    """What each stack is in under a budget of so many bits a weight, or of all in int4 where that takes more."""
    shapes = shapes_of(shape_of(arguments.model))
    weights = sum(math.prod(shapes.parameters[name]) for layer in shapes.architecture.layers for name in layer.stacks)
    least = sum(stack_bytes(shapes, "int4", 4).values())
    shapes, choice, _ = with_budget(shapes, str(max(least, int(arguments.bits * weights / 8))))
    stacks = dict(shapes.stacks)
    if choice is not None:
        gains = measure_gains(int4, arguments.model, calibration, tuple(choice.extra), choice.by_gain)
        stacks = choice.kinds(gains.chosen)
        print(f"gains of int8: {gains.gains}", file=sys.stderr)
    print(mixture_of(with_stacks(replace(shapes, budget=None), stacks)), file=sys.stderr)
    return stacks


def _in_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """The experts rounded by bitsandbytes, one matrix [O, I] at a time, and multiplied out."""
    from bitsandbytes.functional import quantize_4bit

    for layer in describe(model).layers:
        for name in layer.stacks:
            for matrix in model.get_parameter(name).data:
                packed, state = quantize_4bit(matrix.float().contiguous(), blocksize=64, quant_type="nf4")
                codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), -1).flatten().long()
                values = state.code[codes] * state.absmax.repeat_interleave(64)[: len(codes)]
                matrix.copy_(values.view(matrix.shape))
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration_files", type=lambda text: text.split(","))
    parser.add_argument("held_out_files", type=lambda text: text.split(","))
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--bits", type=float, default=6.0)
    parser.add_argument("--linears", choices=("int8", "none"), default="int8")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _examples(arguments: argparse.Namespace, files: Sequence[str], count: int) -> list[list[int]]:
    """`count` examples in all, the same number of each file."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    found: list[list[int]] = []
    for number, file in enumerate(files):
        share = count // len(files) + (number < count % len(files))
        batches = build_batches(tokenizer, train=file, max_length=arguments.max_length, max_samples=share)
        found += batches.train["input_ids"]
    return found


def _layer_errors(
    original: PreTrainedModel, models: Models, examples: Sequence[Sequence[int]]
) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    """Each layer's name, the mean error of its parts and that of its whole output, by model."""
    architecture = describe(original)
    for visit in walk(original, decoder_layers(architecture), make_batches(examples, original.device)):
        parts = list(_parts(original, visit, architecture))
        errors = {}
        for name, model in models.items():
            each = [_relative(weight, _weights(model, part), moment) for part, weight, moment in parts]
            errors[name] = sum(each) / len(each)
        yield visit.name, errors, _output_errors(original, models, visit)


def _output_errors(original: PreTrainedModel, models: Models, visit: LayerVisit) -> dict[str, float]:
    """|L̂(x) - L(x)| / |L(x) - x| over the real rows x, the layer called just as the fp32 model calls it."""
    squares, change = dict.fromkeys(models, 0.0), 0.0
    for real, call in visit.passes:
        x, wanted = call.args[0], _rows(call(), real)
        change += float((wanted - _rows(x, real)).square().sum())
        for name, model in models.items():
            found = model.get_submodule(visit.name)(*call.args, **call.keywords)
            squares[name] += float((_rows(found, real) - wanted).square().sum())
    return {name: (square / change) ** 0.5 for name, square in squares.items()}


def _rows(output: Any, real: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(-1, hidden.shape[-1])[real].double()


def _parts(
    model: PreTrainedModel, visit: LayerVisit, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, weights [E, O, I] and moments [E, I, I] of every linear and expert stack in a decoder layer."""
    inside = f"{visit.name}."
    linears = [name for name in architecture.linear_names(*LINEAR_ROLES) if name.startswith(inside)]
    layers = [layer for layer in architecture.layers if layer.name.startswith(inside)]
    seen = observe(model, visit, linears, [layer.name for layer in layers])
    for name in linears:
        if seen.linears[name].rows:
            yield name, _weights(model, name), seen.linears[name].moment[None]
    for layer in layers:
        up, down = layer.stacks
        moments = _expert_moments(model.get_submodule(layer.name), seen.experts[layer.name])
        for name, moment in zip((up, down), moments, strict=True):
            yield name, _weights(model, name), moment


def _expert_moments(experts: nn.Module, inputs: ExpertInputs) -> tuple[torch.Tensor, torch.Tensor]:
    weights, x_TH = expert_weights(experts), torch.cat(inputs.hidden)
    up_EOI, ups, downs = weights.up.dequantized(), [], []
    for expert, (token, weight) in enumerate(inputs.by_expert(up_EOI.shape[0])):
        x_NH = x_TH[token]
        y_NO = x_NH @ up_EOI[expert].t()
        hidden_NI = weights.gate(y_NO if weights.up.bias is None else y_NO + weights.up.bias[expert])
        for x, found in ((x_NH * weight[:, None], ups), (hidden_NI * weight[:, None], downs)):
            found.append(x.t() @ x)
    return torch.stack(ups), torch.stack(downs)


def _weights(model: PreTrainedModel, part: str) -> torch.Tensor:
    """A linear's or stack's weights as [E, O, I] in fp32, int8 ones multiplied out."""
    parent, _, name = part.rpartition(".")
    module: Any = model.get_submodule(parent)
    if is_experts(module):
        weights = expert_weights(module)
        return (weights.down if name == expert_parameters(module)[1] else weights.up).dequantized()
    linear = getattr(module, name)
    scale = getattr(linear, "weight_scale", None)
    return ExpertStack(linear.weight[None], None if scale is None else scale[None], None, False).dequantized()


def _relative(weight: torch.Tensor, approximate: torch.Tensor, moment: torch.Tensor) -> float:
    nothing, scale = torch.zeros_like(weight), torch.ones(weight.shape[:2])
    error = row_errors(weight - approximate, nothing, scale, moment).sum()
    return float((error / row_errors(weight, nothing, scale, moment).sum()).sqrt())


@torch.no_grad()
def _losses(model: PreTrainedModel, examples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Each example's cross entropy in nats, summed over all tokens but its first; the longest example first."""
    found = []
    for batch in make_batches(examples, model.device, most_tokens=1024):
        kept = batch.real.view(batch.ids.shape)[:, 1:]
        logits = model(batch.ids, use_cache=False).logits[:, :-1].float().transpose(1, 2)
        each = nn.functional.cross_entropy(logits, batch.ids[:, 1:], reduction="none").double()
        found.append((each * kept).sum(-1))
    return torch.cat(found)


def _gap(losses: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """A mean loss's relative gap to the reference, and its standard error from the examples' paired differences."""
    difference, count = losses - reference, len(tokens)
    gap = difference.sum() / reference.sum()
    spread = (difference - gap * reference).square().sum() * count / max(1, count - 1)
    return float(gap), float(spread.sqrt() / reference.sum())


def _table(found: dict[str, Any]) -> str:
    calibration, held_out = found["calibration"], found["held_out"]
    lines = [
        f"{found['model']}: calibrated on {calibration['examples']} examples ({calibration['tokens']} tokens) in "
        f"{calibration['seconds']} s, held out {held_out['examples']} examples ({held_out['tokens']} tokens)",
        f"{'':12}{'loss':>12}{'to fp32':>12}{'± s.e.':>12}{'layer error':>14}{'whole':>12}",
        f"{'fp32':12}{found['loss']['fp32']:12.6f}",
    ]
    for name, error in found["layer_error"].items():
        (gap, spread), whole = found["gap"][name], found["whole_error"][name]
        lines.append(f"{name:12}{found['loss'][name]:12.6f}{gap:+12.4%}{spread:12.4%}{error:14.4%}{whole:12.4%}")
    for what, label in (("layer_error", "parts"), ("whole_error", "whole layers")):
        pairs = [name for name in found[what] if f"{name}+gptq" in found[what]]
        shares = ", ".join(f"{name} {found[what][f'{name}+gptq'] / found[what][name]:.3f}" for name in pairs)
        lines.append(f"compensated / rounded, {label}: {shares}")
    for layer, errors in found["layers"].items():
        rounded, compensated = errors["int8"], errors["int8+gptq"]
        whole_rounded, whole_compensated = (found["whole"][layer][name] for name in ("int8", "int8+gptq"))
        lines.append(
            f"  {layer:20}{rounded:10.4%}{compensated:10.4%}{compensated / rounded:8.3f}"
            f"{whole_rounded:12.4%}{whole_compensated:10.4%}{whole_compensated / whole_rounded:8.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
