"""The script for the day with a card: what it makes, what it says of a piece that fails, and when it stops one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from scripts import card_day
from tests.harness.families import build, tiny_config
from toolkit.plan import shapes, skeletons
from toolkit.quant import load_int8


def test_the_random_checkpoint_is_one_of_that_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("olmoe")
    monkeypatch.setattr(shapes, "published_config", lambda name: config.to_diff_dict() | {"model_type": "olmoe"})
    monkeypatch.setattr(skeletons, "shape_of", lambda name: build(config))
    monkeypatch.setattr(card_day, "_SHARD", 1 << 12)
    folder = card_day.random_olmoe(tmp_path / "olmoe")
    assert len(list(folder.glob("*.safetensors"))) > 1
    _, coverage = load_int8(str(folder))
    assert coverage.stacks_int8 == coverage.stacks > 0
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "olmoe"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    card_day.random_olmoe(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_profile_is_of_a_run_that_is_told_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(day: card_day.Day, name: str, *words: Any, environment: dict[str, str] | None = None) -> Path:
        [trace] = (environment or {}).values()
        Path(trace).write_text('{"launches": 7}')
        return tmp_path

    monkeypatch.setattr(card_day, "random_olmoe", lambda folder: folder)
    monkeypatch.setattr(card_day.Day, "train", train)
    assert card_day.profile(card_day.Day(tmp_path)) == {"launches": 7}


def test_a_piece_that_fails_is_a_line_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(day: card_day.Day) -> dict[str, Any]:
        raise card_day.Failed("train x: exit code 5: out of memory")

    monkeypatch.setattr(card_day, "PIECES", {"kernels": wrong, "train": lambda day: {"loss": 1.5, "longest": []}})
    day = card_day.Day(tmp_path)
    found = [card_day.result(day, name) for name in ("kernels", "train")]
    assert [each["ok"] for each in found] == [False, True]
    lines = card_day.table(tmp_path).splitlines()
    assert "failed" in lines[2]
    assert "Failed: train x: exit code 5: out of memory" in lines[2]
    assert '{"loss": 1.5}' in lines[3]
    assert json.loads((tmp_path / "train.json").read_text())["date"]


def test_what_a_piece_started_ends_with_its_time(tmp_path: Path) -> None:
    inner = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        card_day.run_within([sys.executable, "-c", outer], 0.5)
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()


def test_a_profile_tells_launches_waits_and_the_busy_share() -> None:
    def event(key: str, count: int, micro: float) -> SimpleNamespace:
        return SimpleNamespace(key=key, count=count, self_device_time_total=micro)

    events = [event("cudaLaunchKernel", 40, 0), event("cudaStreamSynchronize", 3, 0), event("gemm", 20, 5e5)]
    found = card_day.read_profile([*events, event("cuLaunchKernelEx", 2, 0)], 2.0)
    assert (found["launches"], found["waits"], found["busy"]) == (42, 3, 0.25)
    assert found["longest"][0] == ["gemm", 20, 0.5]
