"""The kernels as operators of torch: `onecard::grouped_gemm` and its companions, each with a fake for tracing.

torch.compile sees an opaque call with known shapes and dtypes. On CUDA a call launches one kernel; on a CPU it works in
Triton's interpreter only, which is how the tests check it.
"""

# torch types a custom operator's result as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import torch
import triton

from toolkit.ops.triton import kernels
from toolkit.ops.triton.gates import GateForm
from toolkit.ops.triton.launch import Product, outputs_of
from toolkit.ops.triton.tiles import INTERPRETED, power_of_two
from toolkit.ops.triton.tune import run

__all__ = [
    "gate_backward",
    "gate_forward",
    "gather_sum",
    "grouped_gemm",
    "grouped_gram",
    "split_rows",
]

Optional = torch.Tensor | None


@torch.library.custom_op("onecard::grouped_gemm", mutates_args=())
def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    row: torch.Tensor | None,
    dtype: torch.dtype,
    is_swapped: bool = False,
    scale: torch.Tensor | None = None,
    is_scale_on_input: bool = False,
    bias: torch.Tensor | None = None,
    x_unit: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    is_factor_swapped: bool = False,
    addend: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sorted rows times their experts' matrices: [S, N] in `dtype`.

    Args:
        x: [S, K], or [M, K] gathered by `row` [S] (int32); float, or two int8 digits [M, 2, K] with `x_unit` [M].
        weight: [E, N, K], or [E, K, N] with `is_swapped`; int8 or float. Four bits are contiguous [E, I/2, O] bytes:
            swapped they give outputs, else inputs' gradients (`toolkit.ops.four_bit`).
        offset: [E + 1] int32, where each expert's rows begin. Rows past the last are left as they are: undefined.
        scale: fp32 [E, N], or [E, K] with `is_scale_on_input`; beside four bits without steps [E, I/G, O].
        bias: [E, N].
        low, factor: [S, R] and [E, N, R] ([E, R, N] with `is_factor_swapped`); their product is added.
        addend: [S, N], added last.
        step: int8 [E, I/G, O], of int4.
    """
    product = Product(
        x, weight, offset, row, dtype, is_swapped, scale, is_scale_on_input, bias, x_unit, low, factor,
        is_factor_swapped, addend, step,
    )  # fmt: skip
    return run(product)


@grouped_gemm.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    row: Optional,
    dtype: torch.dtype,
    is_swapped: bool = False,
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    return x.new_empty(((x if row is None else row).shape[0], outputs_of(weight, is_swapped)), dtype=dtype)


@torch.library.custom_op("onecard::grouped_gram", mutates_args=())
def grouped_gram(
    left: torch.Tensor,
    left_row: torch.Tensor | None,
    right: torch.Tensor,
    right_row: torch.Tensor | None,
    offset: torch.Tensor,
) -> torch.Tensor:
    """Per expert `leftᵀ right` over its rows: [E, L, R] fp32 from [S, L] and [S, R], either gathered by its row [S]."""
    E, L, R = offset.shape[0] - 1, left.shape[1], right.shape[1]
    out = torch.empty((E, L, R), dtype=torch.float32, device=left.device)
    wide = 32 if INTERPRETED else 64 if left.element_size() == 4 else 128
    block_l, block_r = power_of_two(L, most=wide), power_of_two(R, most=wide)
    kernels.grouped_gram_kernel[(E, triton.cdiv(L, block_l), triton.cdiv(R, block_r))](
        left.contiguous(), left_row, right.contiguous(), right_row, offset, out, L, R,
        BLOCK_M=32, BLOCK_L=block_l, BLOCK_R=block_r, UPCAST=INTERPRETED, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@grouped_gram.register_fake
def _(
    left: torch.Tensor, left_row: Optional, right: torch.Tensor, right_row: Optional, offset: torch.Tensor
) -> torch.Tensor:
    return left.new_empty((offset.shape[0] - 1, left.shape[1], right.shape[1]), dtype=torch.float32)


def gate_forward(form: GateForm, y_SO: torch.Tensor) -> torch.Tensor:
    """[S, I], as `form(y)` in fp32, rounded once."""
    return _gate_forward(y_SO, *_numbers(form))


def gate_backward(form: GateForm, y_SO: torch.Tensor, grad_SI: torch.Tensor, weight_S: torch.Tensor) -> torch.Tensor:
    """⟨gate(y), grad⟩ per row, fp32 [S]. **In place** y becomes w·∂y and grad becomes w·gate(y)."""
    return _gate_backward(y_SO, grad_SI, weight_S, *_numbers(form))


def _numbers(form: GateForm) -> tuple[str, bool, bool, float | None, float, float]:
    return form.activation, form.is_gated, form.is_interleaved, form.limit, form.alpha, form.offset


@torch.library.custom_op("onecard::gate_forward", mutates_args=())
def _gate_forward(
    y: torch.Tensor,
    activation: str,
    is_gated: bool,
    is_interleaved: bool,
    limit: float | None,
    alpha: float,
    offset: float,
) -> torch.Tensor:
    S, width = y.shape[0], y.shape[1] // 2 if is_gated else y.shape[1]
    out = y.new_empty((S, width))
    block = power_of_two(width, most=1024)
    kernels.gate_forward_kernel[(S, triton.cdiv(width, block))](
        y.contiguous(), out, width, GATED=is_gated, INTERLEAVED=is_interleaved, ACTIVATION=activation, LIMIT=limit,
        ALPHA=alpha, OFFSET=offset, BLOCK=block,
    )  # fmt: skip
    return out


@_gate_forward.register_fake
def _(y: torch.Tensor, activation: str, is_gated: bool, *numbers: object) -> torch.Tensor:
    return y.new_empty((y.shape[0], y.shape[1] // 2 if is_gated else y.shape[1]))


@torch.library.custom_op("onecard::gate_backward", mutates_args=("y", "grad"))
def _gate_backward(
    y: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    activation: str,
    is_gated: bool,
    is_interleaved: bool,
    limit: float | None,
    alpha: float,
    offset: float,
) -> torch.Tensor:
    S, width = grad.shape
    dot = torch.empty(S, dtype=torch.float32, device=y.device)
    kernels.gate_backward_kernel[(S,)](
        y, grad, weight, dot, width, GATED=is_gated, INTERLEAVED=is_interleaved, ACTIVATION=activation, LIMIT=limit,
        ALPHA=alpha, OFFSET=offset, BLOCK=power_of_two(width, most=1024),
    )  # fmt: skip
    return dot


@_gate_backward.register_fake
def _(y: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, *numbers: object) -> torch.Tensor:
    return y.new_empty(y.shape[0], dtype=torch.float32)


@torch.library.custom_op("onecard::gather_sum", mutates_args=())
def gather_sum(rows: torch.Tensor, place: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Σ_k weight[t, k] · rows[place[t, k]]: [T, H] in rows' dtype, summed in fp32; a negative place counts nothing."""
    T, K = place.shape
    out = rows.new_empty((T, rows.shape[1]))
    block = power_of_two(rows.shape[1], most=1024)
    kernels.gather_sum_kernel[(T, triton.cdiv(rows.shape[1], block))](
        rows, place, None if weight is None else weight.contiguous(), out, rows.shape[1], K=K, BLOCK=block
    )
    return out


@gather_sum.register_fake
def _(rows: torch.Tensor, place: torch.Tensor, weight: Optional) -> torch.Tensor:
    return rows.new_empty((place.shape[0], rows.shape[1]))


@torch.library.custom_op("onecard::split_rows", mutates_args=())
def split_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] in two int8 digits to the base 254, the higher first, [M, 2, K], and what the lower is worth [M]."""
    M, K = x.shape
    out = torch.empty((M, 2, K), dtype=torch.int8, device=x.device)
    unit = torch.empty(M, dtype=torch.float32, device=x.device)
    kernels.split_rows_kernel[(M,)](x.contiguous(), out, unit, K, BLOCK=power_of_two(K, most=1024))
    return out, unit


@split_rows.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = x.shape
    return x.new_empty((M, 2, K), dtype=torch.int8), x.new_empty(M, dtype=torch.float32)
