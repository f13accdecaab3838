"""Experts that stream through the card give the same bits, in both orders that CUDA allows; no race is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.card.conftest import NANO
from tests.card.machine import ROOT, Machine, Outcome

Train = Callable[..., tuple[Outcome, Path]]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def resident(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("resident") / "run"
    given = (f"training.output_dir={folder}", *NANO)
    machine.onecard("train", ROOT / "recipes" / "quickstart.yaml", *given).require()
    return adapter(folder)


ACCUMULATED = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
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


@pytest.mark.parametrize("experts", ["int4", "mxfp4"])
def test_streamed_experts_of_four_bits_give_the_same_bits(experts: str, train: Train) -> None:
    kind = f"quantization.experts={experts}"
    usual, streamed = train("usual", kind), train("streamed", kind, *STREAMED["two layers"])
    usual[0].require()
    assert "four_bit_forward_kernel" in streamed[0].require().report["triton"]
    assert adapter(streamed[1]) == adapter(usual[1])


def test_several_micro_batches_in_one_pass_give_the_same_bits(train: Train, machine: Machine) -> None:
    """Layer by layer, all micro-batches of a step: as one by one over resident layers."""
    usual, layered = train("usual", *ACCUMULATED), train("layered", *ACCUMULATED, *STREAMED["host"])
    layered[0].require()
    assert adapter(layered[1]) == adapter(usual[1])


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_no_race_is_seen(experts: str, train: Train, machine: Machine) -> None:
    kind = f"quantization.experts={experts}"
    outcome, _ = train("watched", kind, *STREAMED["two layers"], on=machine.with_card(races=1))
    assert outcome.require().report["races"] == {}
