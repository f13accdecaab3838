"""Error feedback against brute force, against the algorithm as it is written down, and against plain rounding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.ops.int8 import quantize
from toolkit.quant.gptq.error_feedback import blend, compensate, row_errors
from toolkit.quant.gptq.search import Effort, decode, effort_for, pivot_order


def problem(matrices: int, outputs: int, inputs: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the second moments of correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(matrices, outputs, inputs, generator=generator)
    x = torch.randn(matrices, rows, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    return weight, x.transpose(-1, -2) @ x


@pytest.mark.parametrize("shape", [(1, 16, 96, 400), (3, 7, 130, 300), (2, 33, 64, 20), (4, 5, 65, 1), (1, 1, 1, 9)])
def test_no_row_is_worse_than_by_plain_rounding(shape: tuple[int, int, int, int]) -> None:
    weight, hessian = problem(*shape)
    solved = compensate(weight, hessian)
    stored, scale = quantize(weight)
    torch.testing.assert_close(solved.rounded_error, row_errors(weight, stored, scale, hessian))
    torch.testing.assert_close(solved.error, row_errors(weight, solved.stored, solved.scale, hessian))
    assert (solved.error <= solved.rounded_error).all()
    assert solved.stored.dtype == torch.int8
    assert solved.stored.abs().max() <= 127


def test_correlated_inputs_lose_much_of_the_error() -> None:
    weight, hessian = problem(2, 64, 128, 1000)
    solved = compensate(weight, hessian)
    assert solved.error.sum().sqrt() < 0.55 * solved.rounded_error.sum().sqrt()


def test_feedback_is_what_the_paper_writes_down() -> None:
    """The same integers as eliminating one input after the other from the inverse of H itself, in double precision."""
    weight, hessian = problem(1, 24, 70, 300)
    solved = compensate(weight, hessian, damping=0.01)
    scale = quantize(weight)[1][0].double()
    exact = hessian[0].double()
    damped = exact + 0.01 * exact.diagonal().mean() * torch.eye(70, dtype=torch.double)
    rest, levels = weight[0].double().clone(), torch.zeros(24, 70, dtype=torch.double)
    ahead = exact.diagonal().argsort(descending=True).tolist()
    while ahead:
        inverse = damped[ahead][:, ahead].inverse()
        first, *others = ahead
        levels[:, first] = (rest[:, first] / scale).round().clamp(-127, 127)
        error = (rest[:, first] - levels[:, first] * scale) / inverse[0, 0]
        rest[:, others] -= error[:, None] * inverse[0, 1:]
        ahead = others
    assert (solved.stored[0] == levels).double().mean() > 0.999


def test_a_small_problem_comes_near_the_best_there_is() -> None:
    weight, hessian = problem(1, 40, 4, 50)
    solved = compensate(weight, hessian, damping=1e-4)
    stored, scale = quantize(weight)
    steps = torch.tensor(list(itertools.product(range(-4, 5), repeat=4)), dtype=torch.float32)
    around = (stored.float().transpose(0, 1) + steps).clamp(-127, 127)
    errors = row_errors(weight.transpose(0, 1), around, scale.transpose(0, 1), hessian)
    best = errors.min(-1).values.sum()
    rounded = solved.rounded_error.sum()
    assert solved.error.sum() - best < 0.2 * (rounded - best)


@pytest.mark.parametrize("shape", [(1, 16, 96, 400), (3, 7, 37, 300), (2, 33, 64, 20), (1, 1, 1, 9)])
def test_a_search_finds_better_integers_and_spoils_no_row(shape: tuple[int, int, int, int]) -> None:
    weight, hessian = problem(*shape)
    once, found = compensate(weight, hessian), compensate(weight, hessian, effort=Effort(scales=5, kept=4))
    assert (found.error <= once.error).all()
    torch.testing.assert_close(found.error, row_errors(weight, found.stored, found.scale, hessian))
    assert torch.equal(found.rounded_error, once.rounded_error)
    assert found.stored.abs().max() <= 127
    if shape[0] * shape[1] > 1:
        assert found.error.sum() < 0.97 * once.error.sum()


def test_keeping_every_beginning_finds_the_best_integers_there_are() -> None:
    """Nearest and second nearest level of four inputs: all sixteen are compared, so none near by may be better."""
    weight, hessian = problem(1, 40, 4, 50)
    scale = quantize(weight)[1]
    upper = torch.linalg.cholesky(hessian[0].double().inverse()).mT.float()
    levels = decode(weight[0], scale, upper, kept=16)
    steps = torch.tensor(list(itertools.product(range(-2, 3), repeat=4)), dtype=torch.float32)
    around = (levels.transpose(0, 1) + steps).clamp(-127, 127)
    best = row_errors(weight.transpose(0, 1), around, scale.transpose(0, 1), hessian).min(-1).values
    found = row_errors(weight, levels, scale, hessian)[0]
    assert (found <= 1.001 * best).float().mean() > 0.9
    assert found.sum() < 1.05 * best.sum()


def test_an_order_leaves_the_least_for_last() -> None:
    """Each input's share of the product of all steps is what is left of it once those decided after it are known."""
    _, hessian = problem(1, 1, 12, 60)
    order = pivot_order(hessian[0].double())
    assert sorted(order.tolist()) == list(range(12))
    for position in range(12):
        undecided, known = order[: position + 1], order[position + 1 :]
        block = hessian[0].double()
        left = block[undecided][:, undecided] - block[undecided][:, known] @ torch.linalg.solve(
            block[known][:, known], block[known][:, undecided]
        )
        assert left.diagonal().argmin() == position


