"""The script that rehearses a recipe at its real size, on a model that is small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.card.machine import ROOT, Machine

FEW = ("eval.max_samples=2", "data.max_samples=100", "training.logging_steps=1")


def rehearsed(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "scripts" / "rehearse_card.py"), *arguments, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_recipe_is_rehearsed(tmp_path: Path) -> None:
    given = ("--device", "rtx-3060", "--races", "--other", "1.5", "--keep", str(tmp_path))
    code, found = rehearsed("recipes/quickstart.yaml", *given, *FEW)
    assert (code, found["steps"], found["races"]) == (0, 2, 0), found["error"]
    assert found["after_load"] < found["step_peak"] < found["reserved_peak"] + 1
    assert found["launches"] > 500
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_load_alone_is_rehearsed(tmp_path: Path) -> None:
    given = ("--device", "rtx-3060", "--steps", "1", "--until", "attach", "--keep", str(tmp_path))
    half = ("placement.experts=host", "placement.share=0.5")
    code, found = rehearsed("recipes/quickstart.yaml", *given, *FEW, *half, "training.packing=false")
    assert (code, found["steps"], found["streamed"]) == (0, 0, "2 of 4"), found["error"]
    assert found["after_load"] < found["attached"] <= found["reserved_peak"]
    assert [part["part"] for part in found["report"]["parts"]][-2:] == ["attach", "the end"]
    assert not (tmp_path / "run" / "adapter").exists()
    (written,) = (tmp_path / "onecard" / "int8").glob("*/*.safetensors")
    assert written.stat().st_blocks * 512 < 1 << 16 < written.stat().st_size


def test_a_card_that_is_too_small_is_said(tmp_path: Path) -> None:
    given = ("--device", "rtx-3060", "--other", "11.6", "--keep", str(tmp_path))
    code, found = rehearsed("recipes/quickstart.yaml", *given, *FEW)
    assert code == 5
    assert found["error"].startswith("onecard: ")


SIZES = {"allenai/OLMoE-1B-7B-0924-Instruct": 13.84e9, "openai/gpt-oss-20b": 13.76e9}
"""Bytes: two for each parameter, but 4.25 bits for the 19.11 billion of gpt-oss' experts."""


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_is_nothing_but_its_size(name: str, machine: Machine, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.card.checkpoints import hollow_checkpoint
hollow_checkpoint(sys.argv[1], Path(sys.argv[2]))
"""
    done = machine.python("-c", program, name, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == pytest.approx(SIZES[name], rel=1e-3)
    assert sum(file.stat().st_blocks * 512 for file in files) < 8 << 20
