"""NEFTune, LoRA+ and schedules with options are the libraries' own; here it is that they reach the steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.faults.resume_matrix import PLAIN, Case, train
from toolkit.errors import RecipeError
from toolkit.recipe import parse
from toolkit.training.schedule import require_schedule


def losses(folder: Path, **knobs: Any) -> list[float]:
    """Of two steps; the first has a rate of 0."""
    folder.mkdir()
    train(Case("knobs", {**PLAIN, "max_steps": 2, "warmup_steps": 1, **knobs}, lora={"r": 2}, rows=6), folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_they_reach_the_steps(tmp_path: Path) -> None:
    plain, noisy = losses(tmp_path / "plain"), losses(tmp_path / "noisy", neftune_noise_alpha=20.0)
    assert all(one != other for one, other in zip(plain, noisy, strict=True))
    assert losses(tmp_path / "plus", loraplus_lr_ratio=4.0) == plain, "what is learnt shows from the third step on"
    state = json.loads((tmp_path / "plus/checkpoints/checkpoint-2/state.json").read_text())
    assert state["schedule"]["base_lrs"] == [0.01, 1e-6, 0.04, 0.04]
    optimizer = json.loads((tmp_path / "plus/checkpoints/checkpoint-2/optimizer.json").read_text())
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    assert sizes[0] == sizes[2] + sizes[3] == 28, "an A and a B of each stack, router and linear"


def test_a_schedule_that_cannot_be_is_refused_before_anything_is_loaded() -> None:
    require_schedule("cosine_with_min_lr", {"min_lr_rate": 0.1})
    for name, options, words in (
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine", {"min_lr": 1}, "unexpected keyword argument 'min_lr'"),
    ):
        with pytest.raises(RecipeError, match=words):
            require_schedule(name, options)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("training: {lr_scheduler_type: constant, lr_scheduler_kwargs: {a: 1}}", "constant has no options"),
        ("training: {neftune_noise_alpha: 5}\nmtp: {enabled: true}", "a head would learn from the noise"),
        ("training: {label_smoothing_factor: 0.1}", "label_smoothing_factor"),
        ("lora: {use_dora: true}", "use_dora"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(line: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(f"model: {{model_name_or_path: a/b}}\ndata: {{train: x.jsonl}}\n{line}\n")
