"""`init` from nothing to a recipe that plans, `doctor`'s hints, and what the shell is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard
from toolkit.errors import ResourceError
from toolkit.plan import make_plan, starting
from toolkit.plan.devices import Device
from toolkit.quant.stored import EXPERT_KINDS
from toolkit.recipe import load
from toolkit.report import machine

__all__ = ["onecard"]
DATA = QUICKSTART / "data" / "dialog.train.jsonl"


def test_init_writes_a_recipe_that_plans_and_previews(onecard: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    status, out, err = onecard("init", path, "--model", MODEL, "--data", DATA, "--card", "rtx-3060-12gb")
    assert status == 0, err
    assert out.strip() == str(path)
    assert f"onecard preview {path}" in err
    assert onecard("plan", path)[0] == 0
    assert json.loads(onecard("preview", path, "--json")[1])["splits"]["validation"]["kept"] > 0


def test_init_asks_on_a_terminal(onecard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([str(MODEL), str(DATA), ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    path = tmp_path / "asked.yaml"
    assert onecard("init", path)[0] == 0
    assert load(path).model.model_name_or_path == str(MODEL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", MODEL), "--model and --data go together"),
        (("--model", MODEL, "--data", DATA, "--card", "rtx-4091"), "rtx-4090"),
    ],
)
def test_init_refuses_and_leaves_nothing(onecard: Run, tmp_path: Path, arguments: tuple[Any, ...], words: str) -> None:
    status, _, err = onecard("init", tmp_path / "x.yaml", *arguments)
    assert status == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_the_first_setting_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    generous, _ = starting.first_that_fits(str(MODEL), str(DATA))
    assert ("lora", "r") not in generous
    rank_8 = {**generous, ("lora", "r"): 8, ("training", "optim"): "paged_adamw_8bit"}
    rank_16 = {**rank_8, ("lora", "r"): 16}
    needs, too_much = (make_plan(starting._recipe(fields)).bytes.total for fields in (rank_8, rank_16))
    assert needs < too_much
    memory = needs

    def small(name: str | None) -> Device:
        return Device("cpu", "small", memory)

    monkeypatch.setattr(starting, "choose_device", small)
    frugal, made = starting.first_that_fits(str(MODEL), str(DATA))
    assert frugal["lora", "r"] == 8
    assert made.recipe.training.optim == "paged_adamw_8bit"
    memory = 1
    monkeypatch.setattr(starting, "_STARTS", starting._STARTS[-1:])
    with pytest.raises(ResourceError, match="small has"):
        starting.first_that_fits(str(MODEL), str(DATA))


def test_doctor_says_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: "999.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = machine.machine()
    assert found["used"]["device"]["choice"] == "cpu"
    monkeypatch.setattr(machine, "_cards", lambda: iter([{"name": "old", "memory": 8 << 30, "sm": "75"}]))
    found = machine.machine()
    assert found["used"]["dtype"]["choice"] == "float16"
    assert "before sm_80" in found["used"]["experts"]["why"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("onecard pre", {"preview"}),
        ("onecard eval runs/x --lm", {"--lm-eval"}),
        ("onecard train r.yaml training.learn", {"training.learning_rate="}),
        ("onecard train r.yaml quantization.experts=", {"quantization.experts=", *(
            f"quantization.experts={word}" for word in (*EXPERT_KINDS, "none"))}),
        ("onecard sweep r.yaml lora.router=t", {"lora.router=true"}),
    ],
)  # fmt: skip
def test_the_shell_can_complete(typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    asked = {"_ONECARD_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", "from toolkit.cli import main; main()"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == offered, done.stderr