def test_work_is_bounded_whatever_the_shape() -> None:
    for outputs, inputs in ((64, 128), (256, 128), (576, 576), (1536, 576), (2048, 768), (4096, 14336)):
        effort = effort_for(outputs, inputs)
        if effort is not None:
            assert effort.scales * effort.kept * outputs * inputs**2 <= 1 << 30
    assert effort_for(4096, 14336) is None


def test_weights_on_the_grid_are_not_touched() -> None:
    _, hessian = problem(2, 9, 40, 100)
    levels = torch.randint(-127, 128, (2, 9, 40), generator=torch.Generator().manual_seed(1)).float()
    levels[..., 3] = 127
    solved = compensate(levels * 0.25, hessian)
    assert torch.equal(solved.stored.float(), levels)
    assert torch.equal(solved.scale, torch.full((2, 9), 0.25))
    assert not solved.error.any()


def test_nothing_known_gives_plain_rounding() -> None:
    weight, _ = problem(2, 9, 40, 100)
    solved = compensate(weight, torch.zeros(2, 40, 40))
    stored, scale = quantize(weight)
    assert torch.equal(solved.stored, stored)
    assert torch.equal(solved.scale, scale)


@pytest.mark.parametrize("broken", [-1.0, torch.nan])
def test_a_matrix_that_cannot_be_factored_is_rounded_and_spoils_no_other(broken: float) -> None:
    weight, hessian = problem(3, 9, 40, 100)
    alone = compensate(weight[2:], hessian[2:])
    hessian[1] = broken * torch.eye(40) * 1e6
    solved = compensate(weight, hessian)
    assert torch.equal(solved.stored[1], quantize(weight)[0][1])
    # A batch of three may be rounded otherwise than one alone: of 9 rows one may differ from where a tie falls.
    assert (solved.stored[2] == alone.stored[0]).float().mean() > 8 / 9
    assert (solved.error[2] < solved.rounded_error[2]).any()
    assert (solved.error[0] < solved.rounded_error[0]).any()


def test_matrices_of_a_batch_do_not_mix_and_every_run_is_the_same() -> None:
    weight, hessian = problem(3, 20, 96, 200)
    together, again = compensate(weight, hessian), compensate(weight, hessian)
    assert torch.equal(together.stored, again.stored)
    assert torch.equal(together.scale, again.scale)
    for index in range(3):
        alone = compensate(weight[index : index + 1], hessian[index : index + 1])
        assert (alone.stored[0] == together.stored[index]).float().mean() > 0.999


def test_rows_and_zeros_of_any_kind_are_survived() -> None:
    weight, hessian = problem(1, 6, 32, 64)
    weight[0, 2] = 0
    weight[0, 4, 7] = 1e6
    hessian[0, 5], hessian[0, :, 5] = 0, 0
    solved = compensate(weight, hessian)
    assert solved.scale.isfinite().all()
    assert not solved.stored[0, 2].any()
    assert (solved.error <= solved.rounded_error).all()


def test_an_expert_without_rows_takes_the_mean_and_one_with_many_keeps_its_own() -> None:
    _, own = problem(2, 1, 8, 5000)
    own[0] = 0
    mean = torch.eye(8)
    mixed = blend(own, torch.tensor([0, 5000]), mean, 10.0)
    torch.testing.assert_close(mixed[0], mean)
    torch.testing.assert_close(mixed[1], own[1] / 5000, rtol=0.01, atol=0.01)


class _Waits(TorchDispatchMode):
    """Counts how often a number is asked for, which on a card is a wait for all that is queued."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_search_waits_for_a_card_no_more_often_for_more_columns() -> None:
    def waits(inputs: int) -> int:
        rows = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0))
        with _Waits() as seen:
            compensate(torch.randn(1, 3, inputs), (rows.t() @ rows)[None], effort=Effort(2, 2))
        return seen.count

    assert waits(48) == waits(12) <= 8
