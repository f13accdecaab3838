#!/usr/bin/env python3
"""One command that says what the Triton experts are worth on this card: parity, speed, limits, memory.

    python scripts/gpu_check.py              # any CUDA card, torch and triton alone, under ten minutes
    python scripts/gpu_check.py --interpret  # the parity part on a CPU, in Triton's interpreter

Exit codes: 0 parity holds, 1 it does not, 5 no CUDA card. Speeds are set against what stock software does with bf16
weights: PEFT's fold `W + BA` of every expert, multiplied by `grouped_mm` or, as RTX cards get it, expert by expert.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ("expert_layer", "expert_layer_w8a8")
SECONDS = 300.0
"""No new measurement begins so long after the parity part."""
PARITY_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Stack:
    """As `toolkit.quant.ExpertStack`, which needs transformers."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    is_transposed: bool = False
    step: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, O, I]."""
        if self.scale is not None and self.weight.dtype == torch.uint8:
            from toolkit.ops import four_bit

            return four_bit.dequantize(four_bit.FourBits(self.weight, self.scale, self.step)).to(dtype)
        weight = self.weight.transpose(1, 2) if self.is_transposed else self.weight
        return weight.to(dtype) if self.scale is None else weight.to(dtype) * self.scale.to(dtype).unsqueeze(-1)

    def dequantized(self) -> torch.Tensor:
        """[E, O, I], exactly."""
        return self.dense(torch.float64)


@dataclass(frozen=True)
class Weights:
    """One frozen expert layer."""

    up: Stack
    down: Stack
    gate: Callable[[torch.Tensor], torch.Tensor]
    post_norm: None = None


@dataclass(frozen=True)
class Case:
    """T tokens, K experts per token, E experts, H hidden, I intermediate, R rank, and how the weights lie."""

    T: int
    K: int
    E: int
    H: int
    I: int  # noqa: E741
    R: int
    is_int8: bool = True
    is_transposed: bool = False
    has_bias: bool = False
    is_hot: bool = False
    four_bits: str = ""


SMALL = [
    Case(7, 2, 4, 12, 20, 3),
    Case(1, 1, 1, 5, 3, 1, is_int8=False),
    Case(5, 3, 3, 17, 9, 4, is_transposed=True, has_bias=True),
    Case(21, 1, 13, 11, 7, 2, is_hot=True),
    Case(9, 2, 31, 6, 10, 16),
]
LARGE = [
    Case(512, 4, 16, 512, 384, 16),
    Case(512, 4, 16, 512, 384, 16, is_transposed=True, has_bias=True),
    Case(300, 2, 5, 520, 200, 70, is_int8=False),
]
FOUR_BITS = [
    Case(7, 2, 3, 64, 64, 3, has_bias=True, four_bits="int4"),
    Case(3, 1, 2, 64, 128, 16, four_bits="mxfp4"),
    Case(5, 2, 2, 64, 64, 2, four_bits="grouped"),
    *(Case(512, 4, 16, 576, 384, 16, four_bits=kind) for kind in ("int4", "mxfp4", "grouped")),
]
"""In groups of 32; the large ones' halves are no whole tiles."""
LAYERS = {"OLMoE-1B-7B": (8, 64, 2048, 1024), "Qwen3-30B-A3B": (8, 128, 2048, 768)}
"""K, E, H, I."""


def swiglu(y: torch.Tensor) -> torch.Tensor:
    """The usual gate."""
    left, right = y.chunk(2, dim=-1)
    return functional.silu(left) * right


