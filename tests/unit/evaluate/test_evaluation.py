"""Through the command: a user's metric, what was forgotten, early stopping and the best adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import QUICKSTART, Run, onecard, recipe

__all__ = ["onecard", "recipe"]

GENERAL = QUICKSTART.parent / "general" / "austen.txt"


def test_a_run_ends_with_its_best_adapter(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    """The learning rate is so high that the held-out loss soon rises, and never falls below its best again."""
    arguments = [
        "training.learning_rate=0.3", "training.lr_scheduler_type=constant", "training.max_steps=30",
        "training.eval_steps=1", "training.early_stopping_patience=2", "training.load_best_model_at_end=true",
        f"eval.regression={GENERAL}",
    ]  # fmt: skip
    status, out, err = onecard("train", recipe, *arguments, "--json")
    assert status == 0, err
    summary = json.loads(out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert summary["training"]["best_step"] == best
    assert summary["training"]["steps"] == best + 2 == max(losses) < 30
    assert f"stopped early at step {best + 2} of 30: 2 evaluations in a row were no better than loss" in err
    # Eight examples are one batch, so both are the mean over all tokens.
    assert summary["results"]["adapted"]["loss"] == pytest.approx(losses[best], rel=1e-5)
    base, adapted = (summary["results"][who]["perplexity"] for who in ("base", "adapted"))
    assert adapted > 1.05 * base > 1, "such a learning rate forgets"
    assert "perplexity" in err


def test_the_users_metric_decides(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def shortness(answer, wanted):\n    return 1 / (1 + len(answer))\n")
    same = ["eval.metric=mine.py:shortness", "training.eval_steps=1", "training.load_best_model_at_end=true"]
    status, _, err = onecard("train", recipe, *same, "training.warmup_steps=1", f"training.output_dir={tmp_path}/cold")
    assert status == 4
    assert "the best evaluation is that of step 1, where 0 of 28 adapters had moved" in err, "its learning rate was 0"
    same += ["training.warmup_steps=0"]
    status, out, err = onecard("train", recipe, *same, "--json")
    assert status == 0, err
    summary = json.loads(out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["eval_shortness"] for line in lines if "eval_shortness" in line}
    assert list(seen) == [1, 2, 3]
    best = max(seen.values())
    assert summary["training"]["best_step"] == next(step for step, value in seen.items() if value == best)
    assert summary["results"]["adapted"]["shortness"] == pytest.approx(best)
    assert {"token_f1", "rouge_l", "exact_match"} <= summary["results"]["base"].keys()
    changed = summary["results"]["answers"]
    assert len(summary["changed"]["better"]) == min(2, changed["better"])
    for sample in summary["changed"]["better"]:
        assert len(sample["adapted"]) < len(sample["base"])
    for sample in summary["changed"]["worse"]:
        assert len(sample["adapted"]) > len(sample["base"])


def test_what_cannot_be_judged_is_refused_before_a_step(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    wanted = "training.load_best_model_at_end=true"
    assert "no metric rouge; did you mean rouge_l" in onecard("train", recipe, wanted, "eval.metric=rouge")[2]
    status, _, err = onecard("train", recipe, wanted, "data.validation=null")
    assert status == 2
    assert "needs held-out examples" in err
    status, _, err = onecard("train", recipe, f"eval.regression={tmp_path}/nothing.txt")
    assert status == 3
    assert "nothing.txt: not a readable UTF-8 text" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
