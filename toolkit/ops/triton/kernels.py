"""The kernels: grouped GEMM on int8 experts, gate, gather-sum, grouped gram, rows into digits.

torch has no grouped product that reads int8 weights, and on GeForce cards its bf16 one is a loop over experts. Rows are
sorted by expert through an index only; a program finds its expert from `offset` [E + 1] itself, so the host never
waits for the routing. No sum is atomic: each has one order. Interpreted and compiled, never yet run on a card.

    S routed rows, E experts, N outputs and K inputs of a product, R rank, I the gate's width
"""

# Kernel arguments carry no annotations but constexpr: Triton reads them as its own types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "gate_backward_kernel",
    "gate_forward_kernel",
    "gather_sum_kernel",
    "grouped_gemm_kernel",
    "grouped_gram_kernel",
    "split_rows_kernel",
]


@triton.jit
def _tile_of(offset_ptr, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which expert a row tile belongs to (E where there is none left), and its first and last row + 1."""
    lane = tl.arange(0, BLOCK_E)
    start = tl.load(offset_ptr + lane, mask=lane < E, other=0)
    end = tl.load(offset_ptr + lane + 1, mask=lane < E, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    before = (tl.cumsum(tiles, 0) <= tile) & (lane < E)
    expert = tl.sum(before.to(tl.int32), 0)
    first = tl.sum(tl.where(before, tiles, 0), 0)
    known = tl.minimum(expert, E - 1)
    row = tl.load(offset_ptr + known) + (tile - first) * BLOCK_M
    return expert, row, tl.load(offset_ptr + known + 1)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """a @ b + acc, b in a's dtype. The interpreter converts to and multiplies bf16 wrongly: there both are widened."""
    if UPCAST:
        acc += tl.dot(a.to(acc.dtype), b.to(acc.dtype), input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def tile_of_program(
    offset_ptr,
    N,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """This program's expert (E where there is none left), its first row, the expert's last + 1, its first column."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.num_programs(0) // blocks_n
    # GROUP_N column blocks of a tile side by side: they share its rows, and the next tile of the expert their weights.
    pid = tl.program_id(0)
    group = pid // (tiles * GROUP_N)
    width = tl.minimum(blocks_n - group * GROUP_N, GROUP_N)
    inside = pid - group * tiles * GROUP_N
    expert, row, end = _tile_of(offset_ptr, inside // width, E, BLOCK_E, BLOCK_M)
    return expert, row, end, (group * GROUP_N + inside % width) * BLOCK_N


@triton.jit
def finish(
    y,
    e,
    m,
    end,
    n,
    column,
    is_real,
    N,
    R,
    scale_ptr,
    bias_ptr,
    low_ptr,
    factor_ptr,
    addend_ptr,
    out_ptr,
    stride_fe,
    stride_fn,
    stride_fr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Store sums y of rows m and columns n after scale, bias, low-rank update and addend: see `grouped_gemm_kernel`.

    `column` is n where `is_real` [BLOCK_N], and somewhere within the matrix elsewhere.
    """
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + e * N + column)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + e * N + column)[None, :].to(tl.float32)
    if low_ptr is not None:
        r = tl.arange(0, BLOCK_R)
        row_m = tl.minimum(m, end - 1).to(tl.int64)
        for start in range(0, R, BLOCK_R):
            real = start + r < R
            low_at = low_ptr + row_m[:, None] * R + start + r[None, :]
            factor_at = factor_ptr + e * stride_fe + column[None, :] * stride_fn + (start + r)[:, None] * stride_fr
            low = tl.load(low_at, mask=real[None, :], other=0)
            y = dot(low, tl.load(factor_at, mask=real[:, None], other=0), y, UPCAST)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    stored = (m < end)[:, None] & is_real[None, :]
    if addend_ptr is not None:
        y += tl.load(addend_ptr + at, mask=stored, other=0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def grouped_gemm_kernel(
    x_ptr,
    row_ptr,
    offset_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    x_unit_ptr,
    low_ptr,
    factor_ptr,
    addend_ptr,
    out_ptr,
    N,
    K,
    R,
    stride_we,
    stride_wn,
    stride_wk,
    stride_fe,
    stride_fn,
    stride_fr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCALE_ON_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[s, n] = Σ_k x[row_s, k] · W[e_s, n, k], then scale, bias and low-rank update; e_s is the expert of row s.

    The strides of W choose forward, input gradient and transposed storage. The scale [E, N] multiplies the sum, or
    [E, K] the input, as the weight's stored rows lie. Optional, None where absent: rows to gather by, bias [E, N], what
    the lower of a row's two digits is worth (x int8, one digit after the other; their sums are int32), the low-rank
    update low [S, R] times factor [E, N, R], and an addend [S, N].
    """
    expert, row, end, n = tile_of_program(offset_ptr, N, E, BLOCK_E, BLOCK_M, BLOCK_N, GROUP_N)
    if expert >= E:
        return
    n += tl.arange(0, BLOCK_N)
    m = row + tl.arange(0, BLOCK_M)
    # Past the edge some row or column is read again and never stored, which needs no mask in the loop. Columns wrap,
    # so the compiler still sees that they lie side by side where N is a multiple of 16, and loads 16 bytes at once.
    row_m = tl.minimum(m, end - 1)
    source = tl.load(row_ptr + row_m) if row_ptr is not None else row_m
    source = source.to(tl.int64)
    column = n % N
    e = expert.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source[:, None] * (2 * K if x_unit_ptr is not None else K) + k[None, :]
    w_at = w_ptr + e * stride_we + column[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if x_unit_ptr is not None else tl.float32)
    if x_unit_ptr is not None:
        lower = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            left = k < K - start
            x, w = tl.load(x_at, mask=left[None, :], other=0), tl.load(w_at, mask=left[:, None], other=0)
        if SCALE_ON_INPUT:
            s = tl.load(scale_ptr + e * K + start + k, mask=k < K - start, other=0)
            x = (x.to(tl.float32) * s[None, :]).to(x.dtype)
        acc = dot(x, w, acc, UPCAST and x_unit_ptr is None)
        if x_unit_ptr is not None:
            second = tl.load(x_at + K) if EVEN_K else tl.load(x_at + K, mask=left[None, :], other=0)
            lower = dot(second, w, lower, False)
        x_at += BLOCK_K
        w_at += BLOCK_K * stride_wk
    y = acc.to(tl.float32)
    if x_unit_ptr is not None:
        y = (254.0 * y + lower.to(tl.float32)) * tl.load(x_unit_ptr + source)[:, None]
    if SCALE_ON_INPUT:
        scale_ptr = None
    finish(
        y, e, m, end, n, column, n < N, N, R, scale_ptr, bias_ptr, low_ptr, factor_ptr, addend_ptr, out_ptr,
        stride_fe, stride_fn, stride_fr, BLOCK_R, UPCAST,
    )  # fmt: skip


@triton.jit
def grouped_gram_kernel(
    left_ptr,
    left_row_ptr,
    right_ptr,
    right_row_ptr,
    offset_ptr,
    out_ptr,
    L,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[e, l, r] = Σ over rows s of expert e of left[s, l] · right[s, r], in row order; either side may gather."""
    expert = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.load(offset_ptr + expert + 1)
    acc = tl.zeros((BLOCK_L, BLOCK_R), dtype=tl.float32)
    for start in range(tl.load(offset_ptr + expert), end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        live = m < end
        left_row = tl.load(left_row_ptr + m, mask=live, other=0) if left_row_ptr is not None else m
        right_row = tl.load(right_row_ptr + m, mask=live, other=0) if right_row_ptr is not None else m
        left_at = left_ptr + left_row.to(tl.int64)[None, :] * L + i[:, None]
        right_at = right_ptr + right_row.to(tl.int64)[:, None] * R + j[None, :]
        a = tl.load(left_at, mask=live[None, :] & (i < L)[:, None], other=0)
        b = tl.load(right_at, mask=live[:, None] & (j < R)[None, :], other=0)
        acc = dot(a, b, acc, UPCAST)
    at = (expert * L + i[:, None]) * R + j[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(i < L)[:, None] & (j < R)[None, :])


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The activation and its derivative, fp32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(ALPHA * x)
        value, slope = x * s, s * (1 + ALPHA * x * (1 - s))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        t = 2 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1
        value = 0.5 * x * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        value, slope = tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        positive = tl.maximum(x, 0.0)
        value, slope = positive * positive, 2 * positive
    return value, slope


@triton.jit
def _gate(
    y_ptr,
    i,
    width,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The gate of one row's columns i: its value, its slopes towards both halves, and where those lie."""
    left_at = 2 * i if INTERLEAVED else i
    right_at = 2 * i + 1 if INTERLEAVED else width + i
    left = tl.load(y_ptr + left_at, mask=i < width, other=0).to(tl.float32)
    passes = left <= LIMIT if LIMIT is not None else left == left
    value, slope = _activation(tl.minimum(left, LIMIT) if LIMIT is not None else left, ACTIVATION, ALPHA)
    slope = tl.where(passes, slope, 0.0)
    right_slope = value
    if GATED:
        right = tl.load(y_ptr + right_at, mask=i < width, other=0).to(tl.float32)
        if LIMIT is not None:
            right_slope = tl.where((right <= LIMIT) & (right >= -LIMIT), value, 0.0)
            right = tl.minimum(tl.maximum(right, -LIMIT), LIMIT)
        value, slope = value * (right + OFFSET), slope * (right + OFFSET)
    return value, slope, right_slope, left_at, right_at


@triton.jit
def gate_forward_kernel(
    y_ptr,
    out_ptr,
    width,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [S, I] = gate(y), y [S, 2I] in halves or interleaved, [S, I] where there is no second half."""
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_row = y_ptr + s * (2 * width if GATED else width)
    value, _, _, _, _ = _gate(y_row, i, width, GATED, INTERLEAVED, ACTIVATION, LIMIT, ALPHA, OFFSET)
    tl.store(out_ptr + s * width + i, value.to(out_ptr.dtype.element_ty), mask=i < width)


@triton.jit
def gate_backward_kernel(
    y_ptr,
    grad_ptr,
    weight_ptr,
    dot_ptr,
    width,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, in place: y becomes w·gradient of y, grad [S, I] becomes w·gate(y); dot is ⟨gate(y), grad⟩."""
    s = tl.program_id(0).to(tl.int64)
    y_row = y_ptr + s * (2 * width if GATED else width)
    weight = tl.load(weight_ptr + s).to(tl.float32)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        grad_at = grad_ptr + s * width + i
        grad = tl.load(grad_at, mask=i < width, other=0).to(tl.float32)
        value, slope, right_slope, left_at, right_at = _gate(
            y_row, i, width, GATED, INTERLEAVED, ACTIVATION, LIMIT, ALPHA, OFFSET
        )
        dot += tl.where(i < width, value * grad, 0.0)
        element = y_ptr.dtype.element_ty
        tl.store(y_row + left_at, (weight * grad * slope).to(element), mask=i < width)
        if GATED:
            tl.store(y_row + right_at, (weight * grad * right_slope).to(element), mask=i < width)
        tl.store(grad_at, (weight * value).to(element), mask=i < width)
    tl.store(dot_ptr + s, tl.sum(dot, 0))


@triton.jit
def gather_sum_kernel(rows_ptr, place_ptr, weight_ptr, out_ptr, H, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ_k w[t, k] · rows[place[t, k]], k ascending; a negative place counts nothing, w None is one."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(K):
        place = tl.load(place_ptr + t * K + k).to(tl.int64)
        # The mask of one comparison: Triton 3.9's interpreter refuses one of a row and a single truth value.
        value = tl.load(rows_ptr + place * H + h, mask=h < tl.where(place >= 0, H, 0), other=0).to(tl.float32)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + t * K + k).to(tl.float32)
        acc += value
    tl.store(out_ptr + t * H + h, acc.to(out_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def split_rows_kernel(x_ptr, out_ptr, unit_ptr, K, BLOCK: tl.constexpr):
    """x [M, K] in two int8 digits to the base 254, out [M, 2, K]: x ≈ (254 · out[:, 0] + out[:, 1]) · unit [M]."""
    m = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    # A row of zeros keeps a unit of one, or its quotients would be 0/0.
    scale = tl.max(largest, 0) / 127.0
    scale = tl.where(scale > 1e-34, scale, 1.0)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0).to(tl.float32) / scale
        first = tl.floor(tl.minimum(tl.maximum(x, -127.0), 127.0) + 0.5)
        second = tl.floor(tl.minimum(tl.maximum((x - first) * 254.0, -127.0), 127.0) + 0.5)
        tl.store(out_ptr + 2 * m * K + k, first.to(tl.int8), mask=k < K)
        tl.store(out_ptr + (2 * m + 1) * K + k, second.to(tl.int8), mask=k < K)
    tl.store(unit_ptr + m, scale / 254.0)
