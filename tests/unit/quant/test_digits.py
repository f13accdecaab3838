"""Products on a CPU's integer units against float64: shapes, layouts, and numbers that nobody would choose."""

from __future__ import annotations

import pytest
import torch

from toolkit.ops.split_int8 import _MOST_INPUTS, _has_integer_units, can_multiply, multiply

SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (1, 7, 3),
    (3, 64, 5),
    (16, 33, 600),
    (255, 100, 40),
    (257, 96, 513),
    (600, 17, 1030),
    (5, 4096, 2),
    (2000, 3, 4),
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where int8 products saturate digits are not used; here they are, with products in float64, which are exact."""

    def product(first: torch.Tensor, second: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        found = (first.double() @ second.double()).int()
        return found if out is None else out.copy_(found)

    if not _has_integer_units():
        monkeypatch.setattr(torch, "_int_mm", product)


def numbers(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    return x, torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)


def bound(x: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """What the docstring allows, [N, O]: of the digits, and of fp32's rounding of what the three give."""
    magnitudes = stored.double().abs().sum(1)
    return x.double().abs().amax(1, keepdim=True) * magnitudes * (2.0**-23 + 3 * 2.0**-24)


@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_the_docstring_says_in_either_layout(shape: tuple[int, int, int]) -> None:
    x, stored = numbers(*shape)
    exact = x.double() @ stored.double().t()
    for layout in (stored, stored.t().contiguous().t()):
        found = multiply(x, layout, transposed=True)
        assert found.dtype == torch.float32
        assert bool(((found - exact).abs() <= bound(x, stored)).all())
        assert torch.equal(multiply(x, layout.t(), transposed=False), found)
    spread = torch.empty(shape[0], 2 * shape[1])[:, ::2].copy_(x)
    assert torch.equal(multiply(spread, stored, transposed=True), multiply(x, stored, transposed=True))


def test_more_accurate_than_in_fp32() -> None:
    x, stored = numbers(256, 2048, 256)
    exact = x.double() @ stored.double().t()
    ours, theirs = (multiply(x, stored, transposed=True) - exact).abs(), (x @ stored.float().t() - exact).abs()
    assert ours.max() < theirs.max()


def test_a_rows_result_does_not_depend_on_its_neighbours() -> None:
    """To the bit, on any processor: sums of whole numbers are exact, in whatever order."""
    x, stored = numbers(700, 48, 30)
    whole = multiply(x, stored, transposed=True)
    for rows in (slice(0, 1), slice(250, 260), slice(400, 402), slice(699, 700)):
        assert torch.equal(multiply(x[rows], stored, transposed=True), whole[rows])


def test_numbers_of_all_sizes() -> None:
    """Tiny and huge rows, zeros, one number above all others, and the largest sums there can be."""
    stored = numbers(1, 64, 20)[1]
    for size in (0.0, 1e-38, 1e-30, 1e-20, 1.0, 1e30):
        x = numbers(9, 64, 20)[0] * size
        allowed = bound(x, stored) + 1e-30 * 64 * 128 * 2.0**-24
        found = multiply(x, stored, transposed=True)
        assert bool(((found - x.double() @ stored.double().t()).abs() <= allowed).all())
        assert torch.equal(multiply(x[:2], stored, transposed=True), found[:2])
    x = numbers(9, 64, 20)[0]
    x[:, 3] = 1e4
    assert bool(
        ((multiply(x, stored, transposed=True) - x.double() @ stored.double().t()).abs() <= bound(x, stored)).all()
    )
    full = torch.ones(2, _MOST_INPUTS)
    least = torch.full((1, _MOST_INPUTS), -128, dtype=torch.int8)
    assert multiply(full, least, transposed=True).flatten().tolist() == pytest.approx([-128.0 * _MOST_INPUTS] * 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_stays_so_and_in_its_row(bad: float) -> None:
    x, stored = numbers(4, 32, 6)
    clean = multiply(x, stored, transposed=True)
    x[2, 5] = bad
    for found in (
        multiply(x, stored, transposed=True),
        torch.cat([multiply(row[None], stored, transposed=True) for row in x]),
    ):
        assert not bool(found[2].isfinite().any())
        assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_other_numbers_and_machines_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x, stored = numbers(4, 32, 6)
    monkeypatch.setattr("toolkit.ops.split_int8._has_integer_units", lambda: True)
    assert not can_multiply(x, stored)
    assert can_multiply(x, stored.new_empty(1024, 512))
    assert can_multiply(x, stored.new_empty(3, 512, 1024))
    few, many = stored.new_empty(512, 512), torch.empty(17, 512)
    assert can_multiply(x, few)
    assert not can_multiply(many, few)
    monkeypatch.setattr("toolkit.ops.split_int8._FEWEST_FOR_FEW_ROWS", 1)
    assert can_multiply(x, stored)
    assert not can_multiply(x.bfloat16(), stored)
    assert not can_multiply(x, stored.float())
    assert not can_multiply(x, stored.to("meta"))
    assert not can_multiply(x, stored.new_zeros(1, _MOST_INPUTS + 1))
    monkeypatch.setattr("toolkit.ops.split_int8._has_integer_units", lambda: False)
    assert not can_multiply(x, stored)


def test_units_that_saturate_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older instructions do: two products are added in sixteen bits."""

    def saturating(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        products = first.int()[:, :, None] * second.int()[None]
        return (products[:, ::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1).sum(1).int()

    def exact(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.double() @ second.double()).int()

    has_units = _has_integer_units.__wrapped__
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    for product, expected in ((saturating, False), (exact, True)):
        monkeypatch.setattr(torch, "_int_mm", product)
        assert has_units() is expected
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    assert not has_units()
