#!/usr/bin/env python3
"""What int8 costs a model, rounded plainly and with error compensation: held-out loss, and output error by layer.

    .venv/bin/python scripts/benchmarks/quantization_error.py MODEL CALIBRATION.jsonl[,…] HELD_OUT.jsonl[,…] \
        [--calibration 128] [--held-out 300] [--max-length 256] [--json]

Calibration and held-out examples come from different files. The output error of a part (a linear, an expert stack) is
|X(W - Ŵ)ᵀ| / |XWᵀ| for X the inputs it has in the fp32 model on the held-out examples, an expert's rows weighted by its
routing weights; a layer's is the mean over its parts. The loss is that of every held-out token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import toolkit.ops.registry  # noqa: F401  (registers the expert backends)
from toolkit.architecture import Architecture, describe, expert_parameters, is_experts
from toolkit.data import build_batches
from toolkit.quant import LINEAR_ROLES, ExpertStack, expert_weights, load_int8
from toolkit.quant.calibrate import compensate_model, make_batches
from toolkit.quant.gptq import row_errors
from toolkit.quant.observe import ExpertInputs, Step, decoder_layers, observe, walk

Models = dict[str, PreTrainedModel]
Weights = tuple[torch.Tensor, ...]


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    logging.disable_progress_bar()
    calibration = _examples(arguments, arguments.calibration_files, arguments.calibration)
    held_out = _examples(arguments, arguments.held_out_files, arguments.held_out)
    original, _ = load_int8(arguments.model, experts="none", linears="none")
    models: Models = {"int8": load_int8(arguments.model)[0], "int8+gptq": load_int8(arguments.model)[0]}
    started = time.monotonic()
    report = compensate_model(models["int8+gptq"], arguments.model, calibration)
    seconds = time.monotonic() - started
    layers = {name: dict(errors) for name, errors in _layer_errors(original, models, held_out)}
    losses = {name: _loss(model, held_out) for name, model in {"fp32": original, **models}.items()}
    found = {
        "model": arguments.model,
        "calibration": {"examples": len(calibration), "tokens": report.tokens, "seconds": round(seconds, 1)},
        "held_out": {"examples": len(held_out), "tokens": sum(map(len, held_out))},
        "loss": losses,
        "gap": {name: losses[name] / losses["fp32"] - 1 for name in models},
        "layer_error": {name: sum(e[name] for e in layers.values()) / len(layers) for name in models},
        "layers": layers,
    }
    print(json.dumps(found, indent=2) if arguments.json else _table(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration_files", type=lambda text: text.split(","))
    parser.add_argument("held_out_files", type=lambda text: text.split(","))
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=256)
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
) -> Iterator[tuple[str, dict[str, float]]]:
    architecture = describe(original)
    for step in walk(original, decoder_layers(architecture), make_batches(examples, original.device)):
        parts = list(_parts(original, step, architecture))
        errors = {}
        for name, model in models.items():
            each = [_relative(weight, _weights(model, part), moment) for part, weight, moment in parts]
            errors[name] = sum(each) / len(each)
        yield step.name, errors


def _parts(
    model: PreTrainedModel, step: Step, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, weights [E, O, I] and moments [E, I, I] of every linear and expert stack in a decoder layer."""
    inside = f"{step.name}."
    linears = [name for name in architecture.linear_names(*LINEAR_ROLES) if name.startswith(inside)]
    layers = [layer for layer in architecture.layers if layer.name.startswith(inside)]
    seen = observe(model, step, linears, [layer.name for layer in layers])
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
def _loss(model: PreTrainedModel, examples: Sequence[Sequence[int]]) -> float:
    """Mean cross entropy in nats of every token but each example's first."""
    total, count = 0.0, 0
    for batch in make_batches(examples, model.device, most_tokens=1024):
        kept = batch.real.view(batch.ids.shape)[:, 1:]
        logits, labels = model(batch.ids, use_cache=False).logits[:, :-1][kept], batch.ids[:, 1:][kept]
        total += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
        count += len(labels)
    return total / count


def _table(found: dict[str, Any]) -> str:
    calibration, held_out = found["calibration"], found["held_out"]
    lines = [
        f"{found['model']}: calibrated on {calibration['examples']} examples ({calibration['tokens']} tokens) in "
        f"{calibration['seconds']} s, held out {held_out['examples']} examples ({held_out['tokens']} tokens)",
        f"{'':12}{'loss':>12}{'to fp32':>12}{'layer error':>14}",
        f"{'fp32':12}{found['loss']['fp32']:12.6f}",
    ]
    for name, error in found["layer_error"].items():
        lines.append(f"{name:12}{found['loss'][name]:12.6f}{found['gap'][name]:+12.4%}{error:14.4%}")
    rounded, compensated = found["layer_error"].values()
    lines.append(f"compensated / rounded: {compensated / rounded:.3f}")
    for layer, errors in found["layers"].items():
        rounded, compensated = errors.values()
        lines.append(f"  {layer:20}{rounded:10.4%}{compensated:10.4%}{compensated / rounded:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
