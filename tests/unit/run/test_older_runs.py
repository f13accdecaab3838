"""Runs and artifacts that an older build wrote: they resume, verify, load and answer with this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard
from toolkit.run_folder import RunFolder

__all__ = ["onecard"]

OLDER = Path(__file__).parents[2] / "fixtures" / "older_runs"
HERE = (
    f"model.model_name_or_path={MODEL}",
    f"data.train={QUICKSTART}/data/category.train.jsonl",
    f"data.validation={QUICKSTART}/data/category.validation.jsonl",
)
"""Where the base and the data are now; the runs know them under another folder."""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLDER, tmp_path / "older"))


def test_a_stopped_run_goes_on(onecard: Run, older: Path) -> None:
    run = RunFolder(older / "stopped")
    status, _, err = onecard("train", run.recipe, *HERE, f"training.output_dir={run.path}", "--other-versions")
    assert status == 0, err
    assert "resuming from checkpoint-3" in err
    summary, finished = run.read_summary(), RunFolder(older / "finished").read_summary()
    assert summary is not None
    assert finished is not None
    assert summary["results"]["training"]["steps"] == 4
    assert summary["results"]["adapted"]["loss"] == pytest.approx(finished["results"]["adapted"]["loss"], rel=1e-4)


def test_a_finished_run_is_shown_evaluated_and_verified(onecard: Run, older: Path) -> None:
    run, adapter = older / "finished", older / "finished" / "adapter"
    status, out, err = onecard("verify", adapter, "--base", MODEL, "--json")
    assert status == 0, err
    assert json.loads(out)["ok"]
    status, out, err = onecard("eval", run, *HERE, "--json")
    assert status == 0, err
    before = json.loads((run / "summary.json").read_text())["results"]["adapted"]["loss"]
    assert json.loads(out)["adapted"]["loss"] == pytest.approx(before, rel=1e-4)
    status, _, err = onecard("report", run)
    assert status == 0, err
    assert RunFolder(run).report.stat().st_size > 10_000


def test_an_artifact_opens_in_stock_peft(older: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), older / "finished" / "adapter")
    moved = [name for name, p in model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert len(moved) == sum("lora_B" in name for name, _ in model.named_parameters()) > 0
