"""Stacks in files, slots in memory: right bytes at right places, failures in one line, and the guess what is next."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toolkit.errors import ModelError, ResourceError
from toolkit.offload.store import FromFiles
from toolkit.offload.stream import ExpertStream

UP, DOWN = (4, 6, 5), (4, 5, 3)
STACKS = {"a": ("a.up", "a.down"), "b": ("b.up", "b.down")}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Two layers in two files, with something else between."""
    tensors = {}
    for number, layer in enumerate(STACKS):
        part = {
            f"{layer}.up": torch.randint(-127, 128, UP, dtype=torch.int8),
            f"{layer}.between": torch.randn(7),
            f"{layer}.down": torch.randint(-127, 128, DOWN, dtype=torch.int8),
        }
        save_file(part, tmp_path / f"model-{number}.safetensors")
        tensors |= part
    return tensors


def test_an_image_holds_both_stacks(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    files = FromFiles(tmp_path, STACKS)
    image = torch.zeros(files.layouts["b"].bytes, dtype=torch.int8)
    assert files.fill(image, "b", None) == image.numel()
    up, down = files.layouts["b"].views(image)
    assert torch.equal(up, stored["b.up"])
    assert torch.equal(down, stored["b.down"])


def test_some_experts_leave_the_others_alone(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    files = FromFiles(tmp_path, STACKS)
    image = torch.zeros(files.layouts["a"].bytes, dtype=torch.int8)
    assert files.fill(image, "a", [1, 3]) == image.numel() // 2
    for view, name in zip(files.layouts["a"].views(image), STACKS["a"], strict=True):
        assert torch.equal(view[[1, 3]], stored[name][[1, 3]])
        assert not view[[0, 2]].any()


@pytest.mark.usefixtures("stored")
def test_a_stack_that_is_not_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.between is not there in 8 or 4 bit; write the int8 checkpoint again"):
        FromFiles(tmp_path, {"a": ("a.up", "a.between")})


@pytest.mark.usefixtures("stored")
def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-0.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"model-0\.safetensors: not a safetensors file"):
        FromFiles(tmp_path, STACKS)


@pytest.mark.usefixtures("stored")
def test_a_file_that_is_cut_short_fails_where_it_is_used(tmp_path: Path) -> None:
    files = FromFiles(tmp_path, STACKS)
    stream = ExpertStream({layer: layout.bytes for layer, layout in files.layouts.items()}, files, torch.device("cpu"))
    path = tmp_path / "model-0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ResourceError, match="ends early"), stream.present("a", None, trains=True):
        pytest.fail("handed out")
    path.write_bytes(whole)
    with stream.present("a", None, trains=True) as image:  # a failed slot is filled again
        assert image.any()


class Recorded:
    """A filler that notes what it is asked for, and fills a slot with the layer's number."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self.released: list[int] = []

    def fill(self, image: torch.Tensor, layer: str, experts: Sequence[int] | None) -> int:
        assert image.data_ptr() in self.released, "the slot's zeros may still be under way"
        self.asked.append(layer)
        self.threads.add(threading.current_thread().name)
        image.fill_(int(layer))
        return 1

    def release(self, image: torch.Tensor) -> None:
        self.released.append(image.data_ptr())


def visits(stream: ExpertStream, order: Sequence[int], *, trains: bool) -> None:
    for number in order:
        with stream.present(str(number), None, trains=trains) as image:
            assert image.eq(number).all()


def stream_of_layers(count: int) -> tuple[ExpertStream, Recorded]:
    filler = Recorded()
    return ExpertStream({str(number): 8 for number in range(count)}, filler, torch.device("cpu")), filler


def test_training_reads_each_layer_once_up_and_once_down() -> None:
    stream, filler = stream_of_layers(5)
    step = [0, 1, 2, 3, 4, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    for _ in range(2):
        visits(stream, step, trains=True)
    up, down, again = ["0", "1", "2", "3", "4"], ["2", "1", "0"], ["2", "3", "4"]
    assert filler.asked == [*up, *down, *again, *down]
    assert filler.threads != {threading.current_thread().name}


def test_evaluation_goes_round() -> None:
    stream, filler = stream_of_layers(4)
    visits(stream, [0, 1, 2, 3] * 3, trains=False)
    assert filler.asked[:12] == ["0", "1", "2", "3"] * 3


def test_any_order_gives_the_right_layers() -> None:
    stream, _ = stream_of_layers(6)
    visits(stream, torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(0)).tolist(), trains=True)


def test_a_slot_in_use_is_not_filled_again() -> None:
    stream, _ = stream_of_layers(4)
    with stream.present("0", None, trains=True) as held:
        visits(stream, [1, 2, 3, 1], trains=True)
        assert held.eq(0).all()


def test_two_layers_never_move_again() -> None:
    stream, filler = stream_of_layers(2)
    visits(stream, [0, 1, 1, 0] * 4, trains=True)
    assert filler.asked == ["0", "1"]
