"""The int8 storage format: rounding error, shapes, bytes, and the linear layer built on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.ops.int8 import Int8Linear, dequantize, input_gradient, product, quantize


@pytest.mark.parametrize("input_dim", [-1, -2])
@pytest.mark.parametrize("shape", [(3, 5), (7, 1), (1, 9), (2, 4, 6), (5, 1, 3)])
def test_no_value_is_off_by_more_than_half_a_step(shape: tuple[int, ...], input_dim: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored, scale = quantize(weight, input_dim)
    assert stored.dtype == torch.int8
    assert scale.shape == (*shape[:-2], shape[-1] if input_dim == -2 else shape[-2])
    step = scale.unsqueeze(input_dim)
    assert ((dequantize(stored, scale, input_dim) - weight).abs() <= step * 0.5 * (1 + 1e-5)).all()


def test_a_row_of_zeros_and_a_row_of_one_value_are_exact() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 2.0]])
    assert torch.equal(dequantize(*quantize(weight)), weight)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_rounding_twice_changes_nothing(experts: int, rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed))
    stored, scale = quantize(weight)
    again, _ = quantize(dequantize(stored, scale))
    assert torch.equal(again, stored)


def test_half_precision_weights_round_as_their_fp32_values() -> None:
    weight = torch.randn(4, 8, 16).bfloat16()
    for ours, wanted in zip(quantize(weight), quantize(weight.float()), strict=True):
        assert torch.equal(ours, wanted)


def test_expert_bytes_are_at_most_26_percent_of_fp32() -> None:
    stored, scale = quantize(torch.randn(8, 256, 128))
    assert stored.numel() + 4 * scale.numel() <= 0.26 * 4 * stored.numel()


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_and_its_input_gradient_match_a_dense_layer(has_bias: bool) -> None:
    dense = nn.Linear(24, 10, bias=has_bias)
    stored, scale = quantize(dense.weight.detach())
    with torch.no_grad():
        dense.weight.copy_(dequantize(stored, scale))
    layer = Int8Linear.from_linear(dense)
    layer.weight.data, layer.weight_scale.data = stored, scale
    if has_bias:
        layer.bias = dense.bias
    x = torch.randn(2, 5, 24)
    results = []
    for module in (dense, layer):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


def test_an_empty_twin_keeps_the_device_and_is_a_linear() -> None:
    with torch.device("meta"):
        twin = Int8Linear.from_linear(nn.Linear(6, 4))
    assert isinstance(twin, nn.Linear)
    assert twin.weight.is_meta
    assert twin.weight_scale.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_is_not_rounded_to_sixteen_bit(dtype: torch.dtype) -> None:
    """Each product of one stored value is rounded once: a rounded scale would put a whole row off by the same share."""
    stored, scale = quantize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    picked = product(torch.eye(32, dtype=dtype), stored, scale)
    assert torch.equal(picked, (stored.double() * scale.double()[:, None]).t().to(dtype))
    back = input_gradient(torch.eye(64, dtype=dtype) * 3, stored, scale)
    assert torch.equal(back, ((3 * scale.double()).to(dtype).double()[:, None] * stored.double()).to(dtype))
