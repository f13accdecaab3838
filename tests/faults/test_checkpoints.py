"""Checkpoints of our own: any damage is seen, order is by step, and rotation never leaves fewer than it may."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from scripts.faults.corruptions import corruptions
from toolkit.errors import ModelError, ResourceError
from toolkit.training.checkpoint import (
    clear_leftovers,
    every_checkpoint,
    flatten,
    newest_checkpoint,
    open_checkpoint,
    random_state,
    read_json,
    read_tensors,
    restore_random_state,
    rotate,
    unflatten,
    write_checkpoint,
)


def save(folder: Path, step: int, eval_loss: float | None = None) -> Path:
    tensors = {"a.safetensors": {"x": torch.full((3, 5), float(step))}, "b.safetensors": {}}
    texts = {"a.json": f'{{"step": {step}}}'}
    return write_checkpoint(folder, step, tensors=tensors, texts=texts, facts={"eval_loss": eval_loss}).path


def steps(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in every_checkpoint(folder)]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7, 1.5)
    found = open_checkpoint(path)
    assert (found.step, found.facts) == (7, {"eval_loss": 1.5})
    assert read_tensors(path / "a.safetensors")["x"].tolist() == [[7.0] * 5] * 3
    assert read_tensors(path / "b.safetensors") == {}
    assert read_json(path / "a.json") == {"step": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_every_kind_of_damage_is_seen_and_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    other = save(tmp_path / "other", 4)
    chance = random.Random(0)
    tried = 0
    for damage in corruptions(path, other, chance, 200):
        damage()
        with pytest.raises(ModelError):
            open_checkpoint(path)
        shutil.rmtree(path)
        path.mkdir()
        for name, content in whole.items():
            (path / name).write_bytes(content)
        open_checkpoint(path)
        tried += 1
    assert tried == 200


@pytest.mark.parametrize("name", ["a.safetensors", "a.json", "b.safetensors", "manifest.json"])
def test_a_file_that_is_missing_or_no_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 2)
    content = (path / name).read_bytes()
    (path / name).unlink()
    with pytest.raises(ModelError, match=name):
        open_checkpoint(path)
    (tmp_path / "elsewhere").write_bytes(content)
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=name):
        open_checkpoint(path)
    (path / name).unlink()
    os.mkfifo(path / name)  # must not be opened: nobody ever writes to it
    with pytest.raises(ModelError, match=name):
        open_checkpoint(path)


def test_a_renamed_checkpoint_is_none(tmp_path: Path) -> None:
    save(tmp_path, 2).rename(tmp_path / "checkpoint-9")
    with pytest.raises(ModelError, match="holds step 2"):
        open_checkpoint(tmp_path / "checkpoint-9")


def test_the_newest_valid_one_is_taken_and_the_reason_said(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoint-6" / "a.json").write_text("{}")
    (tmp_path / "checkpoint-8").mkdir()
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found
    assert found.step == 4
    assert "checkpoint-8" in said[0]
    assert "no manifest.json" in said[0]
    assert "checkpoint-6/a.json: 2 bytes, not" in said[1]


def test_order_is_by_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for age, step in enumerate((9, 10, 100)):
        os.utime(save(tmp_path, step), (2_000_000_000 - 1000 * age,) * 2)  # the newest looks the oldest
    found = newest_checkpoint(tmp_path)
    assert found
    assert found.step == 100
    rotate(tmp_path, 2, set())
    assert steps(tmp_path) == [100, 10]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path, limit: int) -> None:
    for step, loss in ((1, 0.7), (2, 0.5), (3, 0.5), (4, 0.9), (5, None), (6, 0.8), (7, None)):
        save(tmp_path, step, loss)
    rotate(tmp_path, limit, set())
    assert steps(tmp_path) == [*range(7, 7 - max(2, limit), -1), 3]
    assert {path.name[0] for path in tmp_path.iterdir()} == {"c"}


def test_rotation_counts_only_valid_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "a.json").unlink()
    rotate(tmp_path, 2, set())
    assert steps(tmp_path) == [3, 1]
    (tmp_path / "checkpoint-3" / "a.json").unlink()
    rotate(tmp_path, 2, set())
    assert steps(tmp_path) == [3, 1]  # with one valid one left, nothing is removed


def test_leftovers_never_count_and_are_cleared(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    for name in (".checkpoint-3.partial", ".checkpoint-1.discarded", ".checkpoint-2.old"):
        shutil.copytree(path, tmp_path / name)
    assert steps(tmp_path) == [2]
    clear_leftovers(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "a.json").unlink()
    assert open_checkpoint(save(tmp_path, 2)).step == 2


def test_what_does_not_read_back_is_an_error_and_the_older_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)

    def rots(path: Path) -> None:
        raise ModelError(f"{path}: not the bytes that were written")

    monkeypatch.setattr("toolkit.training.checkpoint.open_checkpoint", rots)
    with pytest.raises(ResourceError, match="check the disk"):
        save(tmp_path, 4)
    assert open_checkpoint(tmp_path / "checkpoint-2").step == 2


STATES: list[object] = [
    {"state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2, 3) / 3}, 1: {}}, "groups": [{"betas": (0.9, 0.999)}]},
    {"$odd": 1, "few": [0.1, 1e-308, None, True], "quant": {"map": torch.arange(4, dtype=torch.uint8)}},
    random_state(),
]


@pytest.mark.parametrize("state", STATES, ids=["optimizer", "odd", "random"])
def test_state_comes_back_bit_for_bit(tmp_path: Path, state: object) -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(flatten(state, tensors, "s")))
    again: dict[str, torch.Tensor] = {}
    assert flatten(unflatten(tree, tensors), again, "s") == flatten(state, {}, "s")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_random_numbers_go_on() -> None:
    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be kept"):
        flatten({"f": print}, {}, "s")
