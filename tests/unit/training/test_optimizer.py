"""bitsandbytes' optimizers with one wait change nothing but the waiting."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import optimizer as theirs

from toolkit.training.optimizer import with_one_wait


def trained(optimizer: Any, steps: int) -> list[torch.Tensor]:
    """Parameters large enough for 8-bit state, and one that is not, after some steps."""
    random = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=random)) for size in (5000, 9000, 10)]
    unused = torch.nn.Parameter(torch.ones(3))
    running = optimizer([*parameters, unused], lr=1e-2, weight_decay=0.01)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        running.step()
    assert torch.equal(unused, torch.ones(3))
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit"])
def test_the_numbers_are_theirs_and_the_waits_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first assertion on waits fails, bitsandbytes waits no more and our class can go."""
    waits: list[torch.Tensor] = []
    monkeypatch.setattr(theirs, "sync_gpu", waits.append)
    stock = getattr(bitsandbytes.optim, name)
    wanted = trained(stock, 3)
    assert len(waits) >= 9
    waits.clear()
    found = trained(with_one_wait(stock), 3)
    assert not waits
    assert all(torch.equal(mine, law) for mine, law in zip(found, wanted, strict=True))


def test_others_are_left_as_they_are() -> None:
    assert with_one_wait(torch.optim.AdamW) is torch.optim.AdamW
