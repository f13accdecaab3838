"""The Triton expert layer, in Triton's interpreter, against the law (`ops/reference.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional

from tests.parity.test_expert_layer import Case, build, run
from toolkit.adapters import attach_lora
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate import held_out_loss
from toolkit.ops import BACKENDS, LoraFactors, reference
from toolkit.ops.experts import ExpertWeights
from toolkit.quant import load_int8
from toolkit.run import require_harmless_rounding

pytest.importorskip("triton")

from toolkit.ops.triton.gates import recognize
from toolkit.ops.triton.layer import expert_layer, expert_layer_w8a8

# The interpreter computes with numpy, which speaks up where exp(-x) is infinite and the sigmoid therefore zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def halves(y: torch.Tensor) -> torch.Tensor:
    left, right = y.chunk(2, dim=-1)
    return functional.silu(left) * right


def unknown(y: torch.Tensor) -> torch.Tensor:
    return y[..., ::2].tanh() * y[..., 1::2].cos()


class Clamped(nn.Module):
    """Interleaved and clamped, with its numbers as attributes, as experts modules have them."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.alpha = 3.0, 1.702

    def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
        left, right = y[..., ::2].clamp(max=self.limit), y[..., 1::2].clamp(-self.limit, self.limit)
        return left * torch.sigmoid(left * self.alpha) * (right + 1)


