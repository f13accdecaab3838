#!/usr/bin/env python3
"""The Triton kernels without a card: compiled ahead of time, their work counted, and the time no card can beat.

    .venv/bin/python scripts/benchmarks/triton_kernels.py [--capability 89 …] [--kernel NAME …] [--json]

Registers, spilled bytes and shared memory come from the compiled kernels themselves (`cuobjdump` of the triton wheel,
or one on the PATH). Limits are peak figures of NVIDIA's tables (`toolkit/plan/cards.py`): no kernel has run on a card.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scripts.benchmarks.kernel_cost import LayerShape, Work, backward, forward
from toolkit.ops.triton import four_bit_kernels, kernels
from toolkit.ops.triton.tiles import INTERPRETED, Tile, four_bit_tile
from toolkit.plan.cards import CARDS

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory one block may use, by compute capability (CUDA C++ programming guide, table of limits)."""

SHAPES = [
    LayerShape("OLMoE-1B-7B", T=tokens, K=8, E=64, H=2048, I=1024) for tokens in (2048, 4096)
] + [LayerShape("Qwen3-30B-A3B", T=tokens, K=8, E=128, H=2048, I=768) for tokens in (2048, 4096)]  # fmt: skip
FOUR_BITS = {"int4": "*i8", "mxfp4": "*u8", "grouped": "*fp16"}
"""Kinds of stacks of four bits, and the type of their steps or scales."""
LIMIT_CARDS = ("rtx-3060-12gb", "rtx-3090", "rtx-4090", "rtx-5090")


@dataclass(frozen=True)
class Variant:
    """One way a kernel is used: pointer and integer types by argument, compile-time values, warps and stages."""

    kernel: str
    use: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    unaligned: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Compiled:
    """What one compilation came to; None where no cuobjdump was found."""

    kernel: str
    use: str
    capability: int
    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    fits: bool


POINTERS = {
    "x_ptr": "*bf16", "row_ptr": "*i32", "offset_ptr": "*i32", "w_ptr": "*i8", "scale_ptr": "*fp32",
    "bias_ptr": "*bf16", "x_unit_ptr": "*fp32", "low_ptr": "*bf16", "factor_ptr": "*bf16",
    "addend_ptr": "*bf16", "out_ptr": "*bf16",
}  # fmt: skip


def gemm(use: str, tile: Tile, absent: tuple[str, ...], stride: str, **constants: Any) -> Variant:
    """The grouped GEMM with some optional arguments absent, and the weight's stride that is one."""
    integers = ("N", "K", "R", "stride_we", "stride_wn", "stride_wk", "stride_fe", "stride_fn", "stride_fr")
    types = POINTERS | dict.fromkeys(integers, "i32") | constants.pop("types", {})
    fixed = {
        **dict.fromkeys(absent), stride: 1, "stride_fr" if "factor_ptr" not in absent else "stride_fe": 1,
        "E": 64, "BLOCK_E": 64, "SCALE_ON_INPUT": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "BLOCK_R": 16, "GROUP_N": tile.group, "EVEN_K": True, "UPCAST": False,
    }  # fmt: skip
    return Variant("grouped_gemm", use, types, fixed | constants, tile.warps, tile.stages)


