"""The Triton experts on stacks of four bits, in Triton's interpreter: products alone, the layer against the law."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter

from tests.parity.test_expert_layer import Case, run
from tests.parity.test_four_bit_experts import KINDS, in_four_bits
from tests.parity.test_triton_layer import (
    CLAMPED,
    SIXTEEN_BITS,
    SQUARED,
    Setting,
    assert_as_near_as_the_reference,
    halves,
    unknown,
)
from toolkit.ops import LoraFactors, four_bit, reference
from toolkit.ops.experts import ExpertStack, ExpertWeights
from toolkit.ops.four_bit import FourBits
from toolkit.ops.triton import launch, products, tune
from toolkit.ops.triton.launch import Product, chunked, fused
from toolkit.ops.triton.layer import expert_layer, expert_layer_w8a8
from toolkit.ops.triton.tiles import Tile
from toolkit.rehearsal.ledger import Ledger

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

COUNTS = [5, 0, 17, 1, 0]
"""Rows of each expert: fewer than a tile, none, more than one tile, a single one, none at the end."""
S, E, R, M = sum(COUNTS), len(COUNTS), 3, 9
OFFSET = torch.tensor([0, *itertools.accumulate(COUNTS)], dtype=torch.int32)
EXPERT = torch.repeat_interleave(torch.arange(E), torch.tensor(COUNTS))
STORED = [("int4", 32), ("mxfp4", 32), ("grouped", 32), ("int4", 64), ("int4", 128), ("grouped", 48)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def stack(kind: str, group: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float16) -> FourBits:
    """Any codes and any steps or scales, of all experts; `dtype` of grouped scales."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    packed = torch.randint(0, 256, (E, inputs // 2, outputs), generator=generator, dtype=torch.uint8)
    shape = (E, inputs // group, outputs)
    if kind == "int4":
        step = torch.randint(-15, 16, shape, generator=generator, dtype=torch.int8)
        return FourBits(packed, random(E, outputs).abs() / 50, step)
    if kind == "mxfp4":
        return FourBits(packed, torch.randint(118, 131, shape, generator=generator, dtype=torch.uint8))
    return FourBits(packed, random(*shape).to(dtype))


def assert_near(got: torch.Tensor, wanted: torch.Tensor, eps: float) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= eps * wanted.norm()


@pytest.mark.parametrize(("kind", "scales"), [*((kind, torch.float32) for kind in KINDS), ("grouped", torch.bfloat16)])
def test_every_code_at_every_step_is_worth_what_the_law_says(kind: str, scales: torch.dtype) -> None:
    """Rows of the identity matrix give the weights themselves, in fp32 without any rounding."""
    found = stack(kind, 32, 62, 64, scales)
    if kind == "int4":
        every = torch.cartesian_prod(torch.arange(16), torch.arange(-15, 16))  # 496: in 16 inputs of 31 outputs
        packed = every[:, 0].view(16, 31).to(torch.uint8).repeat(2, 2)
        assert found.step is not None
        found.step[0] = torch.arange(-15, 16).repeat(2)
        found.packed[0] = packed | (packed.flip(0) << 4)
    elif kind == "mxfp4":  # all that fp32 holds exactly, and times which E2M1's largest is finite
        found.scale[0, 0], found.scale[0, 1] = torch.arange(1, 63), torch.arange(177, 239)
    wanted = four_bit.dequantize(found)
    assert bool(wanted[0].isfinite().all())
    ends = torch.tensor([0, 64, 64, 64, 64, 64], dtype=torch.int32)
    scale, step = found.scale, found.step
    got = products.grouped_gemm(torch.eye(64), found.packed, ends, None, torch.float32, True, scale, step=step)
    assert torch.equal(got.t(), wanted[0])
    ends = ends.clamp(max=62)
    got = products.grouped_gemm(torch.eye(62), found.packed, ends, None, torch.float32, False, scale, True, step=step)
    torch.testing.assert_close(got, wanted[0], rtol=3e-7, atol=0)  # the row's scale is in the step, which rounds


@pytest.mark.parametrize(
    ("kind", "group", "dtype"),
    [
        *((*stored, torch.float32) for stored in STORED),
        *(
            (*stored, dtype)
            for stored, dtype in zip(STORED, (torch.bfloat16, torch.float16, torch.bfloat16), strict=False)
        ),
    ],
)
@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "input gradient"])
def test_products_with_everything_around_them(is_gradient: bool, kind: str, group: int, dtype: torch.dtype) -> None:
    outputs, inputs = 35, 192 if group < 64 else 2 * group
    found = stack(kind, group, outputs, inputs)
    N, K = (inputs, outputs) if is_gradient else (outputs, inputs)
    x, row = random(M, K).to(dtype), (torch.arange(S) * 7 % M).int()
    low, factor = random(S, R).to(dtype), random(E, R, N).to(dtype)
    bias, addend = random(E, N), random(S, N)
    weight = four_bit.dequantize(found).double()[EXPERT]
    wanted = torch.einsum("sk,skn->sn", x.double()[row.long()], weight if is_gradient else weight.transpose(1, 2))
    wanted += bias[EXPERT] + torch.einsum("sr,srn->sn", low.double(), factor.double()[EXPERT]) + addend
    got = products.grouped_gemm(
        x, found.packed, OFFSET, row, dtype, not is_gradient, found.scale, is_gradient, bias=bias, low=low,
        factor=factor, is_factor_swapped=True, addend=addend, step=found.step,
    )  # fmt: skip
    assert got.dtype == dtype
    # The interpreter cuts a bf16 off where a card rounds it.
    assert_near(got, wanted, torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 4))


