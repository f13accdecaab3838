"""Norms that one kernel computes: which ones, what they give, and that nobody else sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.families import families, tiny_config
from toolkit.architecture import auto_class
from toolkit.ops.norms import FusedNorm, fuse_norms, fused_norms, rms_norm_eps


class Norm(nn.Module):
    """As most families write it, with one thing changed at a time."""

    def __init__(self, size: int = 48, eps: float = 1e-6, change: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, size))
        self.variance_epsilon, self.change = eps, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given, x = x.dtype, x.float()
        if self.change == "centred":
            x = x - x.mean(-1, keepdim=True)
        eps = 0.0 if self.change == "no eps" else self.variance_epsilon
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        if self.change == "no weight":
            return normed.to(given)
        if self.change == "one more":
            return (normed * (1 + self.weight.float())).to(given)
        return self.weight * normed.to(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_norm_is_known_by_its_numbers(dtype: torch.dtype, eps: float) -> None:
    assert rms_norm_eps(Norm(eps=eps).to(dtype)) == eps
    with torch.device("meta"):
        assert rms_norm_eps(Norm(eps=eps).to(dtype)) == eps


@pytest.mark.parametrize("change", ["centred", "one more", "no weight", "no eps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_function_stays_as_it_is(dtype: torch.dtype, change: str) -> None:
    model = nn.Sequential(Norm(change=change).to(dtype), Norm().to(dtype), nn.LayerNorm(48))
    fuse_norms(model)
    assert [type(module) for module in model] == [Norm, FusedNorm, nn.LayerNorm]
    assert fused_norms(model) == (1, 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_values_and_gradients_are_the_stock_norms(dtype: torch.dtype, bound: float) -> None:
    """Beside fp64, off by no more than the stock one may be: it rounds to the dtype twice, and here is one rounding."""
    stock = Norm().to(dtype)
    fused = FusedNorm(stock, 1e-6)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 5, 48, generator=generator).mul(3).to(dtype) for _ in range(2))
    found = []
    for norm, given in ((fused, x), (stock, x), (Norm().double(), x.double())):
        leaf = given.clone().requires_grad_()
        result = norm(leaf)
        gradients = torch.autograd.grad(result, (leaf, norm.weight), grad.to(result.dtype))
        found.append([each.double() for each in (result, *gradients)])
    for ours, theirs, exact in zip(*found, strict=True):
        scale = exact.abs().max()
        assert (ours - exact).abs().max() <= bound * scale
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + bound * scale / 4


def test_a_row_in_another_dtype_is_the_stock_norms_affair() -> None:
    stock = Norm().bfloat16()
    x = torch.randn(2, 48)
    fused = FusedNorm(stock, 1e-6)
    fused.weight = nn.Parameter(stock.weight * 2)
    wanted = stock(x)
    assert torch.equal(fused(x), wanted * 2)
    assert fused(x).dtype == torch.float32


def test_autocast_leaves_the_dtype() -> None:
    norm = FusedNorm(Norm().bfloat16(), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_state_dict_does_not_know() -> None:
    model = nn.ModuleDict({"norm": Norm(), "layer": nn.Linear(2, 2)})
    before = model.state_dict()
    fuse_norms(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)


class Sizes(TorchDispatchMode):
    """Bytes of what operators give."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += result.untyped_storage().nbytes() if isinstance(result, torch.Tensor) else 0
        return result


def test_without_numbers_it_holds_what_a_card_does() -> None:
    """The result and a root a row, and in backward the gradient: nothing in fp32 that is as large as x."""
    norm = FusedNorm(Norm(64).bfloat16().requires_grad_(False), 1e-6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(10, 64, dtype=torch.bfloat16, requires_grad=True)
        with Sizes() as sizes:
            norm(x).backward(torch.empty_like(x))
    assert sizes.made <= (3 + 1) * x.numel() * 2 + 10 * 4


def test_every_family_says_how_many() -> None:
    """803 of 909 today; 1 + weight, gates and means stay as they are, and never a norm that is called otherwise."""
    fused = found = 0
    for family in families()[::4]:
        config = tiny_config(family.model_type)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=torch.bfloat16)
        fuse_norms(model)
        mine = fused_norms(model)
        fused, found = fused + mine[0], found + mine[1]
    assert found > 150
    assert 0.75 < fused / found < 1
