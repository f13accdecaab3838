"""Cards that are old, small, shared or broken: each ends in one line and its exit code, or goes on as it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.card.machine import ROOT, Machine, Outcome

Train = Callable[..., tuple[Outcome, Path]]

DESKTOP = 3 << 29
"""Bytes that a desktop's windows and a browser hold of a card."""
OLMOE = ROOT / "recipes" / "olmoe-1b-7b.yaml"


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def errors(outcome: Outcome) -> list[str]:
    """Lines that the command wrote of what went wrong."""
    return [line for line in outcome.err.splitlines() if line.startswith("onecard: ")]


def require_one_line(outcome: Outcome, code: int, *words: str) -> None:
    """Ended with this code and one line that has these words, and no traceback."""
    assert outcome.code == code, outcome.err[-2000:]
    (line,) = errors(outcome)
    assert outcome.err.rstrip().endswith(line)
    assert "Traceback" not in outcome.err
    assert len(line) < 400
    for word in words:
        assert word in line


FAULTS = {
    "a driver too old": ({"driver": 12020}, 5, ("driver",)),
    "a card before sm_75": ({"sm": 61, "name": "NVIDIA GeForce GTX 1080"}, 5, ("sm_61",)),
    "a context that is lost": ({"poison_at": 2500}, 5, ("the card failed",)),
    "another program that takes the memory": (
        {"memory": 2 << 30, "take_after": 3, "take_bytes": 2 << 30},
        5,
        ("out of memory",),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_line_and_its_exit_code(name: str, train: Train, machine: Machine) -> None:
    card, code, words = FAULTS[name]
    outcome, _ = train("run", on=machine.with_card(**card))
    require_one_line(outcome, code, *words)


WORKING = {
    "two cards": {"devices": 2},
    "sm_75": {"sm": 75, "name": "NVIDIA GeForce RTX 2070"},
    "8 GiB": {"memory": 8 << 30, "name": "NVIDIA GeForce RTX 3070"},
    "a desktop": {"other": DESKTOP},
    "sm_89": {"sm": 89, "name": "NVIDIA GeForce RTX 4070", "multiprocessors": 46},
    "sm_120": {"sm": 120, "name": "NVIDIA GeForce RTX 5080", "multiprocessors": 84},
}


@pytest.mark.parametrize("name", WORKING)
def test_other_cards_train(name: str, train: Train, machine: Machine) -> None:
    outcome, folder = train("run", on=machine.with_card(**WORKING[name]))
    outcome.require()
    assert adapter(folder)


def test_a_tile_that_does_not_compile_is_left_out(train: Train, machine: Machine) -> None:
    """On this card every tile gives the same bits, so the adapter is the same."""
    whole, other = train("whole"), train("other", on=machine.with_card(refused_stages=4))
    other[0].require()
    assert adapter(other[1]) == adapter(whole[1])


def test_a_kernel_of_which_no_tile_compiles_is_one_line(train: Train, machine: Machine) -> None:
    outcome, _ = train("run", on=machine.with_card(refused_stages=3))
    require_one_line(outcome, 5, "a kernel does not compile for this card", "gpu_check.py")


def test_what_a_desktop_holds_is_in_the_plan(machine: Machine) -> None:
    free, shared = (machine.with_card(other=other).onecard("plan", OLMOE, "--json") for other in (0, DESKTOP))
    assert '"fits": true' in free.require().out
    assert free.out != shared.out


def test_a_plan_for_a_small_card_streams_or_says_what_to_do(machine: Machine) -> None:
    outcome = machine.with_card(memory=6 << 30, name="NVIDIA GeForce RTX 3050").onecard("plan", OLMOE)
    if outcome.code == 0:
        assert "streamed: experts of" in outcome.err + outcome.out
    else:
        require_one_line(outcome, 5)
