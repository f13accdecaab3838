"""The two ways of a grouped product give the same numbers, and the choice between them is made once and kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from toolkit.ops.triton import launch, tune
from toolkit.ops.triton.launch import Product, chunked, fused
from toolkit.ops.triton.tiles import Tile, candidates, default_tile

COUNTS = [5, 0, 19, 0, 2]
S, E, N, K, R, M = sum(COUNTS), len(COUNTS), 24, 40, 3, 9
OFFSET = torch.tensor([0, *itertools.accumulate(COUNTS)], dtype=torch.int32)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(is_swapped: bool, is_scale_on_input: bool) -> Product:
    weight = (random(E, N, K) * 40).round().clamp(-127, 127).to(torch.int8)
    return Product(
        random(M, K),
        weight.transpose(1, 2).contiguous() if is_swapped else weight,
        OFFSET,
        (torch.arange(S) * 7 % M).int(),
        torch.float32,
        is_swapped,
        random(E, K if is_scale_on_input else N).abs(),
        is_scale_on_input,
        bias=random(E, N),
        low=random(S, R),
        factor=random(E, R, N),
        is_factor_swapped=True,
    )


@pytest.mark.parametrize("experts_at_a_time", [1, 2, 5])
@pytest.mark.parametrize(("is_swapped", "is_scale_on_input"), [*itertools.product([False, True], repeat=2)])
def test_dequantised_experts_give_what_the_kernel_gives(
    is_swapped: bool, is_scale_on_input: bool, experts_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_CHUNK_BYTES", experts_at_a_time * 4 * N * K)
    one = product(is_swapped, is_scale_on_input)
    torch.testing.assert_close(chunked(one), fused(one), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, group=1), Tile(32, 64, 16), Tile(16, 32, 64, group=2)], ids=str)
def test_every_tile_gives_the_same_numbers(tile: Tile) -> None:
    one = product(False, False)
    torch.testing.assert_close(fused(one, tile), fused(one), rtol=1e-5, atol=1e-3)


def test_ways_are_named_once_and_begin_with_the_default() -> None:
    one = product(False, False)
    names = list(tune.ways(one))
    assert names[0] == str(default_tile(S // E, N, 4))
    assert names[-1] == tune.CHUNKED
    assert len(names) == len(set(names)) == len(candidates(S // E, N, 4)) + 1


def timer(times: dict[str, float], asked: list[str]) -> Callable[[Callable[[], torch.Tensor]], float]:
    """Stands for the card's clock: a way returns its name, its time is looked up; none means it does not run."""

    def measure(option: Callable[[], torch.Tensor]) -> float:
        name = str(option())
        asked.append(name)
        if name not in times:
            raise RuntimeError("out of resource: shared memory")
        return times[name]

    return measure


OPTIONS = {name: (lambda name=name: name) for name in ("a", "b", "c")}


def test_the_fastest_way_that_runs_is_chosen_once_and_read_back(tmp_path: Path) -> None:
    path, asked = tmp_path / "deep" / "choices.json", []
    clock = timer({"a": 2.0, "c": 1.0}, asked)
    first = tune.Choices(path)
    assert tune.choose("kind", OPTIONS, first, clock) == "c"
    assert tune.choose("kind", OPTIONS, first, clock) == "c"
    assert tune.choose("kind", OPTIONS, tune.Choices(path), clock) == "c"
    assert asked == ["a", "b", "c"]
    assert json.loads(path.read_text()) == {"kind": "c"}
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def test_what_other_processes_chose_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    ours, theirs = tune.Choices(path), tune.Choices(path)
    theirs.put("their kind", "a")
    ours.put("our kind", "b")
    assert tune.Choices(path).get("their kind") == "a"
    assert tune.Choices(path).get("our kind") == "b"


def test_a_tile_that_does_not_compile_is_left_out(tmp_path: Path) -> None:
    def clock(option: Callable[[], torch.Tensor]) -> float:
        if option() == "a":
            raise PTXASError("too much data")
        if option() == "b":
            raise OutOfResources(200_000, 101_376, "shared memory")
        return 1.0

    assert tune.choose("kind", OPTIONS, tune.Choices(tmp_path / "choices.json"), clock) == "c"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_card_that_fails_while_ways_are_timed_is_not_a_slow_way(tmp_path: Path, error: Exception) -> None:
    choices = tune.Choices(tmp_path / "choices.json")

    def clock(option: Callable[[], torch.Tensor]) -> float:
        raise error

    with pytest.raises(type(error), match="illegal memory"):
        tune.choose("kind", OPTIONS, choices, clock)
    assert choices.get("kind") is None


@pytest.mark.parametrize("content", ["{", "[1]", '{"kind": "gone"}', "\x00"])
def test_a_damaged_or_outdated_file_is_timed_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content)
    assert tune.choose("kind", OPTIONS, tune.Choices(path), timer({"b": 1.0}, [])) == "b"
    assert tune.Choices(path).get("kind") == "b"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = tune.Choices(tmp_path / "file" / "choices.json")
    assert tune.choose("kind", OPTIONS, choices, timer({"a": 1.0}, [])) == "a"
    assert choices.get("kind") == "a"


def test_where_nothing_runs_the_default_says_why(tmp_path: Path) -> None:
    choices = tune.Choices(tmp_path / "choices.json")
    assert tune.choose("kind", OPTIONS, choices, timer({}, [])) == "a"
    assert choices.get("kind") is None


def test_kinds_differ_where_speed_does() -> None:
    kinds = [tune.kind_of(product(*flags), "card") for flags in itertools.product([False, True], repeat=2)]
    assert len(set(kinds)) == 4
    assert kinds[0] == "card, float32, int8, rows 16, E 5, N 24, K 40, R 3, gathered"
    few, many, more = (tune.kind_of(replace(product(False, False), row=torch.zeros(rows)), "card") for rows in (
        E, E * 300, E * 9000))  # fmt: skip
    assert few == kinds[0]  # the smallest tile has 16 rows
    assert many == more != few
