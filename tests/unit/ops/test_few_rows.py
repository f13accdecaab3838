"""A few bf16 rows with int8 weights: the product that decoding takes, against fp32."""

from __future__ import annotations

import pytest
import torch

from toolkit.ops.few_rows import can_read_once, read_once
from toolkit.ops.int8 import product, quantize


def rows(count: int, inputs: int) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()


def weights(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)))


def anywhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers where nothing is aligned, as in a mapped file."""
    room = tensor.new_empty(tensor.numel() + 4)
    return room[4:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("inputs", [32, 96, 1024])
@pytest.mark.parametrize("outputs", [1, 3, 64, 77])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_it_is_rounded_as_bf16_is(count: int, outputs: int, inputs: int) -> None:
    x, (stored, scale) = rows(count, inputs), weights(outputs, inputs)
    assert can_read_once(x, stored) == (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))
    wanted = x.float() @ stored.float().t()
    assert (read_once(x, stored).float() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    whole, truth = product(x, stored, scale).float(), wanted * scale
    assert (whole - truth).abs().max() <= 2**-7 * truth.abs().max()
    one_by_one = torch.cat([product(row[None], stored, scale) for row in x])
    assert torch.equal(product(x, stored, scale), one_by_one)


@pytest.mark.parametrize(
    ("x", "stored"),
    [
        (rows(17, 64), weights(4, 64)[0]),
        (rows(0, 64), weights(4, 64)[0]),
        (rows(2, 64).float(), weights(4, 64)[0]),
        (rows(2, 48), weights(4, 48)[0]),
        (rows(2, 64), weights(64, 4)[0].t()),
        (rows(2, 64), weights(4, 64)[0].to(torch.bfloat16)),
        (rows(2, 64), anywhere(weights(4, 64)[0])),
        (anywhere(rows(2, 64)), weights(4, 64)[0]),
    ],
    ids=["many", "none", "fp32", "inputs left over", "turned", "float", "mapped", "rows anywhere"],
)
def test_what_it_does_not_take_is_left_to_blas(x: torch.Tensor, stored: torch.Tensor) -> None:
    assert not can_read_once(x, stored)
    if x.dtype == torch.bfloat16 and stored.dtype == torch.int8 and len(x):
        exact = x.float() @ stored.float().t()
        got = product(x, stored, torch.ones(len(stored))).float()
        assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()
