"""Every expert backend against the law (`ops/reference.py`), over shapes and layouts nobody would choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn import functional

from toolkit.ops import LoraFactors, per_expert, reference
from toolkit.ops.experts import ExpertStack, ExpertWeights
from toolkit.ops.int8 import quantize
from toolkit.ops.per_expert import kept_rows
from toolkit.ops.rows import Routing
from toolkit.ops.split_int8 import _has_integer_units

Layer = Callable[..., torch.Tensor]
BACKENDS: dict[str, Layer] = {
    "per_expert": per_expert.expert_layer,
    "per_expert, up outputs kept": partial(per_expert.expert_layer, keep_up=True),
}


@dataclass(frozen=True)
class Case:
    """T tokens, K experts per token, E experts, H hidden, I intermediate, R rank; which experts are hit."""

    T: int
    K: int
    E: int
    H: int
    I: int  # noqa: E741
    R: int
    routing: str = "random"


CASES = [
    Case(T=7, K=2, E=4, H=12, I=20, R=3),
    Case(T=1, K=1, E=1, H=5, I=3, R=1),
    Case(T=1, K=3, E=3, H=8, I=6, R=2),
    Case(T=33, K=5, E=5, H=17, I=9, R=4, routing="all"),
    Case(T=40, K=1, E=13, H=11, I=7, R=2, routing="one"),
    Case(T=9, K=2, E=31, H=6, I=10, R=16),
    Case(T=64, K=4, E=7, H=24, I=40, R=5),
    Case(T=1100, K=1, E=2, H=6, I=4, R=9, routing="one"),
    Case(T=300, K=4, E=60, H=6, I=4, R=3),
    Case(T=900, K=2, E=41, H=10, I=6, R=2, routing="skewed"),
]


WAYS = ["integer units", "none", "together"]


@pytest.fixture(params=WAYS)
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in digits, through a buffer as on machines that have no units for whole numbers, and in batches."""
    if request.param == "together":
        return
    has_units = request.param == "integer units"
    if has_units and not _has_integer_units():
        pytest.skip("no integer units here")
    monkeypatch.setattr("toolkit.ops.small_experts._MOST_WEIGHTS", 0)
    monkeypatch.setattr("toolkit.ops.split_int8._has_integer_units", lambda: has_units)
    monkeypatch.setattr("toolkit.ops.split_int8._FEWEST_WEIGHTS", 1)
    monkeypatch.setattr("toolkit.ops.split_int8._FEWEST_FOR_FEW_ROWS", 1)


