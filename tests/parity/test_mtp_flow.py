"""A run with a head, and one that leaves a checkpoint's own head behind, through the verbs that users call."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.parity.conftest import EMBEDDED
from tests.parity.native_heads import native_checkpoint
from toolkit import flow
from toolkit.flow import Trained
from toolkit.mtp import HEAD_FILE
from toolkit.plan import make_plan
from toolkit.recipe import Recipe

DATA = EMBEDDED.parent / "data"


def trained(model: Path, folder: Path, **mtp: Any) -> tuple[Trained, Any, str]:
    """What two steps on definitions give, the plan, and what was said."""
    recipe = Recipe.model_validate(
        {
            "model": {"model_name_or_path": str(model)},
            "lora": {"r": 2},
            "mtp": mtp,
            "data": {
                "train": str(DATA / "define.train.jsonl"),
                "validation": str(DATA / "define.validation.jsonl"),
                "max_samples": 12,
            },
            "training": {"output_dir": str(folder), "max_steps": 2, "max_length": 64, "use_cpu": True},
            "eval": {"max_samples": 3, "max_new_tokens": 6},
        }
    )
    plan, told = make_plan(recipe), Console(file=io.StringIO(), width=400)
    base, tokenizer = flow.load(plan)
    batches = flow.build_batches(tokenizer, plan)
    result = flow.train(flow.attach(base, plan), tokenizer, batches, plan, told)
    return result, plan, told.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_with_a_head_teaches_measures_and_packages_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("toolkit.flow.head._DRAFTED", 2)
    monkeypatch.setattr("toolkit.flow.head._DRAFTED_TOKENS", 6)
    result, plan, told = trained(EMBEDDED, tmp_path / "run", enabled=True, depth=2, own_answers=4)
    assert "steps on the model's own answers to 4 prompts" in told
    assert result.drafting is not None
    assert result.drafting["training"]["steps"] > 2
    measured = result.drafting["trained"]
    assert measured["identical"]
    assert measured["tau"] >= 1.0
    assert set(measured) >= {"acceptance", "tokens_per_second", "plain_tokens_per_second"}
    artifact = flow.package(result, plan)
    assert (artifact / HEAD_FILE).is_file()
    assert "tau" in json.loads((artifact / "manifest.json").read_text())["results"]["mtp"]["trained"]
    head = flow.reopen_head(result.model, plan, artifact)
    assert {name for name, _ in head.named_parameters()} == {name for name, _ in result.head.named_parameters()}  # type: ignore[union-attr]


def test_a_native_head_left_behind_is_measured_and_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("toolkit.flow.head._DRAFTED", 2)
    monkeypatch.setattr("toolkit.flow.head._DRAFTED_TOKENS", 6)
    native_checkpoint("glm4_moe", tmp_path / "base", changes={"vocab_size": 2112})
    for path in EMBEDDED.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copyfile(path, tmp_path / "base" / path.name)
    result, _, told = trained(tmp_path / "base", tmp_path / "run")
    assert "warning: this checkpoint's multi-token-prediction head no longer fits the adapted model" in told
    assert "of first drafts" in told
    assert result.head is None
    assert result.drafting is not None
    assert set(result.drafting) == {"base", "stale"}