def packed(weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> Stack:
    """A float stack [E, O, I] in four bits."""
    from toolkit.ops import four_bit
    from toolkit.parts import FOUR_BIT_GROUP

    if kind == "grouped":
        grouped = weight.unflatten(-1, (-1, FOUR_BIT_GROUP))
        scale = (grouped.abs().amax(-1) / 7).half()
        codes = (grouped / scale.unsqueeze(-1)).round().clamp(-8, 7).add(8).to(torch.uint8)
        return Stack(four_bit.turned(codes.flatten(-2)), scale.transpose(1, 2).contiguous(), bias, True)
    found = [(four_bit.quantize_int4 if kind == "int4" else four_bit.quantize_mxfp4)(each) for each in weight]
    parts = [torch.stack(column) for column in zip(*found, strict=True) if column[0] is not None]
    return Stack(parts[0], parts[1], bias, True, *parts[2:])


def build(case: Case, device: str, dtype: torch.dtype) -> tuple[Weights, list[torch.Tensor], torch.Tensor]:
    """Weights; x, routing weights, up A, up B, down A and B, all with gradients; routing. Sizes as after training."""
    torch.manual_seed(0)

    def stack(out: int, in_: int) -> Stack:
        weight, scale = torch.randn(case.E, out, in_, device=device) * in_**-0.5, None
        bias = torch.randn(case.E, out, device=device) * 0.1 if case.has_bias else None
        if case.four_bits:
            return packed(weight, bias, case.four_bits)
        if case.is_int8:
            scale = weight.abs().amax(-1) / 127
            weight = (weight / scale.unsqueeze(-1)).round().to(torch.int8)
        stored = weight.transpose(1, 2).contiguous() if case.is_transposed else weight
        return Stack(stored if case.is_int8 else stored.to(dtype), scale, bias, case.is_transposed)

    def leaf(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * size).to(dtype).requires_grad_()

    routing = torch.rand(case.T, case.E, device=device)
    index = torch.full((case.T, case.K), case.E - 1, device=device) if case.is_hot else routing.topk(case.K).indices
    factors = [
        leaf(case.E, case.R, case.H, size=case.H**-0.5), leaf(case.E, 2 * case.I, case.R, size=0.3 * case.R**-0.5),
        leaf(case.E, case.R, case.I, size=case.I**-0.5), leaf(case.E, case.H, case.R, size=0.3 * case.R**-0.5),
    ]  # fmt: skip
    mixing = torch.rand(case.T, case.K, device=device).softmax(-1).to(dtype).requires_grad_()
    return (
        Weights(stack(2 * case.I, case.H), stack(case.H, case.I), swiglu),
        [leaf(case.T, case.H), mixing, *factors],
        index,
    )


def dense_layer(leaves: list[torch.Tensor], index: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Every expert multiplied out in autograd, in the leaves' dtype."""
    from toolkit.ops import reference
    from toolkit.ops.factors import LoraFactors

    x, mixing, *factors = leaves
    return reference.expert_layer(x, index, mixing, weights, LoraFactors(*factors[:2]), LoraFactors(*factors[2:]))


def our_layer(leaves: list[torch.Tensor], index: torch.Tensor, weights: Weights, entry: str) -> torch.Tensor:
    """The Triton experts."""
    from toolkit.ops import triton
    from toolkit.ops.factors import LoraFactors

    x, mixing, *factors = leaves
    layer = getattr(triton, entry)
    output: torch.Tensor = layer(x, index, mixing, weights, LoraFactors(*factors[:2]), LoraFactors(*factors[2:]))
    return output


def gradients(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of a fixed scalar of it."""
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output).sin()
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves)]


def parity(case: Case, device: str, dtype: torch.dtype, roundings: float, entry: str) -> tuple[bool, float, float]:
    """Whether no tensor is further from the fp64 truth than the law in this dtype, and both worst relative errors."""
    weights, leaves, index = build(case, device, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(dense_layer(exact, index, weights), exact)
    plain = gradients(dense_layer(leaves, index, weights), leaves)
    ours = gradients(our_layer(leaves, index, weights, entry), leaves)
    holds, errors = True, []
    for wanted, theirs, got in zip(truth, plain, ours, strict=True):
        size = wanted.norm().clamp(min=1e-30)
        mine, law = float((got.double() - wanted).norm() / size), float((theirs.double() - wanted).norm() / size)
        holds &= mine <= law + roundings * torch.finfo(dtype).eps  # false for NaN as well
        errors.append((mine, law))
    worst_mine, worst_law = (max(column) for column in zip(*errors, strict=True))
    return holds, worst_mine, worst_law


def entries_for(case: Case, dtype: torch.dtype) -> tuple[str, ...]:
    """Rows are split in two int8 digits where they have sixteen bits and meet int8 weights."""
    is_whole = case.is_int8 and case.four_bits in ("", "int4")
    return ENTRIES if is_whole and dtype != torch.float32 else ENTRIES[:1]


def check_parity(device: str, cases: list[Case]) -> bool:
    """All cases in all dtypes, one line each; rows in two int8 digits where others have sixteen bits."""
    # The interpreter does not round to bf16 but cuts off, so there fp16 stands for the sixteen-bit kernels.
    slack = {torch.float32: 20.0, (torch.float16 if device == "cpu" else torch.bfloat16): 2.0}
    good = True
    for dtype, roundings in slack.items():
        for case in cases:
            for entry in entries_for(case, dtype):
                holds, mine, law = parity(case, device, dtype, roundings, entry)
                good &= holds
                say(f"parity {'ok  ' if holds else 'FAIL'} {dtype} {entry} error {mine:.1e}, law {law:.1e}  {case}")
    return good


def say(line: str) -> None:
    """Print at once: a run that is cut off has shown what it found."""
    print(line, flush=True)


def milliseconds(step: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of a step on the card, after two that are not counted."""
    times = []
    for number in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure_limits() -> dict[str, float]:
    """What this card does at best: bf16 TFLOP/s, int8 TOP/s, GB/s."""
    size = 4096
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tflops = 2 * size**3 / milliseconds(lambda: a @ b) / 1e9
    c = torch.randint(-99, 99, (size, size), device="cuda", dtype=torch.int8)
    tops = 2 * size**3 / milliseconds(lambda: torch._int_mm(c, c.t())) / 1e9
    source = torch.empty(1 << 29, device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6
    return {"bf16_tflops": tflops, "int8_tops": tops, "memory_gbps": rate}


def stock_layer(
    leaves: list[torch.Tensor],
    index: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    multiply: Any,
    is_folded: bool,
) -> torch.Tensor:
    """bf16 weights on sorted rows, as transformers computes; folded, as PEFT's `target_parameters` adapts."""
    x, mixing, up_A, up_B, down_A, down_B = leaves
    if is_folded:
        up, down = torch.baddbmm(up, up_B, up_A), torch.baddbmm(down, down_B, down_A)
    expert, order = index.flatten().sort()
    token = order // index.shape[1]
    ends = torch.searchsorted(expert, torch.arange(up.shape[0], device=x.device), right=True).int()
    rows = multiply(swiglu(multiply(x[token], up, ends)), down, ends) * mixing.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's own grouped product."""
    return torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def loop(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Expert by expert, the host waiting for the routing: what `grouped_mm` is on RTX cards."""
    bounds = [0, *ends.tolist()]
    return torch.cat([rows[a:b] @ weight[e].t() for e, (a, b) in enumerate(pairwise(bounds))])


def arms(leaves: list[torch.Tensor], index: torch.Tensor, weights: Weights) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed: forward and backward of the layer."""
    up, down = weights.up.dense(torch.bfloat16), weights.down.dense(torch.bfloat16)
    int4 = Weights(packed(up, None, "int4"), packed(down, None, "int4"), swiglu)
    for entry, (kind, there) in itertools.product(ENTRIES, (("", weights), (", int4", int4))):
        given = (leaves, index, there, entry)
        yield f"ours, {entry}{kind}", lambda given=given: gradients(our_layer(*given), leaves)
    for multiply in (grouped, loop):
        yield (
            f"stock with PEFT's fold, {multiply.__name__}",
            lambda multiply=multiply: gradients(stock_layer(leaves, index, up, down, multiply, True), leaves),
        )
        yield (
            f"stock without adapter, {multiply.__name__}",
            lambda multiply=multiply: gradients(stock_layer(leaves, index, up, down, multiply, False), leaves[:2]),
        )


def check_speed(name: str, tokens: int, limits: dict[str, float], until: float) -> dict[str, Any]:
    """One layer's forward and backward by every arm, and what the measured limits would allow."""
    from scripts.benchmarks.kernel_cost import LayerShape, backward, forward, step_bytes

    K, E, H, I = LAYERS[name]  # noqa: E741
    shape = LayerShape(name, tokens, K, E, H, I)
    weights, leaves, index = build(Case(tokens, K, E, H, I, shape.R), "cuda", torch.bfloat16)
    work = forward(shape) + backward(shape)
    flops, rate = limits["bf16_tflops"] * 1e12, limits["memory_gbps"] * 1e9
    least = 1e3 * sum(max(w.flops / flops, w.moved / rate) for w in work)
    result: dict[str, Any] = {"layer": name, "tokens": tokens, "limit_ms": least, "planned_bytes": step_bytes(shape)}
    say(f"{name}, {tokens} tokens, forward and backward: no less than {least:.2f} ms at the measured limits")
    for arm, step in arms(leaves, index, weights):
        if time.monotonic() > until:
            say(f"  {arm}: skipped, the time is up")
            continue
        try:
            result[arm] = milliseconds(step)
        except (RuntimeError, NotImplementedError) as error:  # out of memory, or a product this card has not
            say(f"  {arm}: {str(error).splitlines()[0]}")
            continue
        say(f"  {arm}: {result[arm]:.2f} ms, {least / result[arm]:.0%} of the limit")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(our_layer(leaves, index, weights, "expert_layer"), leaves)
    torch.cuda.synchronize()
    result["measured_bytes"] = torch.cuda.max_memory_allocated() - before
    say(f"  memory of the step: planned {result['planned_bytes'] / 1e6:.0f} MB, measured "
        f"{result['measured_bytes'] / 1e6:.0f} MB")  # fmt: skip
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the check; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="parity alone, on the CPU")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    if not options.interpret and not torch.cuda.is_available():
        print("gpu_check.py: no CUDA card here; run it on one, or with --interpret on the CPU", file=sys.stderr)
        return 5
    # Both are read when triton and our package are first imported, further down.
    os.environ["TRITON_INTERPRET"] = "1" if options.interpret else "0"
    sys.path.insert(0, str(ROOT))
    if options.interpret:
        good, report = check_parity("cpu", SMALL[:4] + FOUR_BITS[:3]), {}
    else:
        good, report = check_card()
    say("parity holds" if good else "parity FAILS: the kernels must not be used on this machine")
    if options.json:
        Path(options.json).write_text(json.dumps({"parity": good, **report}, indent=1), encoding="utf-8")
    return 0 if good else 1


def compile_parity(cases: list[Case], dtypes: Iterable[torch.dtype]) -> None:
    """Compile what the parity part launches, several kernels at a time; parity itself says what does not compile."""
    from toolkit.ops.triton.tune import without_timing

    def launch(case: Case, dtype: torch.dtype, entry: str) -> None:
        weights, leaves, index = build(case, "cuda", dtype)
        with without_timing(), suppress(Exception):
            gradients(our_layer(leaves, index, weights, entry), leaves)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
        for case, dtype in itertools.product(cases, dtypes):
            for entry in entries_for(case, dtype):
                executor.submit(launch, case, dtype, entry)


def check_card() -> tuple[bool, dict[str, Any]]:
    """Everything, on the first card: parity with two tiles of each product first, then the clock runs."""
    from toolkit.ops.triton.tune import without_timing

    device = torch.cuda.get_device_properties(0)
    memory = f"{device.total_memory / 2**30:.1f} GiB"
    say(f"{device.name}, sm_{device.major}{device.minor}, {memory}, torch {torch.__version__}")
    began = time.monotonic()
    compile_parity(SMALL + LARGE + FOUR_BITS, PARITY_DTYPES)
    with without_timing():
        good = check_parity("cuda", SMALL + LARGE + FOUR_BITS)
    with without_timing(1):
        good &= check_parity("cuda", LARGE + FOUR_BITS[3:])
    say(f"parity took {time.monotonic() - began:.0f} s")
    until = time.monotonic() + SECONDS
    limits = measure_limits()
    say("measured limits: " + ", ".join(f"{key} {value:.1f}" for key, value in limits.items()))
    layers = [check_speed(name, tokens, limits, until) for name in LAYERS for tokens in (2048, 4096)]
    return good, {"card": device.name, "limits": limits, "layers": layers}


if __name__ == "__main__":
    sys.exit(main())