def build(
    case: Case, *, is_int8: bool, is_transposed: bool, has_bias: bool, is_gated: bool, has_norm: bool, seed: int = 0
) -> tuple[ExpertWeights, list[torch.Tensor], torch.Tensor]:
    """Frozen weights; the leaves with gradients: x, routing weights, up A, up B, down A, down B; and the routing."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def stack(out: int, in_: int) -> ExpertStack:
        weight = random(case.E, in_, out) if is_transposed else random(case.E, out, in_)
        stored, scale = quantize(weight, -2 if is_transposed else -1) if is_int8 else (weight, None)
        return ExpertStack(stored, scale, random(case.E, out) if has_bias else None, is_transposed)

    def gate(y: torch.Tensor) -> torch.Tensor:
        if not is_gated:
            return functional.relu(y) ** 2
        left, right = y[..., ::2].clamp(max=7.0), y[..., 1::2]  # interleaved and clamped, as some families have it
        return functional.silu(left) * (right + 1)

    width = (2 if is_gated else 1) * case.I
    norm = random(case.H)
    weights = ExpertWeights(
        stack(width, case.H),
        stack(case.H, case.I),
        gate,
        (lambda y: functional.rms_norm(y, (case.H,)) * norm.to(y.dtype)) if has_norm else None,
    )
    leaves = [
        random(case.T, case.H),
        random(case.T, case.K).softmax(-1),
        random(case.E, case.R, case.H),
        random(case.E, width, case.R) * 0.3,
        random(case.E, case.R, case.I),
        random(case.E, case.H, case.R) * 0.3,
    ]
    return weights, [leaf.requires_grad_() for leaf in leaves], routing(case, generator)


def routing(case: Case, generator: torch.Generator) -> torch.Tensor:
    """[T, K] expert numbers, no expert twice for a token."""
    if case.routing == "one":
        return torch.full((case.T, case.K), case.E - 1)
    if case.routing == "skewed":  # one expert has every token, the others a few
        others = torch.randint(1, case.E, (case.T, case.K - 1), generator=generator)
        return torch.cat([torch.zeros(case.T, 1, dtype=torch.long), others], dim=1)
    return torch.stack([torch.randperm(case.E, generator=generator)[: case.K] for _ in range(case.T)])


def run(layer: Layer, weights: ExpertWeights, leaves: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients of a fixed scalar of it."""
    x, routing_weights, *factors = leaves
    up, down = LoraFactors(*factors[:2]), LoraFactors(*factors[2:])
    output = layer(x, index, routing_weights, weights, up, down)
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).sin()
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves)]


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("layer", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("is_int8", [True, False])
@pytest.mark.parametrize(
    ("is_transposed", "has_bias", "is_gated", "has_norm"),
    [(False, False, True, False), (True, True, True, False), (False, False, False, False), (False, True, True, True)],
)
def test_output_and_every_gradient_match_the_reference(
    layer: Layer, case: Case, is_int8: bool, is_transposed: bool, has_bias: bool, is_gated: bool, has_norm: bool
) -> None:
    weights, leaves, index = build(
        case, is_int8=is_int8, is_transposed=is_transposed, has_bias=has_bias, is_gated=is_gated, has_norm=has_norm
    )
    truth = run(reference.expert_layer, weights, [leaf.detach().double().requires_grad_() for leaf in leaves], index)
    rounded = run(reference.expert_layer, weights, leaves, index)
    ours = run(layer, weights, leaves, index)
    for wanted, theirs, got in zip(truth, rounded, ours, strict=True):
        scale = wanted.norm().clamp(min=1e-6)
        # Tolerance: what the reference itself loses in fp32, and 1e-5 of the tensor's size.
        assert (got - wanted).norm() <= (theirs - wanted).norm() + 1e-5 * scale


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("is_int8", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", ""])
def test_without_gradients_the_output_is_the_same(case: Case, is_int8: bool, has_norm: bool) -> None:
    """The way that decoding takes; rows with a number beyond the experts are computed elsewhere."""
    weights, leaves, index = build(
        case, is_int8=is_int8, is_transposed=False, has_bias=has_norm, is_gated=not has_norm, has_norm=has_norm
    )
    x, routing_weights, *factors = (leaf.detach() for leaf in leaves)
    index[case.T // 2 :, 0] = case.E
    pair = LoraFactors(*factors[:2]), LoraFactors(*factors[2:])
    with torch.enable_grad():
        wanted = per_expert.expert_layer(x, index, routing_weights, weights, *pair)
    with torch.no_grad():
        got = per_expert.expert_layer(x, index, routing_weights, weights, *pair)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert wanted.norm() > 0 or case.T == case.K == 1


@pytest.mark.parametrize("layer", BACKENDS.values(), ids=BACKENDS)
def test_gradients_match_finite_differences(layer: Layer) -> None:
    weights, leaves, index = build(
        Case(T=5, K=2, E=3, H=4, I=3, R=2),
        is_int8=False,
        is_transposed=True,
        has_bias=True,
        is_gated=True,
        has_norm=True,
    )
    weights = ExpertWeights(_double(weights.up), _double(weights.down), weights.gate, lambda y: y.tanh())
    inputs = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def scalar(x: torch.Tensor, w: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return layer(x, index, w, weights, LoraFactors(*factors[:2]), LoraFactors(*factors[2:])).sum()

    assert torch.autograd.gradcheck(scalar, inputs)


@pytest.mark.parametrize("layer", BACKENDS.values(), ids=BACKENDS)
def test_adapter_changes_the_output_and_only_one_stack_may_carry_one(layer: Layer) -> None:
    weights, leaves, index = build(
        CASES[0], is_int8=True, is_transposed=False, has_bias=False, is_gated=True, has_norm=False
    )
    x, routing_weights, *factors = leaves
    bare = layer(x, index, routing_weights, weights)
    for up, down in ((LoraFactors(*factors[:2]), None), (None, LoraFactors(*factors[2:]))):
        adapted = layer(x, index, routing_weights, weights, up, down)
        wanted = reference.expert_layer(x, index, routing_weights, weights, up, down)
        assert (adapted - bare).abs().max() > 0.1
        torch.testing.assert_close(adapted, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", BACKENDS.values(), ids=BACKENDS)
def test_experts_that_no_token_reaches_get_no_gradient_and_are_not_read(layer: Layer) -> None:
    case = CASES[4]
    weights, leaves, index = build(
        case, is_int8=True, is_transposed=False, has_bias=False, is_gated=True, has_norm=False
    )
    poisoned = weights.up.scale
    assert poisoned is not None
    poisoned[: case.E - 1] = float("nan")
    output, *gradients = run(layer, weights, leaves, index)
    assert output.isfinite().all()
    for gradient in gradients[2:]:
        assert gradient[: case.E - 1].count_nonzero() == 0
        assert gradient[case.E - 1].count_nonzero() > 0


def felt_of_neighbours(layer: Layer, has_norm: bool) -> float:
    """How far tokens' outputs are from the truth alone, beside others, and beside others a million times as large.

    In units of what is allowed: what the law itself loses in fp32, and 1e-5 of the token's output.
    """
    case = Case(T=48, K=2, E=4, H=64, I=48, R=8)
    weights, leaves, index = build(
        case, is_int8=True, is_transposed=False, has_bias=True, is_gated=False, has_norm=has_norm
    )
    x, routing_weights, *factors = (leaf.detach() for leaf in leaves)

    def output(layer: Layer, x: torch.Tensor, part: slice) -> torch.Tensor:
        up, down = (LoraFactors(*(factor.to(x.dtype) for factor in pair)) for pair in (factors[:2], factors[2:]))
        return layer(x[part], index[part], routing_weights[part].to(x.dtype), weights, up, down)

    everyone, worst = slice(0, case.T), []
    truth = output(reference.expert_layer, x.double(), everyone)
    lost = (output(reference.expert_layer, x, everyone) - truth).norm(dim=1)
    for part in (slice(0, 1), slice(3, 9), slice(20, 48)):
        loud = x.clone()
        loud[: part.start] *= 1e6
        loud[part.stop :] *= 1e6
        allowed = lost[part] + 1e-5 * truth[part].norm(dim=1)
        for found in (output(layer, x, part), output(layer, x, everyone)[part], output(layer, loud, everyone)[part]):
            worst.append(((found - truth[part]).norm(dim=1) / allowed).max())
    return float(torch.stack(worst).max())


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("layer", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_token_feels_of_its_neighbours_no_more_than_rounding(layer: Layer, has_norm: bool) -> None:
    """They may change which kernel a BLAS takes, and so how a row is rounded; not what is computed."""
    assert felt_of_neighbours(layer, has_norm) <= 1


def test_a_layer_whose_tokens_share_a_scale_is_found_out() -> None:
    def shares_a_scale(x: torch.Tensor, *rest: object) -> torch.Tensor:
        unit = x.abs().max() / 127
        return reference.expert_layer((x / unit).round() * unit, *rest)  # type: ignore[arg-type]

    assert felt_of_neighbours(shares_a_scale, False) > 1000


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("units", WAYS[:2], indirect=True)
@pytest.mark.parametrize("keep_up", [False, True])
@pytest.mark.parametrize("case", [Case(T=1300, K=2, E=3, H=20, I=12, R=4), CASES[-1]], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(keep_up: bool, case: Case) -> None:
    built = build(case, is_int8=True, is_transposed=False, has_bias=True, is_gated=True, has_norm=False)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run(partial(per_expert.expert_layer, keep_up=keep_up), *built))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


def test_experts_with_few_rows_are_put_together_and_busy_ones_cut() -> None:
    case = CASES[-1]
    blocks = Routing(routing(case, torch.Generator().manual_seed(0)), case.E, 512).blocks
    segments = [segment for block in blocks for segment in block.segments]
    assert [(len(block.segments), block.segments[0].expert) for block in blocks[:2]] == [(1, 0), (1, 0)]
    assert max(len(block.segments) for block in blocks) > 2
    assert [segment.expert for segment in segments] == [0, 0, *range(1, case.E)]
    assert [block.rows.start for block in blocks[1:]] == [block.rows.stop for block in blocks[:-1]]
    assert blocks[-1].rows.stop == case.T * case.K
    for block in blocks:
        rows = torch.arange(block.rows.start, block.rows.stop)
        assert torch.equal(block.strip(block.pad(rows)), rows)
        assert len(block.token) == block.segments[-1].rows.stop


def test_the_same_bits_come_from_small_experts_every_time() -> None:
    built = build(
        Case(T=700, K=2, E=6, H=40, I=24, R=4),
        is_int8=True,
        is_transposed=False,
        has_bias=True,
        is_gated=True,
        has_norm=False,
    )
    first, *others = (run(per_expert.expert_layer, *built) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_few_rows_are_computed_as_they_are_and_more_in_fours() -> None:
    counts = [1, 2, 3, 4, 5, 33]
    index = torch.cat([torch.full((count, 1), expert) for expert, count in enumerate(counts)])
    segments = [segment for block in Routing(index, len(counts), 512).blocks for segment in block.segments]
    assert [segment.rows.stop - segment.rows.start for segment in segments] == [1, 2, 3, 4, 8, 36]


def test_what_is_kept_stays_small_beside_the_weights() -> None:
    weights, *_ = build(CASES[0], is_int8=True, is_transposed=False, has_bias=False, is_gated=True, has_norm=False)
    stored, outputs = weights.up.weight.nbytes + weights.down.weight.nbytes, 2 * CASES[0].I
    assert kept_rows(10**6, outputs, weights, torch.float32) == int(0.3 * stored) // (4 * outputs) > 0
    assert kept_rows(1, outputs, weights, torch.float32) == 1


def test_a_frozen_input_gets_no_gradient_and_the_factors_get_theirs() -> None:
    weights, leaves, index = build(
        CASES[0], is_int8=True, is_transposed=False, has_bias=False, is_gated=True, has_norm=False
    )
    wanted = run(per_expert.expert_layer, weights, leaves, index)[2:]
    leaves[0].requires_grad_(False)
    x, routing_weights, *factors = leaves
    up, down = LoraFactors(*factors[:2]), LoraFactors(*factors[2:])
    output = per_expert.expert_layer(x, index, routing_weights, weights, up, down)
    probe = torch.linspace(-1, 1, output.numel()).view_as(output).sin()
    got = torch.autograd.grad((output * probe).sum(), leaves[1:])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


def test_layouts_and_scaling_of_the_factors_are_the_callers_own() -> None:
    """PEFT keeps B expert-fastest: as a strided view it gives what a contiguous copy gives, gradients too."""
    weights, leaves, index = build(
        CASES[6], is_int8=True, is_transposed=True, has_bias=False, is_gated=True, has_norm=False
    )
    x, routing_weights, up_A, up_B, down_A, down_B = leaves
    strided = [B.detach().permute(1, 2, 0).contiguous().requires_grad_() for B in (up_B, down_B)]
    up, down = (LoraFactors(A, B.permute(2, 0, 1), 0.5) for A, B in zip((up_A, down_A), strided, strict=True))
    got = per_expert.expert_layer(x, index, routing_weights, weights, up, down)
    halves = [LoraFactors(up_A, up_B * 0.5), LoraFactors(down_A, down_B * 0.5)]
    wanted = reference.expert_layer(x, index, routing_weights, weights, *halves)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), strided),
        torch.autograd.grad(wanted.square().sum(), (up_B, down_B)),
        strict=True,
    ):
        difference = (ours.permute(2, 0, 1) - theirs).norm()
        assert difference <= 1e-5 * theirs.norm()


def test_numbers_past_the_last_expert_are_computed_elsewhere() -> None:
    """transformers marks rows of another rank's experts so."""
    case = CASES[6]
    weights, leaves, index = build(
        case, is_int8=True, is_transposed=False, has_bias=True, is_gated=True, has_norm=False
    )
    elsewhere = index.clone()
    elsewhere[::3, 1] = case.E
    ours = run(per_expert.expert_layer, weights, leaves, elsewhere)
    theirs = run(reference.expert_layer, weights, leaves, elsewhere)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert ours[2][::3, 1].count_nonzero() == 0


def _double(stack: ExpertStack) -> ExpertStack:
    bias = None if stack.bias is None else stack.bias.double()
    return ExpertStack(stack.weight.double(), stack.scale, bias, stack.is_transposed)
