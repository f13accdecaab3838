"""The probe before step 1: it changes no random number, leaves nothing, and says in one line what does not fit."""

from __future__ import annotations

import mmap
import random
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.training_args import OptimizerNames

from toolkit.errors import ResourceError, out_of_memory
from toolkit.training.adapter_steps import moment_bytes
from toolkit.training.memory import anonymous_memory, longest_rows, peak_of, probe


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_random_numbers_after_it_are_those_without_it() -> None:
    forgotten = []
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = draw()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    probe(draw, lambda: forgotten.append(True), tokens=1, held=10, device="cpu", advice="x")
    assert draw() == wanted
    assert forgotten == [True]


def test_memory_that_is_refused_is_one_line_with_advice() -> None:
    forgotten = []

    def too_much() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(ResourceError, match=r"longest batch \(77 tokens\); cheapest fix: lora.r=8") as caught:
        probe(too_much, lambda: forgotten.append(True), tokens=77, held=0, device="cpu", advice="lora.r=8")
    assert "\n" not in str(caught.value)
    assert forgotten == [True]


def test_other_errors_stay_what_they_are() -> None:
    def wrong() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        probe(wrong, lambda: None, tokens=1, held=0, device="cpu", advice="x")
    assert out_of_memory(MemoryError())


def test_the_longest_rows_come_first() -> None:
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2]]})
    assert longest_rows(rows, 2) == [1, 2]


def test_the_peak_is_seen_though_it_is_gone_at_the_end() -> None:
    before, size = anonymous_memory(), 64 << 20
    with peak_of("cpu") as peak:
        held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the heap may have so much left over
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        until = time.monotonic() + 10
        while peak.bytes < before + size // 2 and time.monotonic() < until:
            time.sleep(0.001)
        held.close()
    assert peak.bytes >= before + size // 2


def test_the_longest_batch_runs_beside_moments_of_the_optimizers_own_size() -> None:
    given = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_8bit": 2, "adamw_bnb_8bit": 2}
    assert {name: moment_bytes(OptimizerNames(name)) for name in given} == given  # as the trainer's arguments have it
    assert {name: moment_bytes(name) for name in given} == given