class SquaredRelu(nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return functional.relu(y) ** 2


Gate = Callable[[torch.Tensor], torch.Tensor]
CLAMPED, SQUARED = Clamped(), SquaredRelu()


@dataclass(frozen=True)
class Setting:
    """A shape, how its weights lie, and its gate."""

    case: Case
    gate: Gate
    is_int8: bool = True
    is_transposed: bool = False
    has_bias: bool = False
    has_norm: bool = False
    is_gated: bool = True

    def build(self) -> tuple[ExpertWeights, list[torch.Tensor], torch.Tensor]:
        weights, leaves, index = build(
            self.case,
            is_int8=self.is_int8,
            is_transposed=self.is_transposed,
            has_bias=self.has_bias,
            is_gated=self.is_gated,
            has_norm=self.has_norm,
        )
        return replace(weights, gate=self.gate), leaves, index


SETTINGS = {
    "plain": Setting(Case(T=7, K=2, E=4, H=12, I=20, R=3), halves),
    "one of everything": Setting(Case(T=1, K=1, E=1, H=5, I=3, R=1), halves, is_int8=False, has_bias=True),
    "every expert": Setting(
        Case(T=5, K=3, E=3, H=17, I=9, R=4), CLAMPED._apply_gate, is_transposed=True, has_bias=True
    ),
    "one hot expert": Setting(Case(T=21, K=1, E=13, H=11, I=7, R=2, routing="one"), halves, has_norm=True),
    "rank above width": Setting(Case(T=4, K=2, E=31, H=6, I=10, R=16), unknown, is_int8=False),
    "rank in two steps": Setting(Case(T=3, K=1, E=2, H=8, I=4, R=70), SQUARED, is_gated=False, has_bias=True),
    "several tiles": Setting(
        Case(T=20, K=2, E=2, H=40, I=36, R=5), SQUARED, is_int8=False, is_transposed=True, is_gated=False
    ),
    "norm and bias, gate unknown": Setting(Case(T=4, K=2, E=3, H=8, I=6, R=2), unknown, has_bias=True, has_norm=True),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_output_and_every_gradient_match_the_reference(setting: Setting) -> None:
    weights, leaves, index = setting.build()
    outputs = weights.up.weight.shape[2 if setting.is_transposed else 1]
    assert (recognize(weights.gate, outputs, leaves[0].device) is None) == (setting.gate is unknown)
    truth = run(reference.expert_layer, weights, [leaf.detach().double().requires_grad_() for leaf in leaves], index)
    rounded = run(reference.expert_layer, weights, leaves, index)
    for wanted, theirs, got in zip(truth, rounded, run(expert_layer, weights, leaves, index), strict=True):
        # Tolerance: what the reference itself loses in fp32, and 1e-5 of the tensor's size.
        assert (got - wanted).norm() <= (theirs - wanted).norm() + 1e-5 * wanted.norm().clamp(min=1e-6)


SIXTEEN_BITS = [(torch.bfloat16, 4), (torch.float16, 1)]
"""dtypes, and roundings allowed: the interpreter cuts a bf16 off where a card rounds it, at each store of the layer."""


def assert_as_near_as_the_reference(
    weights: ExpertWeights, leaves: list[torch.Tensor], index: torch.Tensor, dtype: torch.dtype, roundings: int
) -> None:
    """In sixteen bits no tensor is further from what fp64 gives than the reference's, but for some roundings."""
    with torch.no_grad():  # numbers that sixteen bits hold, so that all three see the same
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    truth = run(reference.expert_layer, weights, [leaf.detach().double().requires_grad_() for leaf in leaves], index)
    rounded = run(reference.expert_layer, weights, leaves, index)
    for wanted, theirs, got in zip(truth, rounded, run(expert_layer, weights, leaves, index), strict=True):
        assert got.dtype == dtype
        allowed = (theirs - wanted).norm() + roundings * torch.finfo(dtype).eps * wanted.norm()
        assert (got - wanted).norm() <= allowed


@pytest.mark.parametrize(("dtype", "roundings"), SIXTEEN_BITS)
def test_in_sixteen_bits_no_tensor_is_further_from_the_truth_than_the_references(
    dtype: torch.dtype, roundings: int
) -> None:
    assert_as_near_as_the_reference(*SETTINGS["plain"].build(), dtype, roundings)


def test_factors_in_fp32_get_fp32_gradients_whatever_the_rows_are_in() -> None:
    weights, leaves, index = SETTINGS["plain"].build()
    x, routing_weights, *factors = leaves
    output = expert_layer(
        x.bfloat16(), index, routing_weights, weights, LoraFactors(*factors[:2]), LoraFactors(*factors[2:])
    )
    assert output.dtype == torch.bfloat16
    for gradient in torch.autograd.grad(output.float().square().sum(), factors):
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


# Rows of no expert are never written: what lies there goes through the gate and is then left out.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("has_bias", [False, True])
def test_slots_of_nobodys_expert_count_nothing(has_bias: bool) -> None:
    weights, leaves, index = replace(SETTINGS["plain"], has_bias=has_bias).build()
    index = index.clone()
    index[2, 0] = index[5, 1] = index[6] = weights.up.weight.shape[0]
    wanted = run(reference.expert_layer, weights, leaves, index)
    got = run(expert_layer, weights, leaves, index)
    assert got[0][6].count_nonzero() == got[2][2, 0] == 0
    for theirs, ours in zip(wanted, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_experts_that_no_token_reaches_get_no_gradient_and_are_not_read() -> None:
    setting = SETTINGS["one hot expert"]
    weights, leaves, index = setting.build()
    last = setting.case.E - 1
    assert weights.up.scale is not None
    weights.up.scale[:last] = float("nan")
    output, *gradients = run(expert_layer, weights, leaves, index)
    assert output.isfinite().all()
    for gradient in gradients[2:]:
        assert gradient[:last].count_nonzero() == 0
        assert gradient[last].count_nonzero() > 0


def test_one_stack_may_carry_an_adapter_and_the_input_need_no_gradient() -> None:
    weights, leaves, index = SETTINGS["plain"].build()
    x, routing_weights, *factors = leaves
    frozen = (x.detach(), index, routing_weights.detach(), weights)
    bare = expert_layer(*frozen)
    assert not bare.requires_grad
    for up, down in ((LoraFactors(*factors[:2]), None), (None, LoraFactors(*factors[2:]))):
        adapted, wanted = expert_layer(*frozen, up, down), reference.expert_layer(*frozen, up, down)
        assert (adapted - bare).abs().max() > 0.1
        torch.testing.assert_close(adapted, wanted, rtol=1e-4, atol=1e-4)
        used = factors[:2] if down is None else factors[2:]
        for ours, theirs in zip(
            torch.autograd.grad(adapted.sum(), used), torch.autograd.grad(wanted.sum(), used), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_size_of_the_sorted_rows_is_kept_for_backward() -> None:
    weights, leaves, index = replace(SETTINGS["plain"], case=Case(T=7, K=4, E=4, H=12, I=20, R=3)).build()
    x, routing_weights, *factors = leaves
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        expert_layer(x, index, routing_weights, weights, LoraFactors(*factors[:2]), LoraFactors(*factors[2:]))
    allowed = {tensor.data_ptr() for tensor in (x, routing_weights, index, *factors)}
    rest = [tensor for tensor in kept if tensor.data_ptr() not in allowed]
    assert {tensor.data_ptr() for tensor in kept} >= allowed
    assert max(tensor.numel() for tensor in rest) <= index.numel()


# dynamo itself makes an instance of the autograd function to trace it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_compiler_traces_through_without_a_break() -> None:
    weights, leaves, index = SETTINGS["every expert"].build()

    def layer(x: torch.Tensor, w: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return expert_layer(x, index, w, weights, LoraFactors(*factors[:2]), LoraFactors(*factors[2:]))

    def separate(x: torch.Tensor, _: object, w: torch.Tensor, __: object, *loras: LoraFactors) -> torch.Tensor:
        output: torch.Tensor = compiled(x, w, *(factor for lora in loras for factor in (lora.A, lora.B)))
        return output

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        run(separate, weights, leaves, index), run(expert_layer, weights, leaves, index), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_scaling_and_layout_of_the_factors_are_the_callers_own() -> None:
    """PEFT keeps B expert-fastest: as a strided, scaled view it gives what a contiguous scaled copy gives."""
    weights, leaves, index = SETTINGS["plain"].build()
    x, routing_weights, up_A, up_B, down_A, down_B = leaves
    strided = [B.detach().permute(1, 2, 0).contiguous().requires_grad_() for B in (up_B, down_B)]
    views = [LoraFactors(A, B.permute(2, 0, 1), 0.5) for A, B in zip((up_A, down_A), strided, strict=True)]
    copies = [LoraFactors(up_A, up_B * 0.5), LoraFactors(down_A, down_B * 0.5)]
    got = expert_layer(x, index, routing_weights, weights, *views)
    wanted = reference.expert_layer(x, index, routing_weights, weights, *copies)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(got.sum(), [up_A, down_A, *strided])
    theirs = torch.autograd.grad(wanted.sum(), [up_A, down_A, up_B, down_B])
    for mine, law in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)
    for mine, law in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(mine.permute(2, 0, 1), law, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "norm and bias, gate unknown"])
def test_kept_up_outputs_give_the_same_bits_even_twice(name: str) -> None:
    weights, leaves, index = SETTINGS[name].build()
    x, routing_weights, *factors = leaves
    loras = (LoraFactors(*factors[:2]), LoraFactors(*factors[2:]))
    again, kept = (expert_layer(x, index, routing_weights, weights, *loras, keep_up=keep) for keep in (False, True))
    wanted = torch.autograd.grad(again.sum(), leaves)
    for _ in range(2):
        got = torch.autograd.grad(kept.sum(), leaves, retain_graph=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


def test_it_is_registered_and_refuses_what_it_cannot_do() -> None:
    weights, leaves, index = SETTINGS["one of everything"].build()
    x, routing_weights, *_ = (leaf.detach() for leaf in leaves)
    got = BACKENDS["onecard_triton"](x, index, routing_weights, weights)
    torch.testing.assert_close(got, reference.expert_layer(x, index, routing_weights, weights))
    with pytest.raises(ModelError, match=r"not torch\.float64; use onecard_per_expert"):
        expert_layer(x.double(), index, routing_weights, weights)


def test_two_digits_are_nearer_than_sixteen_bit_rows() -> None:
    setting = Setting(Case(T=12, K=2, E=4, H=64, I=48, R=3), halves, is_transposed=True)
    weights, leaves, index = setting.build()
    with torch.no_grad():  # two outlier channels, as language models have them
        leaves[0][:, 5] *= 40
        leaves[0][:, 50] *= 20
    wanted = run(reference.expert_layer, weights, leaves, index)[0]
    digits = run(expert_layer_w8a8, weights, leaves, index)[0]
    with torch.no_grad():
        leaves[0].copy_(leaves[0].bfloat16())
    rounded = run(reference.expert_layer, weights, leaves, index)[0]
    ours, theirs = (float((got - wanted).norm() / wanted.norm()) for got in (digits, rounded))
    assert 0 < ours < 0.1 * theirs


def test_real_experts_modules_give_the_same_logits_by_way_of_the_registry(checkpoint: Path) -> None:
    found = {}
    for backend in ("onecard_reference", "onecard_triton"):
        model, _ = load_int8(str(checkpoint), experts_implementation=backend)
        with torch.no_grad():
            found[backend] = model(torch.arange(6).unsqueeze(0)).logits
    experts = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    outputs = experts.gate_up_proj.shape[1 + experts.is_transposed]
    assert recognize(experts._apply_gate, outputs, torch.device("cpu")) is not None
    torch.testing.assert_close(found["onecard_triton"], found["onecard_reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["qwen3_moe"], indirect=True)
def test_rounded_rows_are_refused_where_they_raise_the_loss(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach_lora(load_int8(str(checkpoint))[0], r=2)
    rows = [[3 + (start + step) % 90 for step in range(6 + start)] for start in range(3)]
    sequences = Dataset.from_dict({"input_ids": rows, "labels": rows})
    wanted = held_out_loss(model.eval(), sequences, 2)
    require_harmless_rounding(model, sequences, 2)
    assert model.config._experts_implementation == "onecard_triton_w8a8"
    rounded = held_out_loss(model, sequences, 2)
    assert 0 < abs(rounded - wanted) < 0.005 * wanted
    losses = {"onecard_triton": 2.0, "onecard_triton_w8a8": 2.02}
    monkeypatch.setattr(
        "toolkit.run.evaluation.held_out_loss", lambda model, *_: losses[model.config._experts_implementation]
    )
    with pytest.raises(RecipeError, match=r"held-out loss 2\.0200 against 2\.0000"):
        require_harmless_rounding(model, sequences, 2)
