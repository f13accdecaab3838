"""Work side by side, collected in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from toolkit.ops.workers import run_in_order


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_every_task_is_collected_once_in_order(threads: int, count: int) -> None:
    seen: list[tuple[int, int]] = []
    run_in_order(range(count), lambda task: task * task, lambda task, square: seen.append((task, square)))
    assert seen == [(task, task * task) for task in range(count)]
    assert torch.get_num_threads() == threads


def test_tasks_really_run_side_by_side() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=30)
    try:
        run_in_order(range(2), lambda task: both.wait(), lambda task, result: None)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("failing", [0, 3, 9])
@pytest.mark.parametrize("where", ["compute", "collect"])
def test_the_first_failure_ends_it_and_is_raised(threads: int, failing: int, where: str) -> None:
    collected: list[int] = []

    def compute(task: int) -> int:
        if where == "compute" and task == failing:
            raise ValueError(f"task {task}")
        return task

    def collect(task: int, result: int) -> None:
        if where == "collect" and task == failing:
            raise ValueError(f"task {task}")
        collected.append(result)

    with pytest.raises(ValueError, match=f"task {failing}"):
        run_in_order(range(10), compute, collect)
    assert collected == list(range(len(collected)))
    assert len(collected) <= failing
    assert torch.get_num_threads() == threads
    run_in_order(range(3), lambda task: task, lambda task, result: collected.append(result))
    assert collected[-3:] == [0, 1, 2]


def test_gradients_are_off_and_inference_mode_reaches_every_thread(threads: int) -> None:
    modes: list[tuple[bool, bool]] = []

    def compute(task: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    run_in_order(range(8), compute, lambda task, mode: modes.append(mode))
    assert set(modes) == {(False, False)}
    with torch.inference_mode():
        run_in_order(range(8), compute, lambda task, mode: modes.append(mode))
    assert set(modes[8:]) == {(False, True)}
