"""This machine's card: found, shared with others, of an old generation; or there, and of no use to this torch."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import torch

from toolkit.errors import ResourceError
from toolkit.plan import Device, choose_device, default_backend, default_dtype, make_plan, unusable_card
from toolkit.plan.devices import this_device
from toolkit.plan.driver import Driver, find_driver, is_built_for, why_unusable
from toolkit.recipe import Recipe, parse
from toolkit.report import machine

MODEL = "allenai/OLMoE-1B-7B-0924-Instruct"
GIB = 1 << 30


def recipe(dtype: str = "auto", experts: str = "auto") -> Recipe:
    model = {"model_name_or_path": MODEL, "dtype": dtype}
    return parse(json.dumps({"model": model, "data": {"train": "none"}, "placement": {"experts": experts}}))


class Library:
    """libcuda.so.1 of a machine with one card."""

    def __init__(self, version: int = 13000, error: int = 0, cards: int = 1, capability: tuple[int, int] = (8, 6)):
        self.version, self.error, self.cards, self.capability = version, error, cards, capability

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.cards
        return 0

    def cuDeviceGet(self, out: Any, number: int) -> int:
        out._obj.value = number
        return 0

    def cuDeviceGetName(self, out: Any, size: int, device: Any) -> int:
        out.value = b"NVIDIA GeForce RTX 3060"
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> int:
        out._obj.value = self.capability[attribute - 75]
        return 0


def put_in(monkeypatch: pytest.MonkeyPatch, library: Library | None, built_for: str | None = "13.0") -> None:
    """A driver in this machine, and a torch that does not see its card."""

    def load(name: str) -> Library:
        assert name == "libcuda.so.1"
        if library is None:
            raise OSError(name)
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # a CUDA build would load the driver's other library
    monkeypatch.setattr(torch.version, "cuda", built_for)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card that torch sees; what it says of it may be changed."""
    says: dict[str, Any] = {"sm": (8, 6), "free": 11 * GIB, "total": 12 * GIB, "count": 1, "built": ["sm_80", "sm_86"]}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: says["sm"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: says["built"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: says["count"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (says["free"], says["total"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
    properties = type("Properties", (), {"total_memory": says["total"]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return says


@pytest.mark.parametrize(
    ("library", "built_for", "told"),
    [
        (Library(12080), "13.0", r"RTX 3060 is here, but its driver is for CUDA 12\.8 .*13\.0; install NVIDIA driver "
         r"580 or later, or run bash scripts/setup\.sh"),
        (Library(12080, capability=(12, 0)), "13.0", r"install NVIDIA driver 580 or later; or set training.use_cpu"),
        (Library(11040), "12.6", r"install NVIDIA driver 525 or later; or set training.use_cpu=true"),
        (Library(), None, r"RTX 3060 is here, but torch .* has no CUDA; bash scripts/setup\.sh installs"),
        (Library(12020), None, r"has no CUDA; install NVIDIA driver 580 or later, or run bash scripts/setup\.sh"),
        (Library(error=803), "13.0", r"does not start \(CUDA error 803\); restart the machine"),
        (Library(), "13.0", r"does not see it; look at what nvidia-smi and onecard doctor say"),
    ],
)  # fmt: skip
def test_a_card_that_torch_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, library: Library, built_for: str | None, told: str
) -> None:
    put_in(monkeypatch, library, built_for)
    with pytest.raises(ResourceError, match=told) as refused:
        this_device()
    assert "\n" not in str(refused.value)
    assert this_device(use_cpu=True).kind == "cpu"
    assert choose_device("rtx-4090").kind == "cuda"
    assert any(hint in str(refused.value) for hint in machine.machine()["hints"])


@pytest.mark.parametrize("library", [None, Library(error=100), Library(error=34), Library(cards=0)])
def test_a_machine_without_a_card_computes_on_its_processor(
    monkeypatch: pytest.MonkeyPatch, library: Library | None
) -> None:
    put_in(monkeypatch, library)
    assert this_device().kind == "cpu"
    assert unusable_card() is None


def test_what_the_driver_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(12080, cards=2))
    assert find_driver() == Driver((12, 8), (("NVIDIA GeForce RTX 3060", (8, 6)),) * 2)
    assert "2.13.0" in why_unusable(Driver((12, 8), (("x", (8, 6)),)), "13.0", "2.13.0")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 1), ["sm_75", "sm_120"], True),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_machine_code_runs_within_its_major_version(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert is_built_for(capability, built) is runs


def test_a_card_that_torch_is_not_built_for_is_refused(card: dict[str, Any]) -> None:
    card["sm"] = (6, 1)
    with pytest.raises(ResourceError, match=r"RTX 3060 is sm_61, and torch .* is built for sm_80, sm_86; set ONECARD"):
        this_device()


def test_what_other_programs_hold_is_not_planned_with(card: dict[str, Any]) -> None:
    assert this_device().free == 12 * GIB - (GIB - (256 << 20))
    card["free"] = 10 * GIB
    found = this_device()
    assert (found.memory, found.taken) == (12 * GIB, 2 * GIB - (256 << 20))
    made = make_plan(recipe(), for_training=False)
    assert made.memory == found.free
    assert any("other programs hold 1.8 of the card's 12.0 GiB" in note for note in made.notes)
    card["free"] = 6 * GIB
    with pytest.raises(ResourceError, match=r"has 6\.2 GiB free, others use 5\.8 GiB"):
        make_plan(recipe(experts="resident")).require_fit()


def test_one_card_of_several_is_used_and_told(card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    card["count"] = 2
    notes = make_plan(recipe(), for_training=False).notes
    assert any("2 cards are visible, only the first is used" in note for note in notes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not any("visible" in note for note in make_plan(recipe(), for_training=False).notes)


def test_before_sm_80_experts_are_computed_one_by_one_in_float16(card: dict[str, Any]) -> None:
    card["sm"], card["built"] = (7, 5), ["sm_75"]
    made = make_plan(recipe(), for_training=False)
    assert (made.dtype, made.backend) == ("float16", "onecard_per_expert")
    assert any(note.startswith("sm_75: experts run one by one") for note in made.notes)
    assert any("emulated" in note for note in make_plan(recipe(dtype="bfloat16"), for_training=False).notes)
    for capability in ((8, 0), (12, 0), None):
        device = Device("cuda", "card", GIB, capability=capability)
        assert (default_dtype(device), default_backend(device)) == ("bfloat16", "onecard_triton")
