"""Two processes over gloo, as `accelerate launch` starts them, train what one process trains; and they resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from safetensors.torch import load_file

from tests.faults.conftest import Run, onecard, recipe
from tests.unit.documentation.warm import warm_python
from toolkit.errors import ResourceError
from toolkit.processes import first_one_first, is_first, join, processes

__all__ = ["onecard", "recipe"]

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--main_process_port", "0"]  # fmt: skip


def entries(run: Path) -> dict[int, dict[str, float]]:
    """What was logged at each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def test_two_processes_train_what_one_does_and_resume(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = ["training.max_steps=4", "training.save_steps=2", "data.max_samples=60", "eval.enabled=false"]
    script = Path(__file__).with_name("two_processes.py")
    arguments = ["train", recipe, *same, f"training.output_dir={two}"]
    with warm_python():
        done = subprocess.run(
            [*LAUNCH, str(script), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "processes: 2, 2 sequences per step" in done.stderr
    assert done.stderr.count("resuming from checkpoint-2") == 1, "both processes speak, or none resumed"
    assert done.stderr.count("already finished") == 1
    assert done.stdout.splitlines()[-2:] == [f"{rank}: only the first one saw it" for rank in range(2)]
    whole, resumed = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "whole", two / "adapter")
    )
    assert whole == resumed

    status, _, err = onecard(
        "train", recipe, *same, "training.gradient_accumulation_steps=2", f"training.output_dir={one}"
    )
    assert status == 0, err
    alone, together, again = (entries(run) for run in (one, tmp_path / "whole", two))
    assert alone.keys() == together.keys() == again.keys() == {1, 2, 3, 4}
    for step, entry in alone.items():
        assert together[step]["num_tokens"] == entry["num_tokens"]
        for name in ("loss", "aux_loss", "grad_norm"):
            assert together[step][name] == pytest.approx(entry[name], rel=1e-5), (step, name)
            assert again[step][name] == together[step][name], (step, name)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    for name, tensor in adapters[0].items():
        assert (adapters[1][name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_alone_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert (processes(), is_first()) == (1, True)
    with first_one_first():
        pass
    monkeypatch.setenv("RANK", "1")
    assert not is_first()


def test_processes_that_do_not_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps what it found out first: each would train for itself without a word."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="2 expected, 1 joined"):
        join("cpu")
