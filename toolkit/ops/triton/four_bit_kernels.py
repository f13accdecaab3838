"""The grouped GEMM on experts of four bits, forward and input gradient: `grouped_gemm_kernel` on half its bytes.

A byte (j, o) of a stack has input j in its low nibble and input j + I/2 in its high one (`toolkit/ops/four_bit.py`).
So forward multiplies a tile of bytes with two tiles of rows, and the input gradient makes two tiles of columns with it.
Either way a program reads a byte once and unpacks it in registers, where nothing is interleaved.

Warps lie side by side along the columns wherever a tile has more columns than rows: then no two unpack the same byte.

    S routed rows, E experts, O outputs and I inputs of a projection, G inputs of a group, R rank
"""

# Kernel arguments carry no annotations but constexpr: Triton reads them as its own types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from toolkit.ops.triton.kernels import dot, finish, tile_of_program

__all__ = ["four_bit_forward_kernel", "four_bit_gradient_kernel"]


@triton.jit
def _weights(codes, unit, KIND: tl.constexpr, TYPE: tl.constexpr):
    """Codes of 0 to 15 times what each is worth, in TYPE, rounded once."""
    if tl.int8 == TYPE:
        tl.static_assert(KIND == "int4")
        value = (codes.to(tl.int8) ^ 8) - 8
    elif KIND == "mxfp4":
        # E2M1's bits as fp16's are worth 2^14 less, which `_units` makes up for.
        bits = codes.to(tl.int16)
        value = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # The last bits of 2^23 + n are n, which is quicker than a cast. With its sign bit turned int4 is n − 8 as well.
        whole = codes.to(tl.int32) ^ 8 if KIND == "int4" else codes.to(tl.int32)
        value = (whole | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return (value * unit).to(TYPE)


@triton.jit
def _units(stored, KIND: tl.constexpr, TYPE: tl.constexpr):
    """What a code is worth, fp32 or int8, of the steps or scales as they are stored."""
    if tl.int8 == TYPE:
        unit = stored
    elif KIND == "mxfp4":
        # 2^(stored − 127) · 2^14 by its exponent bits; infinite beyond fp32.
        unit = (tl.minimum(stored.to(tl.int32) + 14, 255) << 23).to(tl.float32, bitcast=True)
    else:
        unit = stored.to(tl.float32)
    return unit


@triton.jit
def four_bit_forward_kernel(
    x_ptr,
    row_ptr,
    offset_ptr,
    w_ptr,
    unit_ptr,
    scale_ptr,
    bias_ptr,
    x_unit_ptr,
    low_ptr,
    factor_ptr,
    addend_ptr,
    out_ptr,
    half,
    outputs,
    R,
    stride_fe,
    stride_fn,
    stride_fr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[s, o] = Σ_i x[row_s, i] · W[e_s, i, o], with all that `grouped_gemm_kernel` adds; W [E, I/2, O] contiguous.

    `unit` [E, I/G, O]: int4's steps, or the others' scales. `scale` [E, O]: int4's, None for the others. Of BLOCK_K
    bytes RUN at a time are of one group.
    """
    expert, row, end, n = tile_of_program(offset_ptr, outputs, E, BLOCK_E, BLOCK_M, BLOCK_N, GROUP_N)
    if expert >= E:
        return
    n += tl.arange(0, BLOCK_N)
    m = row + tl.arange(0, BLOCK_M)
    # Past the edge some row or column is read again and never stored, as in `grouped_gemm_kernel`.
    row_m = tl.minimum(m, end - 1)
    source = (tl.load(row_ptr + row_m) if row_ptr is not None else row_m).to(tl.int64)
    column = n % outputs
    e = expert.to(tl.int64)
    TYPE: tl.constexpr = tl.float32 if UPCAST and x_unit_ptr is None else x_ptr.dtype.element_ty
    RUNS: tl.constexpr = BLOCK_K // RUN
    k, run = tl.arange(0, BLOCK_K), tl.arange(0, RUNS) * RUN
    x_at = x_ptr + source[:, None] * (4 * half if x_unit_ptr is not None else 2 * half) + k[None, :]
    w_at = w_ptr + (e * half + k[:, None]) * outputs + column[None, :]
    unit_at = unit_ptr + e * (2 * half // G) * outputs + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x_unit_ptr is not None else tl.float32)
    if x_unit_ptr is not None:
        lower = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, half, BLOCK_K):
        left, left_run = k < half - start, run < half - start
        codes = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=left[:, None], other=0)
        for side in tl.static_range(2):
            at = x_at + side * half
            x = tl.load(at) if EVEN_K else tl.load(at, mask=left[None, :], other=0)
            group_at = unit_at + ((start + run) // G + side * (half // G))[:, None] * outputs
            stored = tl.load(group_at) if EVEN_K else tl.load(group_at, mask=left_run[:, None], other=0)
            unit = tl.broadcast_to(_units(stored, KIND, TYPE)[:, None, :], (RUNS, RUN, BLOCK_N))
            w = _weights(codes >> 4 if side else codes & 15, tl.reshape(unit, (BLOCK_K, BLOCK_N)), KIND, TYPE)
            acc = dot(x, w, acc, UPCAST and x_unit_ptr is None)
            if x_unit_ptr is not None:
                second = tl.load(at + 2 * half) if EVEN_K else tl.load(at + 2 * half, mask=left[None, :], other=0)
                lower = dot(second, w, lower, False)
        x_at += BLOCK_K
        w_at += BLOCK_K * outputs
    y = acc.to(tl.float32)
    if x_unit_ptr is not None:
        y = (254.0 * y + lower.to(tl.float32)) * tl.load(x_unit_ptr + source)[:, None]
    finish(
        y, e, m, end, n, column, n < outputs, outputs, R, scale_ptr, bias_ptr, low_ptr, factor_ptr, addend_ptr, out_ptr,
        stride_fe, stride_fn, stride_fr, BLOCK_R, UPCAST,
    )  # fmt: skip


@triton.jit
def four_bit_gradient_kernel(
    x_ptr,
    row_ptr,
    offset_ptr,
    w_ptr,
    unit_ptr,
    scale_ptr,
    bias_ptr,
    low_ptr,
    factor_ptr,
    addend_ptr,
    out_ptr,
    half,
    outputs,
    R,
    stride_fe,
    stride_fn,
    stride_fr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KIND: tl.constexpr,
    G: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[s, i] = Σ_o x[row_s, o] · W[e_s, i, o], then bias, low-rank update and addend; arguments as in forward.

    A program has BLOCK_N columns of either half. Groups lie along the columns here, RUN columns at a time in one, and
    `scale` goes into what a code is worth: on x, where int8's is, every warp would multiply with it anew.
    """
    expert, row, end, j = tile_of_program(offset_ptr, half, E, BLOCK_E, BLOCK_M, BLOCK_N, GROUP_N)
    if expert >= E:
        return
    RUNS: tl.constexpr = BLOCK_N // RUN
    group = (j + tl.arange(0, RUNS) * RUN) % half // G
    j += tl.arange(0, BLOCK_N)
    m = row + tl.arange(0, BLOCK_M)
    row_m = tl.minimum(m, end - 1)
    source = (tl.load(row_ptr + row_m) if row_ptr is not None else row_m).to(tl.int64)
    column = j % half
    e = expert.to(tl.int64)
    TYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source[:, None] * outputs + k[None, :]
    w_at = w_ptr + (e * half + column[None, :]) * outputs + k[:, None]
    unit_at = unit_ptr + (e * (2 * half // G) + group[None, :]) * outputs + k[:, None]
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, outputs, BLOCK_K):
        left = k < outputs - start
        x = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=left[None, :], other=0)
        codes = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=left[:, None], other=0)
        for side in tl.static_range(2):
            group_at = unit_at + side * (half // G) * outputs
            stored = tl.load(group_at) if EVEN_K else tl.load(group_at, mask=left[:, None], other=0)
            unit = _units(stored, KIND, TYPE)
            if scale_ptr is not None:
                unit *= tl.load(scale_ptr + e * outputs + start + k, mask=left, other=0)[:, None]
            unit = tl.reshape(tl.broadcast_to(unit[:, :, None], (BLOCK_K, RUNS, RUN)), (BLOCK_K, BLOCK_N))
            w = _weights(codes >> 4 if side else codes & 15, unit, KIND, TYPE)
            if side:
                second = dot(x, w, second, UPCAST)
            else:
                first = dot(x, w, first, UPCAST)
        x_at += BLOCK_K
        w_at += BLOCK_K
        unit_at += BLOCK_K
    for side in tl.static_range(2):
        finish(
            second if side else first, e, m, end, j + side * half, column + side * half, j < half, 2 * half, R,
            None, bias_ptr, low_ptr, factor_ptr, addend_ptr, out_ptr, stride_fe, stride_fn, stride_fr, BLOCK_R, UPCAST,
        )  # fmt: skip