def test_two_digits_meet_whole_numbers() -> None:
    found = stack("int4", 32, 35, 192)
    x = (random(M, 2, 192) * 40).round().clamp(-127, 127).to(torch.int8)
    row, unit = (torch.arange(S) * 7 % M).int(), random(M).abs()
    got = products.grouped_gemm(
        x, found.packed, OFFSET, row, torch.float32, True, found.scale, x_unit=unit, step=found.step
    )
    whole = 254 * x[:, 0].long() + x[:, 1].long()
    exact = torch.einsum("sk,skn->sn", whole[row.long()], four_bit.integers(found)[EXPERT].long())
    torch.testing.assert_close(
        got, (exact * unit[row.long(), None] * found.scale[EXPERT]).float(), rtol=1e-6, atol=1e-6
    )


def product(kind: str, group: int, is_gradient: bool, outputs: int = 40, inputs: int = 192) -> Product:
    found = stack(kind, group, outputs, inputs)
    N, K = (inputs, outputs) if is_gradient else (outputs, inputs)
    return Product(
        random(M, K), found.packed, OFFSET, (torch.arange(S) * 7 % M).int(), torch.float32, not is_gradient,
        found.scale, is_gradient, bias=random(E, N), low=random(S, R), factor=random(E, R, N), is_factor_swapped=True,
        step=found.step,
    )  # fmt: skip


TILES = [Tile(16, 32, 128, group=1), Tile(32, 256, 16), Tile(16, 128, 256, group=2)]


@pytest.mark.parametrize(
    ("kind", "group", "tile"),
    [
        *(("int4", 32, tile) for tile in TILES),
        *(("grouped", 24, tile) for tile in TILES),
        ("mxfp4", 32, TILES[0]),
        ("grouped", 16, TILES[1]),
    ],
)
@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "input gradient"])
def test_every_tile_gives_the_same_numbers(is_gradient: bool, kind: str, group: int, tile: Tile) -> None:
    """Several groups in a block, a group in several blocks, blocks past the half's edge, groups of no power of two."""
    one = product(kind, group, is_gradient)
    torch.testing.assert_close(fused(one, tile), fused(one), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("experts_at_a_time", "kind"), [*((2, kind) for kind in KINDS), (1, "int4"), (5, "int4")])
@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "input gradient"])
def test_dequantised_experts_give_what_the_kernel_gives(
    is_gradient: bool, kind: str, experts_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_CHUNK_BYTES", experts_at_a_time * 4 * 40 * 192)
    one = product(kind, 32, is_gradient)
    torch.testing.assert_close(chunked(one), fused(one), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "input gradient"])
def test_sixteen_bits_hold_weights_whose_scale_they_do_not(is_gradient: bool) -> None:
    """E2M1's bits need 2^14 more than the weight's scale, which fp16 has not from a scale of four on."""
    one = product("mxfp4", 32, is_gradient)
    assert one.scale is not None
    assert int(one.scale.max()) > 128
    half = replace(one, x=one.x.half(), dtype=torch.float16, bias=None, low=None, factor=None)
    torch.testing.assert_close(chunked(half), fused(half), rtol=2e-3, atol=2e-2)


