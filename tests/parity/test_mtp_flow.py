"""A run with a head, and one that leaves a checkpoint's own head behind, through the verbs that users call."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.harness.native_heads import native_checkpoint
from tests.parity.conftest import EMBEDDED
from toolkit import run as job
from toolkit.errors import RecipeError
from toolkit.mtp.head_file import HEAD_FILE
from toolkit.plan import make_plan
from toolkit.recipe import Recipe
from toolkit.run import Trained
from toolkit.run.mtp import own_prompts

DATA = EMBEDDED.parent / "data"


@pytest.fixture(autouse=True)
def few_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What drafting is worth is measured on two short texts."""
    monkeypatch.setattr("toolkit.run.mtp._DRAFTED", 2)
    monkeypatch.setattr("toolkit.run.mtp._DRAFTED_TOKENS", 6)


def recipe(model: Path, folder: Path, training: dict[str, Any], mtp: dict[str, Any]) -> Recipe:
    """Definitions, few and short."""
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": str(model)},
            "lora": {"r": 2},
            "mtp": mtp,
            "data": {
                "train": str(DATA / "define.train.jsonl"),
                "validation": str(DATA / "define.validation.jsonl"),
                "max_samples": 12,
            },
            "training": {"output_dir": str(folder), "max_length": 64, "use_cpu": True, **training},
            "eval": {"max_samples": 3, "max_new_tokens": 6},
        }
    )


def trained(model: Path, folder: Path, **mtp: Any) -> tuple[Trained, Any, str]:
    """What two steps on definitions give, the plan, and what was said."""
    return followed(recipe(model, folder, {"max_steps": 2}, mtp))


def followed(asked: Recipe) -> tuple[Trained, Any, str]:
    """The same of any recipe."""
    plan, told = make_plan(asked), Console(file=io.StringIO(), width=400)
    base, tokenizer = job.load(plan)
    batches = job.build_batches(tokenizer, plan)
    trained = job.train(job.attach(base, plan), tokenizer, batches, plan, told)
    result = job.judge(trained, batches, plan, told)
    return result, plan, told.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_with_a_head_teaches_measures_and_packages_it(tmp_path: Path) -> None:
    result, plan, told = trained(EMBEDDED, tmp_path / "run", enabled=True, depth=2, own_answers=4)
    assert "steps on the model's own answers to 4 prompts" in told
    assert result.drafting is not None
    assert result.drafting["training"]["steps"] > 2
    measured = result.drafting["trained"]
    assert measured["identical"]
    assert measured["tau"] >= 1.0
    assert set(measured) >= {"acceptance", "tokens_per_second", "plain_tokens_per_second"}
    artifact = job.package(result, plan)
    assert (artifact / HEAD_FILE).is_file()
    assert "tau" in json.loads((artifact / "manifest.json").read_text())["results"]["mtp"]["trained"]
    head = job.reopen_head(result.model, plan, artifact)
    assert {name for name, _ in head.named_parameters()} == {name for name, _ in result.head.named_parameters()}  # type: ignore[union-attr]


def written(folder: Path, start: Path | None) -> Recipe:
    """Answers to definitions' prompts that are to be short."""
    asked = recipe(EMBEDDED, folder, {}, {"enabled": True, "depth": 2, "own_answers": 4}).model_dump()
    asked["lora"] |= {"adapter_name_or_path": str(start) if start else None}
    asked["training"] |= {
        "method": "grpo", "max_steps": 2, "per_device_train_batch_size": 8, "packing": False,
        "gradient_checkpointing": False, "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    asked["grpo"] |= {"num_generations": 2, "max_completion_length": 6}
    asked["eval"] |= {"metric": "reward"}
    asked["rewards"] = {"functions": [{"function": "regex", "pattern": "[ae]"}]}
    return Recipe.model_validate(asked)


def test_the_head_of_the_start_drafts_the_answers_that_a_run_learns_from(tmp_path: Path) -> None:
    result, plan, _ = trained(EMBEDDED, tmp_path / "taught", enabled=True, depth=2, own_answers=4)
    start = job.package(result, plan)
    again, _, told = followed(written(tmp_path / "run", start))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0.0 < lines[0]["drafts/accepted"] <= 1.0
    assert lines[0]["drafts/tokens_per_pass"] > 1.0
    assert any("eval_drafts/accepted" in line for line in lines)
    assert "steps on the model's own answers to 4 prompts" in told
    assert again.drafting is not None
    _, _, told = followed(written(tmp_path / "new", None))
    assert "it is new, so it drafts no answers" in told
    assert "drafts/accepted" not in (tmp_path / "new" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("training", "mtp", "prompts"),
    [
        ({"num_train_epochs": 1.0}, {}, 2),
        ({"num_train_epochs": 3.0}, {}, 6),
        ({"num_train_epochs": 99.0}, {}, 12),
        ({"num_train_epochs": 99.0}, {"own_answers": 5}, 5),
        ({"max_steps": 6, "packing": False}, {}, 1),
        ({"max_steps": 6, "packing": False, "gradient_accumulation_steps": 4}, {}, 4),
        ({"max_steps": 900}, {}, 12),
        ({}, {"own_answers": 0}, 0),
        ({}, {"enabled": False}, 0),
    ],
)
def test_one_answer_for_six_examples_read_unless_the_recipe_says(
    training: dict[str, Any], mtp: dict[str, Any], prompts: int, tmp_path: Path
) -> None:
    plan = make_plan(recipe(EMBEDDED, tmp_path, training, {"enabled": True, **mtp}))
    _, tokenizer = job.load(plan)
    found = own_prompts(job.build_batches(tokenizer, plan), plan)
    assert len(found) == prompts
    assert job.step_shape(job.build_batches(tokenizer, plan), plan).prompt >= max(map(len, found), default=0)


def test_a_head_learns_from_the_data_too_where_it_is_told_to(tmp_path: Path) -> None:
    both, alone = (
        trained(EMBEDDED, tmp_path / stage, enabled=True, own_answers=4, stage=stage)[0] for stage in ("with", "after")
    )
    assert both.drafting is not None
    assert alone.drafting is not None
    assert both.drafting["training"]["steps"] == alone.drafting["training"]["steps"] + 2
    data = trained(EMBEDDED, tmp_path / "data", enabled=True, own_answers=0)[0]
    assert data.drafting is not None
    assert data.drafting["training"]["steps"] == 2


def test_only_a_head_in_the_steps_can_pull_on_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mtp\.loss_weight.*mtp\.stage=with"):
        make_plan(recipe(EMBEDDED, tmp_path, {}, {"enabled": True, "loss_weight": 0.1}))


def test_a_native_head_left_behind_is_measured_and_said(tmp_path: Path) -> None:
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
