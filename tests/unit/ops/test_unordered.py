"""What is written once is written without a sort, and everything else as the process wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from toolkit.ops.unordered import write_in_any_order


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def setting() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


class Watched(torch.autograd.Function):
    """Says under which setting a gradient passes."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        ctx.seen = args[1]
        result: torch.Tensor = args[0].clone()
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.seen.append(setting())
        return grads[0], None


def weights(x: torch.Tensor, seen: list[tuple[bool, bool]]) -> torch.Tensor:
    chosen, _ = Watched.apply(x, seen).softmax(-1).topk(2)
    return Watched.apply((chosen / chosen.sum(-1, keepdim=True)).half().float(), seen)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("pick", ["top-k", "rows"])
def test_only_the_pick_is_written_in_any_order(pick: str) -> None:
    found = []
    for spare in (False, True):
        x = torch.linspace(-2, 3, 24).view(3, 8).sin().requires_grad_()
        seen: list[tuple[bool, bool]] = []
        inside: list[bool] = []
        result = weights(x, seen) if pick == "top-k" else Watched.apply(x, seen).index_select(0, torch.tensor([2, 0]))
        if spare:
            write_in_any_order(result)
        name = "TopkBackward0" if pick == "top-k" else "IndexSelectBackward0"
        node = result.grad_fn
        while node is not None and node.name() != name:
            node = node.next_functions[0][0]
        assert node is not None
        node.register_prehook(lambda grads, inside=inside: inside.append(setting()[0]))
        (result * torch.arange(result.numel()).view_as(result)).sum().backward()
        assert inside == [not spare]
        assert set(seen) == {(True, True)}
        assert setting() == (True, True)
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.usefixtures("deterministic")
def test_what_is_further_off_or_has_no_gradient_stays() -> None:
    write_in_any_order(torch.ones(2, 2))
    x = torch.randn(4, 4, requires_grad=True)
    far = x.topk(2)[0]
    for _ in range(10):
        far = far * 1.0
    write_in_any_order(far)
    far.sum().backward()
    assert setting() == (True, True)
