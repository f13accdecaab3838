"""Our layer on int8 linears against PEFT's own computation on the same parameters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from toolkit.adapters.layer import Int8LoraLinear
from toolkit.ops.int8 import Int8Linear, quantize


def build(*, bias: bool, rank: int = 3, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Int8LoraLinear:
    generator = torch.Generator().manual_seed(0)
    base = Int8Linear.from_linear(nn.Linear(13, 7, bias=bias, dtype=dtype))
    stored, scale = quantize(torch.randn(7, 13, generator=generator))
    base.weight.data, base.weight_scale.data = stored, scale
    if base.bias is not None:
        base.bias.data.normal_(generator=generator)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    layer = Int8LoraLinear(base, "default", config=config, r=rank, lora_alpha=2 * rank)
    layer.lora_B["default"].weight.data.normal_(generator=generator)
    return layer


def outcome(layer: Int8LoraLinear, x: torch.Tensor, *, plainly: bool) -> list[torch.Tensor]:
    """Output, and the gradients of x, A and B."""
    leaf = x.detach().clone().requires_grad_()
    output = Linear.forward(layer, leaf) if plainly else layer(leaf)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [leaf, *factors])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 13), (2, 4, 13), (1, 13), (13,)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_output_and_gradients_are_pefts(bias: bool, shape: tuple[int, ...], rank: int) -> None:
    layer, x = build(bias=bias, rank=rank), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(outcome(layer, x, plainly=False), outcome(layer, x, plainly=True), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_autocast_computes_in_its_dtype_and_leaves_fp32_gradients() -> None:
    layer, x = build(bias=True), torch.randn(6, 13, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (outcome(layer, x, plainly=plainly) for plainly in (False, True))
    exact = outcome(layer, x, plainly=True)
    assert ours[0].dtype == torch.bfloat16
    for got, stock, wanted in zip(ours, theirs, exact, strict=True):
        # No further from the truth than PEFT's own layer under autocast, and one rounding.
        assert (got.float() - wanted).norm() <= (stock.float() - wanted).norm() + 2**-8 * wanted.norm()
    assert ours[1].dtype == ours[2].dtype == torch.float32


def test_a_frozen_input_is_not_computed_for() -> None:
    layer = build(bias=False)
    layer(torch.randn(4, 13)).sum().backward()
    assert layer.lora_A["default"].weight.grad is not None
    assert layer.base_layer.weight.grad is None


def test_what_is_not_plain_lora_is_left_to_peft() -> None:
    layer, x = build(bias=True, dropout=0.5), torch.randn(4, 13)
    assert layer.train()._only_adapter() is None
    assert layer.eval()._only_adapter() == "default"
    assert outcome(layer, x, plainly=False)[0].equal(layer(x))
    layer.update_layer("other", 2, lora_alpha=2, config=LoraConfig(r=2))
    layer.set_adapter(["default", "other"])
    assert layer._only_adapter() is None
    torch.testing.assert_close(layer(x), Linear.forward(layer, x))
    layer.enable_adapters(False)
    assert layer(x).equal(layer.base_layer(x))
