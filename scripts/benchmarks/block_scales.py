#!/usr/bin/env python3
"""Whether block-128 scales for the worst rows would earn their cost: output error and bytes, beside row scales.

    .venv/bin/python scripts/benchmarks/block_scales.py MODEL HELD_OUT.jsonl[,…] [--held-out 30]

Each arm gives 128 inputs a scale of their own in those rows whose rounding error |w - ŵ| / |w| is above a multiple of
their part's median; the rest keep one scale a row. Errors are those of `quantization_error.py`, by parts, rounded
plainly; `weights` is |W - Ŵ| / |W|. Bytes are the scales' that come on top, in shares of the int8 weights.
"""

from __future__ import annotations

import argparse

import torch
from quantization_error import _examples, _parts, _relative
from transformers.utils import logging

from toolkit.architecture import describe
from toolkit.ops.int8 import dequantize, quantize
from toolkit.quant import load_int8
from toolkit.quant.gptq.calibrate import make_batches
from toolkit.quant.gptq.observe import decoder_layers, walk

BLOCK = 128
ARMS = {"one a row": float("inf"), "above 2x": 2.0, "above 1.5x": 1.5, "above 1.2x": 1.2, "every row": 0.0}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("held_out_files", type=lambda text: text.split(","))
    parser.add_argument("--held-out", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=256)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    held_out = _examples(arguments, arguments.held_out_files, arguments.held_out)
    model, _ = load_int8(arguments.model, experts="none", linears="none")
    architecture = describe(model)
    found: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    for visit in walk(model, decoder_layers(architecture), make_batches(held_out, model.device)):
        for _, weight, moment in _parts(model, visit, architecture):
            for name, row in _arms(weight.float(), moment).items():
                found[name].append(row)
    size = f"{len(held_out)} examples, {sum(map(len, held_out))} tokens, {len(found['every row'])} parts"
    print(f"{arguments.model}: {size}")
    print(f"{'block scales':14}{'output error':>14}{'of row scales':>15}{'weights':>10}{'rows':>9}{'bytes':>9}")
    plain = torch.tensor(found["one a row"]).mean(0)
    for name, rows in found.items():
        output, weights, share, more = torch.tensor(rows).mean(0).tolist()
        print(f"{name:14}{output:14.4%}{output / float(plain[0]):15.3f}{weights:10.4%}{share:9.2%}{more:9.2%}")


def _arms(weight: torch.Tensor, moment: torch.Tensor) -> dict[str, list[float]]:
    """Output error, weight error, share of rows with block scales and bytes on top, of weights [E, O, I]."""
    by_row, by_block = _rounded(weight, weight.shape[-1]), _rounded(weight, BLOCK)
    error = (weight - by_row).norm(dim=-1) / weight.norm(dim=-1).clamp_min(1e-30)
    scales = 4 * (-(-weight.shape[-1] // BLOCK) - 1) / weight.shape[-1]
    found = {}
    for name, multiple in ARMS.items():
        chosen = error >= multiple * error.median()
        mixed = torch.where(chosen[..., None], by_block, by_row)
        share = float(chosen.float().mean())
        distance = float((weight - mixed).norm() / weight.norm())
        found[name] = [_relative(weight, mixed, moment), distance, share, share * scales]
    return found


def _rounded(weight: torch.Tensor, block: int) -> torch.Tensor:
    return torch.cat([dequantize(*quantize(part.contiguous())) for part in weight.split(block, dim=-1)], dim=-1)


if __name__ == "__main__":
    main()
