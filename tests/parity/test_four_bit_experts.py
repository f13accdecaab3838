"""Stacks of four bits: what they are stored as, exactly, and every backend against the law on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity.test_expert_layer import BACKENDS, Case, Layer, build, run
from toolkit.ops import four_bit, reference
from toolkit.ops import stack as stacks
from toolkit.ops.experts import ExpertStack, ExpertWeights
from toolkit.ops.four_bit import FourBits
from toolkit.parts import can_hold_four_bits

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
KINDS = ("int4", "mxfp4", "grouped")
CASES = [
    Case(T=7, K=2, E=4, H=64, I=128, R=3),
    Case(T=40, K=1, E=13, H=128, I=64, R=2, routing="one"),
    Case(T=300, K=4, E=60, H=64, I=64, R=3),
]


@pytest.fixture(params=["spread out whole", "in parts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small stacks are multiplied out whole, others expert by expert."""
    if request.param == "in parts":
        monkeypatch.setattr(stacks, "_SMALL", 0)
        monkeypatch.setattr("toolkit.ops.small_experts._MOST_WEIGHTS", 0)
    return str(request.param)


def stored(kind: str, weight: torch.Tensor) -> FourBits:
    """A stack [E, O, I] in four bits."""
    if kind == "grouped":
        experts, outputs, inputs = weight.shape
        codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        scale = weight.abs().reshape(experts, outputs, inputs // 32, 32).amax(-1) / 8
        return FourBits(four_bit.turned(codes), scale.transpose(1, 2).half().contiguous())
    rounded = [(four_bit.quantize_int4 if kind == "int4" else four_bit.quantize_mxfp4)(each) for each in weight]
    packed, scale, step = zip(*rounded, strict=True)
    return FourBits(torch.stack(packed), torch.stack(scale), torch.stack(step) if kind == "int4" else None)


def by_hand(found: FourBits) -> torch.Tensor:
    """[E, O, I] by the words of `four_bit`, byte by byte."""
    half = found.packed.shape[-2]
    beside = found.scale if found.step is None else found.step
    group = 2 * half // beside.shape[-2]
    result = torch.empty(found.packed.shape[0], found.packed.shape[2], 2 * half)
    for expert, byte, output in torch.cartesian_prod(*(torch.arange(size) for size in found.packed.shape)).tolist():
        value = int(found.packed[expert, byte, output])
        for code, place in ((value & 15, byte), (value >> 4, byte + half)):
            unit = beside[expert, place // group, output]
            if found.step is not None:
                whole = (code - 16 if code > 7 else code) * int(unit)
                result[expert, output, place] = torch.tensor(float(whole)) * found.scale[expert, output]
            elif found.scale.dtype == torch.uint8:
                result[expert, output, place] = VALUES[code] * 2.0 ** (int(unit) - 127)
            else:
                result[expert, output, place] = (code - 8) * unit.float()
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_worth_what_it_says(kind: str) -> None:
    found = stored(kind, torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)))
    assert four_bit.kind_of(found.packed, found.scale, found.step) == kind
    assert torch.equal(four_bit.dequantize(found), by_hand(found))


def test_int4_is_int8_stored_in_half() -> None:
    weight = torch.randn(3, 33, 256, generator=torch.Generator().manual_seed(0))
    found = stored("int4", weight)
    whole = four_bit.integers(found)
    assert whole.dtype == torch.int8
    assert whole.abs().max() <= 120
    assert torch.equal((whole.float() * found.scale[:, None]).transpose(1, 2), four_bit.dequantize(found))
    bits = 8 * sum(part.nbytes for part in found if part is not None) / weight.numel()
    assert bits < 4.4


@pytest.mark.parametrize(("kind", "most"), [("int4", 0.086), ("mxfp4", 0.115)])
def test_rounding_errs_little(kind: str, most: float) -> None:
    weight = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0))
    once = four_bit.dequantize(stored(kind, weight))
    assert float((once - weight).norm() / weight.norm()) < most  # NF4 in blocks of 64: 0.092


def test_mxfp4_is_rounded_to_itself() -> None:
    once = four_bit.dequantize(stored("mxfp4", torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0))))
    assert torch.equal(four_bit.dequantize(stored("mxfp4", once)), once)


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_rows_of_zeros_stay_zeros_and_huge_ones_finite(kind: str) -> None:
    weight = torch.zeros(1, 2, 64)
    weight[0, 1] = 1e20
    found = four_bit.dequantize(stored(kind, weight))
    assert not found[0, 0].any()
    torch.testing.assert_close(found[0, 1], weight[0, 1], rtol=0.15, atol=0)


@pytest.mark.parametrize("inputs", [0, 32, 96, 100])
def test_what_does_not_divide_into_groups_is_known(inputs: int) -> None:
    assert not can_hold_four_bits(inputs)
    assert can_hold_four_bits(64)
    assert can_hold_four_bits(192)


def in_four_bits(weights: ExpertWeights, kind: str) -> ExpertWeights:
    """Float stacks [E, O, I] rounded."""

    def rounded(stack: ExpertStack) -> ExpertStack:
        found = stored(kind, stack.weight)
        return replace(stack, weight=found.packed, scale=found.scale, step=found.step, is_transposed=True)

    return replace(weights, up=rounded(weights.up), down=rounded(weights.down))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("units", [True, False], ids=["integer units", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layer", BACKENDS.values(), ids=list(BACKENDS))
def test_backends_agree_with_the_law(
    layer: Layer, case: Case, kind: str, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.ops.split_int8 import _has_integer_units

    if units and not _has_integer_units():
        pytest.skip("no integer units here")
    monkeypatch.setattr("toolkit.ops.split_int8._has_integer_units", lambda: units)
    monkeypatch.setattr("toolkit.ops.split_int8._FEWEST_WEIGHTS", 1)
    monkeypatch.setattr("toolkit.ops.split_int8._FEWEST_FOR_FEW_ROWS", 1)
    monkeypatch.setattr("toolkit.ops.stack._FOUR_BIT_BUFFER", 64 * 40)  # several parts of a weight
    weights, leaves, index = build(
        case, is_int8=False, is_transposed=False, has_bias=True, is_gated=True, has_norm=False
    )
    packed = in_four_bits(weights, kind)
    assert packed.up.four_bits == kind
    assert (packed.up.inputs, packed.up.outputs) == (case.H, 2 * case.I)
    wanted = run(reference.expert_layer, packed, leaves, index)
    found = run(layer, packed, leaves, index)
    for ours, law in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, law, rtol=2e-4, atol=2e-4 * float(law.abs().max()))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_near_as_with_the_weights_multiplied_out(kind: str) -> None:
    weights, leaves, index = build(
        CASES[0], is_int8=False, is_transposed=False, has_bias=False, is_gated=False, has_norm=False
    )
    packed = in_four_bits(weights, kind)
    plain = replace(
        packed,
        **{
            name: ExpertStack(getattr(packed, name).dequantized().contiguous(), None, None, False)
            for name in ("up", "down")
        },
    )
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    law = run(reference.expert_layer, packed, leaves, index)
    ours, floats = (run(BACKENDS["per_expert"], each, half, index) for each in (packed, plain))
    for mine, theirs, wanted in zip(ours, floats, law, strict=True):
        assert float((mine.float() - wanted).norm()) < 2 * float((theirs.float() - wanted).norm())
