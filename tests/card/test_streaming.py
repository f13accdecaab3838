"""Experts that stream through the card give the same bits, in both orders that CUDA allows; no race is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.card.machine import Machine, Outcome

Train = Callable[..., tuple[Outcome, Path]]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def resident(train: Train) -> bytes:
    outcome, folder = train("resident")
    outcome.require()
    return adapter(folder)


STREAMED = {
    "host": ("placement.experts=host", "placement.share=1"),
    "disk": ("placement.experts=disk", "placement.share=1"),
    "two layers": ("placement.experts=host", "placement.share=0.5"),
    "one layer": ("placement.experts=disk", "placement.share=0.25"),
}


@pytest.mark.parametrize("late", [1, 0], ids=["late", "at once"])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_experts_give_the_same_bits(
    name: str, late: int, train: Train, machine: Machine, resident: bytes
) -> None:
    outcome, folder = train("streamed", *STREAMED[name], on=machine.with_card(late=late))
    outcome.require()
    assert adapter(folder) == resident
