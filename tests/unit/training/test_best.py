"""The best adapter is kept, waited for and given back; a run that was cut off knows what it had seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit.training.callbacks import BestAdapter, KeepBest


class OneParameter(torch.nn.Module):
    """A model whose adapter is one number, and whose base is another."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = torch.nn.Parameter(torch.zeros(()))
        self.base = torch.nn.Parameter(torch.zeros(()), requires_grad=False)


def keeper(folder: Path, model: Any, **wanted: Any) -> KeepBest:
    return KeepBest(BestAdapter(folder, "f1", **{"lower": False, **wanted}), model)


def evaluate(kept: KeepBest, step: int, value: float) -> bool:
    """An evaluation at `step`, where the adapter is the step's number; whether training is to stop."""
    with torch.no_grad():
        kept.model.adapter.fill_(step)
    control: Any = SimpleNamespace(should_training_stop=False)
    state: Any = SimpleNamespace(global_step=step)
    kept.on_evaluate(None, state, control, metrics={"eval_f1": value})  # type: ignore[arg-type]
    return bool(control.should_training_stop)


@pytest.mark.parametrize(("lower", "best"), [(False, 2), (True, 1)])
def test_the_best_comes_back(tmp_path: Path, lower: bool, best: int) -> None:
    model = OneParameter()
    kept = keeper(tmp_path, model, lower=lower)
    for step, value in enumerate((0.1, 0.5, 0.3, 0.5), start=1):
        assert not evaluate(kept, step, value)
    assert kept.restore() == (best, (0.1 if lower else 0.5))
    assert model.adapter.item() == best, "of equals the first"
    assert model.base.item() == 0


def test_patience_counts_evaluations_since_the_best(tmp_path: Path) -> None:
    kept = keeper(tmp_path, OneParameter(), patience=2, restore=False)
    stops = [evaluate(kept, step, value) for step, value in enumerate((0.1, 0.0, 0.2, 0.2, 0.1), start=1)]
    assert stops == [False, False, False, False, True]
    assert (kept.why_stopped(9) or "").startswith("stopped early at step 5 of 9: 2 evaluations in a row were no better")
    assert kept.why_stopped(5) is None
    assert kept.restore() is None


def test_a_resumed_run_forgets_what_it_will_see_again(tmp_path: Path) -> None:
    first = keeper(tmp_path, OneParameter())
    for step, value in ((2, 0.4), (4, 0.3), (6, 0.9)):
        evaluate(first, step, value)
    assert json.loads((tmp_path / "best.json").read_text()) == [[2, 0.4], [4, 0.3], [6, 0.9]]
    model = OneParameter()
    again = keeper(tmp_path, model)
    again.on_train_begin(None, SimpleNamespace(global_step=4), None)  # type: ignore[arg-type]
    assert again.seen == [(2, 0.4), (4, 0.3)]
    evaluate(again, 6, 0.9)
    assert again.restore() == (6, 0.9)
    fresh = keeper(tmp_path, model)
    fresh.on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    assert fresh.seen == []
