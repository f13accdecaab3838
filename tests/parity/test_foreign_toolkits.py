"""`foreign_toolkits.py` judges `verify` by a merge: stock PEFT stands in for a toolkit, in this process."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from toolkit.adapters import attach_lora
from toolkit.architecture import auto_class
from toolkit.checkpoint.config import read_config

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with one toolkit whose command writes an adapter that leaves out expert 3 of the last layer."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS / "parity"), str(SCRIPTS), *sys.path])
    module, side = import_module("foreign_toolkits"), import_module("foreign_side")

    def run(words: list[str], python: str, scratch: Path) -> str:
        job = json.loads(Path(words[-1]).read_text())
        if words[-2] == "merged":
            side._merged(job)
            return ""
        base = auto_class(read_config(job["base"])).from_pretrained(job["base"], dtype=torch.float32)
        model = attach_lora(base, r=2, target_modules="attention")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
                if "layers.2.mlp.experts.lora_B" in name:
                    parameter.view(len(parameter), -1, 8)[..., 3] = 0
        model.save_pretrained(job["out"])
        return ""

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "_environment", lambda *_: sys.executable)
    return module


def test_verify_is_judged_by_a_merge_and_a_hole(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["unsloth", "--families", "qwen3_moe", "--asked", "experts by name"]
    assert script.main(asked) == 0
    told = capsys.readouterr().out
    assert (
        "| Unsloth 2026.10.9 | experts by name | qwen3_moe | 71 of 72, PEFT's fused stacks | 3 of 3 | 12 of 12 |"
        in told
    )
    assert "1 of 1 adapters: verify says what the toolkit's merge changes, and sees a hole\n0 not trained" in told
    monkeypatch.setattr(script, "with_a_hole", lambda adapter: adapter)
    assert script.main(asked) == 1
    assert "0 less where one B is zero" in capsys.readouterr().out


def test_every_toolkit_has_a_command_and_versions(script: ModuleType, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    job = {"base": "b", "rows": str(rows), "out": "o", "experts": ["mlp.experts.down_proj"], "rank": 2, "steps": 1}
    for name, each in script.TOOLKITS.items():
        words = script.command(name, "/e/bin/python", {**job, "length": 8, "rate": 0.1}, tmp_path)
        assert words[0].startswith("/e/bin/")
        assert each.packages[0].startswith("torch==")
        assert any(name.rpartition(" ")[2] in package for package in (*each.packages, *each.alone))
