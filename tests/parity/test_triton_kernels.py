"""Each kernel by itself, in Triton's interpreter, against what it stands for in torch, in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton")

from toolkit.ops.triton import products
from toolkit.ops.triton.gates import GateForm, recognize
from toolkit.ops.triton.routing import place_rows, route

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

COUNTS = [5, 0, 17, 1, 0]
"""Rows of each expert: fewer than a tile, none, more than one tile, a single one, none at the end."""
S, E, N, K, R, M = sum(COUNTS), len(COUNTS), 35, 41, 3, 9
OFFSET = torch.tensor([0, *itertools.accumulate(COUNTS)], dtype=torch.int32)
EXPERT = torch.repeat_interleave(torch.arange(E), torch.tensor(COUNTS))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_near(got: torch.Tensor, wanted: torch.Tensor, eps: float = 1e-6) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= eps * wanted.norm()


def int8(*shape: int) -> torch.Tensor:
    return (random(*shape) * 40).round().clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extra", ["nothing", "scale", "input scale", "gathered, everything"])
def test_grouped_gemm(extra: str, dtype: torch.dtype, is_swapped: bool) -> None:
    x, weight = random(S, K).to(dtype), int8(E, N, K)
    wanted_SN = torch.einsum("sk,snk->sn", x.double(), weight.double()[EXPERT])
    options: dict[str, Any] = {}
    row = None
    if extra == "scale":
        options = {"scale": random(E, N).abs()}
        wanted_SN *= options["scale"][EXPERT]
    elif extra == "input scale":
        options = {"scale": random(E, K).abs(), "is_scale_on_input": True}
        wanted_SN = torch.einsum("sk,snk->sn", x.double() * options["scale"][EXPERT], weight.double()[EXPERT])
    elif extra == "gathered, everything":
        x, row = random(M, K).to(dtype), (torch.arange(S) * 7 % M).int()
        low, factor = random(S, R).to(dtype), random(E, R, N).to(dtype)
        options = {"scale": random(E, N).abs(), "bias": random(E, N), "addend": random(S, N)}
        wanted_SN = torch.einsum("sk,snk->sn", x.double()[row.long()], weight.double()[EXPERT])
        wanted_SN = wanted_SN * options["scale"][EXPERT] + options["bias"][EXPERT]
        wanted_SN += torch.einsum("sr,srn->sn", low.double(), factor.double()[EXPERT]) + options["addend"]
        options |= {"low": low, "factor": factor, "is_factor_swapped": True}
    stored = weight.transpose(1, 2).contiguous() if is_swapped else weight
    got = products.grouped_gemm(x, stored, OFFSET, row, dtype, is_swapped=is_swapped, **options)
    assert got.dtype == dtype
    assert_near(got, wanted_SN, torch.finfo(dtype).eps * 4)


def test_grouped_gemm_on_two_digits_sums_each_in_whole_numbers() -> None:
    x, weight = int8(M, 2, K), int8(E, N, K)
    row, unit, scale = (torch.arange(S) * 7 % M).int(), random(M).abs(), random(E, N).abs()
    got = products.grouped_gemm(x, weight, OFFSET, row, torch.float32, scale=scale, x_unit=unit)
    whole = 254 * x[:, 0].long() + x[:, 1].long()
    exact = torch.einsum("sk,snk->sn", whole[row.long()], weight[EXPERT].long())
    torch.testing.assert_close(got, (exact * unit[row.long(), None] * scale[EXPERT]).float(), rtol=1e-6, atol=1e-6)


def test_no_rows_give_no_rows() -> None:
    empty = torch.zeros(E + 1, dtype=torch.int32)
    got = products.grouped_gemm(torch.empty(0, K), int8(E, N, K), empty, None, torch.float32)
    assert got.shape == (0, N)


@pytest.mark.parametrize("gathered", ["neither", "left", "right"])
def test_grouped_gram(gathered: str) -> None:
    rows = (torch.arange(S) * 4 % M).int()
    left, right = (random(M if gathered == side else S, w) for side, w in (("left", N), ("right", R)))
    left_row, right_row = (rows if gathered == side else None for side in ("left", "right"))
    got = products.grouped_gram(left, left_row, right, right_row, OFFSET)
    full_left = left if left_row is None else left[rows.long()]
    full_right = right if right_row is None else right[rows.long()]
    parts = [full_left[e == EXPERT].double().t() @ full_right[e == EXPERT].double() for e in range(E)]
    assert_near(got, torch.stack(parts))
    assert got[1].count_nonzero() == got[4].count_nonzero() == 0


FORMS = [
    GateForm("silu"),
    GateForm("silu", is_interleaved=True, limit=1.5, alpha=1.702, offset=1.0),
    GateForm("gelu", limit=1.0),
    GateForm("gelu_tanh", is_interleaved=True),
    GateForm("relu"),
    GateForm("relu_squared", is_gated=False),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gate_forward_and_backward(form: GateForm) -> None:
    rows, width = 3, 37
    y = random(rows, width * (2 if form.is_gated else 1)) * 2
    grad, weight = random(rows, width, seed=1), random(rows, seed=2)
    leaf = y.double().requires_grad_()
    value = form(leaf)
    (slope,) = torch.autograd.grad(value, leaf, grad.double() * weight.double()[:, None])
    assert_near(products.gate_forward(form, y), value.detach())
    dot = products.gate_backward(form, y, grad_in_place := grad.clone(), weight)
    assert_near(dot, (value.detach() * grad).sum(1))
    assert_near(y, slope)
    assert_near(grad_in_place, value.detach() * weight[:, None])


class Experts(nn.Module):
    """What an experts module tells: its numbers as attributes, its gate as a method."""

    def __init__(self, form: GateForm) -> None:
        super().__init__()
        self.form, self.swiglu_limit, self.alpha = form, form.limit, form.alpha

    def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
        return self.form(y)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_gate_is_recognized_by_its_numbers(form: GateForm) -> None:
    state = torch.get_rng_state()
    assert recognize(Experts(form)._apply_gate, 24, torch.device("cpu")) == form
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "gate",
    [
        lambda y: functional.mish(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
        lambda y: functional.silu(y.chunk(2, -1)[0]).clamp(max=7.0) * y.chunk(2, -1)[1],
        lambda y: functional.silu(y.chunk(2, -1)[1]) * y.chunk(2, -1)[0],
        lambda y: functional.leaky_relu(y),
        lambda y: functional.silu(y[..., :8]),
    ],
)
def test_a_gate_of_other_numbers_is_left_to_torch(gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert recognize(gate, 24, torch.device("cpu")) is None


@pytest.mark.parametrize("has_weight", [True, False])
def test_gather_sum(has_weight: bool) -> None:
    rows, weight = random(6, 37), random(4, 3)
    place = torch.tensor([[0, 5, 2], [1, 1, 3], [-1, 4, -1], [-1, -1, -1]], dtype=torch.int32)
    wanted = torch.zeros(4, 37, dtype=torch.float64)
    for t, k in itertools.product(range(4), range(3)):
        if place[t, k] >= 0:
            wanted[t] += rows[place[t, k]].double() * (weight[t, k] if has_weight else 1)
    assert_near(products.gather_sum(rows, place, weight if has_weight else None), wanted)


def test_split_rows() -> None:
    x = random(5, 70) * torch.tensor([1.0, 1e-6, 1e6, 0.0, 1.0])[:, None]
    got, unit = products.split_rows(x)
    whole = 254 * got[:, 0].double() + got[:, 1]
    assert bool(((whole * unit[:, None] - x).abs() <= 0.51 * unit[:, None]).all())
    assert got[:, 0].abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert unit[3] == pytest.approx(1 / 254)


def test_route_sorts_by_expert_and_leaves_strangers_out() -> None:
    index = torch.tensor([[3, 0], [0, 4], [3, 1], [9, 0]])
    routing = route(index, 4)
    assert routing.offset.tolist() == [0, 3, 4, 4, 6]
    assert routing.slot[:6].tolist() == [1, 2, 7, 5, 0, 4]
    assert routing.token[:6].tolist() == [0, 1, 3, 2, 0, 2]
    assert routing.place.tolist() == [[4, 0], [1, -1], [5, 3], [-1, 2]]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(300, 4, 60), (1, 1, 1), (257, 1, 3), (0, 2, 4)])
def test_route_is_that_of_the_sort(tokens: int, top_k: int, experts: int) -> None:
    """Rows beyond a block, experts that nobody takes, strangers, and no row at all."""
    index = torch.randint(0, experts + 2, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    routing, flat = route(index, experts), index.flatten()
    slot = flat.argsort(stable=True)
    assert torch.equal(routing.slot, slot)
    assert torch.equal(routing.token, (slot // top_k).int())
    wanted = slot.argsort().int().masked_fill(flat >= experts, -1)
    assert torch.equal(routing.place.flatten(), wanted)
    assert torch.equal(routing.offset, torch.searchsorted(flat[slot], torch.arange(experts + 1)).int())
    assert {each.dtype for each in (routing.token, routing.place, routing.offset)} == {torch.int32}


def test_operators_say_of_themselves_what_they_do() -> None:
    x, weight, checks = random(S, K), int8(E, N, K), ("test_schema", "test_faketensor")
    form = products._numbers(FORMS[1])
    calls = [
        (products.grouped_gemm, (x, weight, OFFSET, None, torch.bfloat16)),
        (products.grouped_gemm, (random(S, N), weight, OFFSET, None, torch.float32, True)),
        (products.grouped_gram, (x, None, random(S, R), None, OFFSET)),
        (products._gate_forward, (random(3, 8), *form)),
        (products._gate_backward, (random(3, 8), random(3, 4), random(3), *form)),
        (products.gather_sum, (x, torch.zeros(4, 3, dtype=torch.int32), None)),
        (products.split_rows, (x,)),
        (place_rows, (torch.tensor([0, 0, 2, 5]), torch.tensor([1, 2, 0, 3]), 2, 4)),
    ]
    for operator, arguments in calls:
        outcome = torch.library.opcheck(operator, arguments, test_utils=checks)
        assert set(outcome.values()) == {"SUCCESS"}
