"""A card is told to compute the same numbers each time while it trains, and only then."""

from __future__ import annotations

import pytest
import torch

from toolkit.training.train import same_each_time


def modes() -> tuple[bool, bool, bool]:
    """What torch is told: only such algorithms, merely warn where there are none, fill new memory."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize(("device", "inside"), [("cuda", (True, True, False)), ("cpu", None)])
def test_modes_hold_within_the_block_alone(device: str, inside: tuple[bool, bool, bool] | None) -> None:
    before = modes()
    with same_each_time(device):
        assert modes() == (inside or before)
    assert modes() == before
    with pytest.raises(RuntimeError, match="in a step"), same_each_time(device):
        raise RuntimeError("in a step")
    assert modes() == before