def four_bit_gemm(use: str, kind: str, tile: Tile, absent: tuple[str, ...], **constants: Any) -> Variant:
    """The grouped GEMM on experts of four bits in groups of 32: forward, or the input's gradient."""
    is_gradient, group = use.startswith("input gradient"), 32
    block_n, block_k = (tile.n // 2, tile.k) if is_gradient else (tile.n, tile.k // 2)
    integers = ("half", "outputs", "R", "stride_fe", "stride_fn", "stride_fr")
    types = POINTERS | {"w_ptr": "*u8", "unit_ptr": FOUR_BITS[kind]} | dict.fromkeys(integers, "i32")
    fixed = {
        **dict.fromkeys((*absent, *(() if kind == "int4" else ("scale_ptr",)))),
        "stride_fn" if is_gradient else "stride_fr": 1, "E": 64, "BLOCK_E": 64, "KIND": kind, "G": group,
        "RUN": min(group, block_n if is_gradient else block_k), "BLOCK_M": tile.m, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "BLOCK_R": 16, "GROUP_N": tile.group, "EVEN_K": True, "UPCAST": False,
    }  # fmt: skip
    kernel = "four_bit_gradient" if is_gradient else "four_bit_forward"
    return Variant(
        kernel, f"{use}, {kind}", types | constants.pop("types", {}), fixed | constants, tile.warps, tile.stages
    )


def four_bit_variants() -> list[Variant]:
    """Both kernels as the layer uses them, with the default tiles."""
    there, back = (four_bit_tile(128, 128, 2, is_gradient=each) for each in (False, True))
    digits, rare = four_bit_tile(128, 128, 1, is_gradient=False), ("bias_ptr", "addend_ptr")
    return [
        *(four_bit_gemm("forward: gathered rows, LoRA", kind, there, ("x_unit_ptr", *rare)) for kind in FOUR_BITS),
        *(four_bit_gemm("input gradient: LoRA", kind, back, ("row_ptr", *rare)) for kind in FOUR_BITS),
        four_bit_gemm("W8A8: two digits a row", "int4", digits, rare, types={"x_ptr": "*i8"}),
    ]


def variants() -> list[Variant]:
    """Every kernel in the uses the layer makes of it."""
    tile, narrow = Tile(128, 128, 64, warps=8), Tile(128, 16, 64)
    rare = ("bias_ptr", "x_unit_ptr", "addend_ptr")
    int8_rows = {"x_ptr": "*i8"}
    gate = {"GATED": True, "INTERLEAVED": False, "ACTIVATION": "silu", "LIMIT": None, "ALPHA": 1.0, "OFFSET": 0.0}
    clamped = gate | {"INTERLEAVED": True, "LIMIT": 7.0, "ALPHA": 1.702, "OFFSET": 1.0}
    bf16_gate = {"y_ptr": "*bf16", "width": "i32"}
    gram = {"left_ptr": "*bf16", "left_row_ptr": "*i32", "right_ptr": "*bf16", "right_row_ptr": "*i32"}
    gram |= {"offset_ptr": "*i32", "out_ptr": "*fp32", "L": "i32", "R": "i32"}
    return [
        gemm("up forward: gathered rows, LoRA", tile, rare, "stride_wk"),
        gemm("down forward: sorted rows, LoRA", tile, ("row_ptr", *rare), "stride_wk"),
        gemm("transposed stack, bias", tile, rare[1:], "stride_wn"),
        gemm("input gradient: scale on input", tile, ("row_ptr", *rare), "stride_wn", SCALE_ON_INPUT=True),
        gemm(
            "W8A8: two digits a row",
            Tile(128, 64, 64, warps=8),
            ("bias_ptr", "addend_ptr"),
            "stride_wk",
            types=int8_rows,
        ),
        gemm(
            "low rank: x A'",
            narrow,
            ("scale_ptr", "low_ptr", "factor_ptr", *rare),
            "stride_wk",
            types={"w_ptr": "*bf16"},
        ),
        *four_bit_variants(),
        _gram("dA: gathered right", gram, ("left_row_ptr",), 16, 128),
        _gram("dB: gathered left", gram, ("right_row_ptr",), 128, 16),
        Variant("gate_forward", "SiLU, halves", bf16_gate | {"out_ptr": "*bf16"}, gate | {"BLOCK": 1024}),
        Variant("gate_forward", "clamped, interleaved", bf16_gate | {"out_ptr": "*bf16"}, clamped | {"BLOCK": 1024}),
        Variant(
            "gate_backward",
            "SiLU, halves",
            bf16_gate | {"grad_ptr": "*bf16", "weight_ptr": "*fp32", "dot_ptr": "*fp32"},
            gate | {"BLOCK": 1024},
        ),
        Variant(
            "gather_sum",
            "routing weights",
            {"rows_ptr": "*bf16", "place_ptr": "*i32", "weight_ptr": "*fp32", "out_ptr": "*bf16", "H": "i32"},
            {"K": 8, "BLOCK": 1024},
        ),
        Variant(
            "split_rows",
            "two digits",
            {"x_ptr": "*bf16", "out_ptr": "*i8", "unit_ptr": "*fp32", "K": "i32"},
            {"BLOCK": 1024},
        ),
    ]


def _gram(use: str, types: dict[str, str], absent: tuple[str, ...], block_l: int, block_r: int) -> Variant:
    fixed = {**dict.fromkeys(absent), "BLOCK_M": 32, "BLOCK_L": block_l, "BLOCK_R": block_r, "UPCAST": False}
    return Variant("grouped_gram", use, types, fixed)


def compile_for(variant: Variant, capability: int) -> Compiled:
    """Compile without a driver; every pointer and size a multiple of 16, as torch allocates and models have them."""
    owner = four_bit_kernels if variant.kernel.startswith("four_bit") else kernels
    function = getattr(owner, f"{variant.kernel}_kernel")
    names = function.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr"}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = resources(binary.asm["cubin"])
    shared = int(binary.metadata.shared)
    fits = shared <= SHARED_LIMIT[capability] << 10
    return Compiled(variant.kernel, variant.use, capability, registers, spilled, shared, fits)


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers a thread and bytes of local memory (spills) that the compiled code states."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def limits(shape: LayerShape) -> list[dict[str, Any]]:
    """Per card: the least milliseconds of forward and backward, kernel by kernel, and with int8 products forward."""
    rows = []
    for name in LIMIT_CARDS:
        card = CARDS[name]

        def least(works: list[Work], is_int8: bool = False, card: Any = card) -> float:
            # With int8 rows a frozen product is computed twice, once for each digit.
            again = [w.frozen_flops if is_int8 else 0 for w in works]
            return 1e3 * sum(
                card.seconds(w.flops + more, w.moved, is_int8=more > 0) for w, more in zip(works, again, strict=True)
            )

        there, back = forward(shape), backward(shape)
        rows.append({
            "layer": shape.name, "tokens": shape.T, "card": name, "forward_ms": least(there),
            "backward_ms": least(back), "forward_w8a8_ms": least(there, is_int8=True),
            "tokens_per_second": 1e3 * shape.T / (least(there) + least(back)),
        })  # fmt: skip
    return rows


def table(headings: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(compiled: list[Compiled]) -> str:
    """All tables as text."""
    parts = []
    unknown = any(c.registers is None for c in compiled)
    if compiled:
        cells = [
            [f"{c.kernel}: {c.use}", f"sm_{c.capability}", c.registers, c.spilled_bytes, c.shared_bytes, c.fits]
            for c in compiled
        ]
        parts.append(table(["kernel", "for", "registers", "spilled B", "shared B", "fits"], cells))
    if unknown:
        parts.append("No cuobjdump was found, so registers and spills are unknown (None).")
    for shape in SHAPES[::2]:
        work = [("forward", w) for w in forward(shape)] + [("backward", w) for w in backward(shape)]
        cells = [[where, w.kernel, f"{w.flops / 1e9:.1f}", f"{w.moved / 1e6:.1f}"] for where, w in work]
        parts.append(f"{shape.name}, {shape.T} tokens\n" + table(["pass", "kernel", "GFLOP", "MB"], cells))
    cells = [
        [r["layer"], r["tokens"], r["card"], f"{r['forward_ms']:.2f}", f"{r['backward_ms']:.2f}",
         f"{r['forward_w8a8_ms']:.2f}", f"{r['tokens_per_second']:,.0f}"]
        for shape in SHAPES for r in limits(shape)
    ]  # fmt: skip
    headings = ["layer", "tokens", "card", "forward ms ≥", "backward ms ≥", "W8A8 forward ms ≥", "tokens/s ≤"]
    return "\n\n".join([*parts, table(headings, cells)])


def main() -> int:
    """Print, and say by the exit code whether everything fits its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--kernel", nargs="*", help="only these kernels, e.g. grouped_gemm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if INTERPRETED:
        print("triton_kernels.py: TRITON_INTERPRET is set, nothing can be compiled; unset it", file=sys.stderr)
        return 2
    chosen = [v for v in variants() if options.kernel is None or v.kernel in options.kernel]
    compiled = [compile_for(variant, capability) for variant in chosen for capability in options.capability]
    if options.json:
        work = {s.name: [asdict(w) for w in forward(s) + backward(s)] for s in SHAPES[::2]}
        bounds = [row for shape in SHAPES for row in limits(shape)]
        print(json.dumps({"compiled": [asdict(c) for c in compiled], "work": work, "limits": bounds}, indent=1))
    else:
        print(report(compiled))
    return 0 if all(c.fits for c in compiled) else 1


if __name__ == "__main__":
    sys.exit(main())
