"""The streams' rules: what CUDA promises is kept, and what it does not promise does not happen."""

from __future__ import annotations

import json

import pytest

from tests.card.machine import Machine

START = """
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from tests.card import library, replay
if _get_current_dispatch_mode() is None:
    replay.install()
side, main = torch.cuda.Stream(), torch.cuda.current_stream()
source = torch.arange(4.0).pin_memory()
target = torch.zeros(4, device="cuda")
torch.cuda.synchronize()
def copy():
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
"""
MISSED, SEEN = "[0.0, 0.0, 0.0, 0.0]", "[0.0, 1.0, 2.0, 3.0]"
SHOW = "\nprint(target.tolist())"

PROGRAMS = {
    "a copy that nobody waits for": ("copy()", MISSED),
    "the host waits for the stream": ("copy(); side.synchronize()", SEEN),
    "the host waits for the device": ("copy(); torch.cuda.synchronize()", SEEN),
    "the stream waits for the stream": ("copy(); main.wait_stream(side)", SEEN),
    "an event recorded before the copy": ("e = side.record_event(); copy(); main.wait_event(e)", MISSED),
    "an event recorded after the copy": ("copy(); e = side.record_event(); main.wait_event(e)", SEEN),
    "an event that was recorded again": (
        "e = side.record_event(); copy(); side.record_event(e); main.wait_event(e)",
        SEEN,
    ),
    "the host waits for an event": ("copy(); side.record_event().synchronize()", SEEN),
    "a chain of streams": (
        "copy(); third = torch.cuda.Stream(); third.wait_stream(side); main.wait_stream(third)",
        SEEN,
    ),
    "a wait of another stream's": ("copy(); torch.cuda.Stream().wait_stream(side)", MISSED),
    "who asks long enough": ("copy(); e = side.record_event()\nwhile not e.query(): pass", SEEN),
    "pinned memory that changes too early": (
        "copy(); source.fill_(7); side.synchronize()",
        "[7.0, 7.0, 7.0, 7.0]",
    ),
    "pageable memory may change at once": (
        "given = torch.arange(4.0)\nwith torch.cuda.stream(side): target.copy_(given, non_blocking=True)\n"
        "given.fill_(7); side.synchronize()",
        SEEN,
    ),
    "zeros that come after a copy": (
        "target = torch.zeros(4, device='cuda'); copy(); side.synchronize()",
        MISSED,
    ),
    "an operator sees its own stream's copies": ("target.copy_(source, non_blocking=True)", SEEN),
    "an operator on the side stream sees the copy": (
        "copy()\nwith torch.cuda.stream(side): target = target + 0\nmain.wait_stream(side)",
        SEEN,
    ),
}


ALL = """
import json, sys
start, programs = json.load(sys.stdin)
results = {}
for name, program in programs.items():
    room = {}
    exec(start + program, room)
    results[name] = str(room["target"].tolist())
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(machine: Machine) -> dict[str, str]:
    programs = {name: program for name, (program, _) in PROGRAMS.items()}
    done = machine.python("-c", ALL, given=json.dumps([START, programs]))
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_work_is_done_as_late_as_it_may(name: str, results: dict[str, str]) -> None:
    assert results[name] == PROGRAMS[name][1]


def test_at_once_is_another_order(machine: Machine) -> None:
    done = machine.with_card(late=0).python("-c", START + "copy()" + SHOW)
    assert done.stdout.strip() == SEEN, done.stderr


def test_memory_is_budgeted_and_comes_back(machine: Machine) -> None:
    program = """
import torch
from tests.card import library
free, total = torch.cuda.mem_get_info()
print(total >> 20, (total - free) >> 20)
room = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
try:
    torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    print("refused")
del room
torch.cuda.empty_cache()
print((torch.cuda.mem_get_info()[0] == free), library.counts().peak > free - (70 << 20))
"""
    done = machine.with_card(memory=1 << 30, other=100 << 20).python("-c", program)
    assert done.stdout.split() == ["1024", "400", "refused", "True", "True"], done.stderr


def test_random_numbers_follow_the_cards_own_state(machine: Machine) -> None:
    program = """
import torch
from tests.card import replay
replay.install()
torch.manual_seed(3)
first = torch.rand(5, device="cuda")
state = torch.cuda.get_rng_state()
second = torch.rand(5, device="cuda")
torch.rand(3)
torch.cuda.set_rng_state(state)
again = torch.rand(5, device="cuda")
print(torch.equal(second, again), torch.equal(first, second))
"""
    assert machine.python("-c", program).stdout.split() == ["True", "False"]


def test_what_is_not_rehearsed_is_said(machine: Machine) -> None:
    program = """
import torch
from tests.card import replay
replay.install()
from torch.nn.attention import SDPBackend, sdpa_kernel
q = torch.ones(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16)
torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum().item()
"""
    done = machine.python("-c", program)
    assert "dropout inside an attention kernel is not rehearsed" in done.stderr


def test_what_torch_compiles_for_the_card_when_asked_is_rehearsed(machine: Machine) -> None:
    program = """
import torch
from tests.card import replay
replay.install()
x = torch.tensor([-2.0, 0.0, 3.0], device="cuda")
print(torch.exp2(x).tolist(), torch.special.exp2(x).tolist(), torch.lgamma(x.exp2()).tolist()[1])
"""
    done = machine.python("-c", program)
    assert done.stdout.split(" ") == ["[0.25,", "1.0,", "8.0]", "[0.25,", "1.0,", "8.0]", "0.0\n"], done.stderr


def test_a_lost_context_stays_lost(machine: Machine) -> None:
    program = """
import torch
x = torch.ones(3, device="cuda")
for _ in range(2):
    try:
        for _ in range(20):
            x = x + 1
        torch.cuda.synchronize()
    except RuntimeError as error:
        print("illegal memory access" in str(error))
"""
    assert machine.with_card(poison_at=10).python("-c", program).stdout.split() == ["True", "True"]
