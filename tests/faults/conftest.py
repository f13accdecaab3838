"""The command in this process, and a small recipe on the embedded model that each test spoils in one way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.cli import main

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
MODEL = QUICKSTART / "nano-qwen3moe-2m"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def onecard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with these arguments; gives the exit code, stdout and stderr."""
    for limit in ("_WORTH_A_LINE", "_PLAIN_SECONDS"):  # a slow machine says more on the way
        monkeypatch.setattr(f"toolkit.steps.{limit}", float("inf"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onecard", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that trains a few steps on the embedded model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
model:
  model_name_or_path: {MODEL}
lora: {{r: 4}}
data:
  train: {QUICKSTART}/data/category.train.jsonl
  validation: {QUICKSTART}/data/category.validation.jsonl
  max_samples: 48
training:
  output_dir: {tmp_path}/run
  max_steps: 3
  learning_rate: 1e-3
  max_length: 256
  use_cpu: true
eval: {{max_samples: 8, max_new_tokens: 4}}
"""
    )
    return path