def test_ways_and_kinds_tell_what_a_stack_is_stored_in() -> None:
    ones = [product(*stored, is_gradient) for stored in STORED[:3] for is_gradient in (False, True)]
    kinds = [tune.kind_of(one, "card") for one in ones]
    assert len(set(kinds)) == len(ones) == 6
    assert kinds[0] == "card, float32, int4 G 32, rows 16, E 5, N 40, K 192, R 3, swapped, gathered"
    assert kinds[-1] == "card, float32, grouped float16 G 32, rows 16, E 5, N 192, K 40, R 3, input scale, gathered"
    for one in ones:
        names = list(tune.ways(one))
        assert names[-1] == tune.CHUNKED
        assert names[:-1] == [str(tile) for tile in launch.tiles_of(one)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_says_of_itself_what_it_does(kind: str) -> None:
    found, checks = stack(kind, 32, 35, 192), ("test_schema", "test_faketensor")
    for x, is_swapped in ((random(S, 192), True), (random(S, 35), False)):
        arguments = (x, found.packed, OFFSET, None, torch.bfloat16, is_swapped, found.scale, not is_swapped)
        outcome = torch.library.opcheck(products.grouped_gemm, arguments, {"step": found.step}, test_utils=checks)
        assert set(outcome.values()) == {"SUCCESS"}


class Reads:
    """Bytes that kernels read of some tensors in the interpreter, and how many of those are not read again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *tensors: torch.Tensor) -> None:
        self.all, self.once = 0, set[int]()
        ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        builder = interpreter.interpreter_builder
        load = builder.create_masked_load

        def counted(pointers: Any, mask: Any, *rest: Any) -> Any:
            places = pointers.data[mask.data]
            for start, end in ranges:
                mine = places[(places >= start) & (places < end)].tolist()
                self.all += len(mine) * pointers.get_element_ty().primitive_bitwidth // 8
                self.once |= set(mine)
            return load(pointers, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted)


@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "input gradient"])
def test_a_launch_reads_half_of_what_it_reads_of_int8(is_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, inputs, rows = 64, 128, 10
    found = stack("int4", 32, outputs, inputs)
    assert found.step is not None
    whole = four_bit.integers(found)  # [E, I, O], as an int8 stack that lies turned round
    offset = torch.arange(E + 1, dtype=torch.int32) * rows
    read = []
    for weight, step in ((whole, None), (found.packed, found.step)):
        one = Product(
            random(E * rows, outputs if is_gradient else inputs), weight, offset, None, torch.float32, not is_gradient,
            found.scale, is_gradient, step=step,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            reads = Reads(patch, weight)
            result = fused(one, Tile(16, 64, 64))
        with monkeypatch.context() as patch:
            steps = Reads(patch, *([] if step is None else [step]))
            fused(one, Tile(16, 64, 64))
        assert reads.all == len(reads.once) == weight.nbytes  # one tile of rows an expert: nothing is read twice
        assert steps.all == len(steps.once) == (0 if step is None else E * inputs * outputs // 32)
        read.append((reads.all, reads.all + steps.all, result))
    (int8, int8_all, theirs), (ours, ours_all, mine) = read
    assert ours == int8 / 2
    assert ours_all == int8_all * 17 / 32
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)


SETTINGS = {
    "gated in halves": Setting(Case(T=7, K=2, E=4, H=64, I=64, R=3), halves),
    "interleaved, clamped, bias": Setting(Case(T=5, K=3, E=3, H=192, I=64, R=4), CLAMPED._apply_gate, has_bias=True),
    "one hot expert, norm": Setting(
        Case(T=9, K=1, E=4, H=64, I=64, R=2, routing="one"), halves, has_norm=True, has_bias=True
    ),
    "no gate, gate unknown": Setting(Case(T=4, K=2, E=3, H=64, I=64, R=2), unknown),
    "one projection": Setting(Case(T=9, K=2, E=3, H=64, I=192, R=5), SQUARED, is_gated=False, has_bias=True),
}


def build(name: str, kind: str) -> tuple[ExpertWeights, list[torch.Tensor], torch.Tensor]:
    weights, leaves, index = replace(SETTINGS[name], is_int8=False).build()
    return in_four_bits(weights, kind), leaves, index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_output_and_every_gradient_match_the_reference(name: str, kind: str) -> None:
    weights, leaves, index = build(name, kind)
    truth = run(reference.expert_layer, weights, [leaf.detach().double().requires_grad_() for leaf in leaves], index)
    rounded = run(reference.expert_layer, weights, leaves, index)
    for wanted, theirs, got in zip(truth, rounded, run(expert_layer, weights, leaves, index), strict=True):
        assert (got - wanted).norm() <= (theirs - wanted).norm() + 1e-5 * wanted.norm().clamp(min=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype", "roundings"),
    [("int4", *SIXTEEN_BITS[0]), ("mxfp4", *SIXTEEN_BITS[1]), ("grouped", *SIXTEEN_BITS[0])],
)
def test_in_sixteen_bits_no_tensor_is_further_from_the_truth_than_the_references(
    kind: str, dtype: torch.dtype, roundings: int
) -> None:
    assert_as_near_as_the_reference(*build("gated in halves", kind), dtype, roundings)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_no_token_reaches_get_no_gradient_and_are_not_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, leaves, index = build("one hot expert, norm", kind)
    idle = [part[:-1] for each in (weights.up, weights.down) for part in (each.weight, each.scale, each.step)
            if part is not None]  # fmt: skip
    reads = Reads(monkeypatch, *idle)
    _, *gradients = run(expert_layer, weights, leaves, index)
    assert reads.all == 0
    for gradient in gradients[2:]:
        assert gradient[:-1].count_nonzero() == 0
        assert gradient[-1].count_nonzero() > 0


def test_int4_takes_two_digits_and_they_are_nearer_than_sixteen_bit_rows() -> None:
    weights, leaves, index = build("gated in halves", "int4")
    with torch.no_grad():  # two outlier channels, as language models have them
        leaves[0][:, 5] *= 40
        leaves[0][:, 50] *= 20
    wanted = run(reference.expert_layer, weights, leaves, index)
    digits = run(expert_layer_w8a8, weights, leaves, index)
    with torch.no_grad():
        leaves[0].copy_(leaves[0].bfloat16())
    rounded = run(reference.expert_layer, weights, leaves, index)
    ours, theirs = (float((got[0] - wanted[0]).norm() / wanted[0].norm()) for got in (digits, rounded))
    assert 0 < ours < 0.1 * theirs
    for mine, law in zip(digits, wanted, strict=True):
        assert_near(mine, law.double(), 3e-3)


@pytest.mark.parametrize("kind", ["mxfp4", "grouped"])
def test_what_is_no_whole_number_is_multiplied_with_rows_as_they_are(kind: str) -> None:
    weights, leaves, index = build("gated in halves", kind)
    x, routing_weights, *_ = (leaf.detach() for leaf in leaves)
    plain, digits = (layer(x, index, routing_weights, weights) for layer in (expert_layer, expert_layer_w8a8))
    assert torch.equal(plain, digits)


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_a_stack_is_rehearsed(kind: str) -> None:
    """Forward and backward on fake tensors hold less than one stack multiplied out, in int8 or as it is."""
    rows, experts, hidden, width = 64, 16, 256, 128
    with FakeTensorMode(), Ledger() as ledger:

        def part(outputs: int, inputs: int) -> ExpertStack:
            groups = torch.empty(experts, inputs // 32, outputs, dtype=torch.int8 if kind == "int4" else torch.uint8)
            scale = torch.empty(experts, outputs) if kind == "int4" else groups
            packed = torch.empty(experts, inputs // 2, outputs, dtype=torch.uint8)
            return ExpertStack(packed, scale if kind != "grouped" else groups.half(), None, True,
                               groups if kind == "int4" else None)  # fmt: skip

        weights = ExpertWeights(part(2 * width, hidden), part(hidden, width), halves)
        x = torch.empty(rows, hidden, dtype=torch.bfloat16, requires_grad=True)
        index, mixing = torch.empty(rows, 2, dtype=torch.long), torch.empty(rows, 2)
        A, B = torch.empty(experts, 2, hidden, requires_grad=True), torch.empty(experts, 2 * width, 2)
        before = ledger.live
        output = expert_layer(x, index, mixing, weights, LoraFactors(A, B))
        assert output.shape == (rows, hidden)
        ledger.mark("forward")
        output.sum().backward()
        peak = max(ledger.peaks["start"], ledger.peak) - before
    assert 0 < peak < experts * hidden * 2 * width // 2
