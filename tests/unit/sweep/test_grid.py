"""Arguments to trials: every combination once, under names that are folders."""

from __future__ import annotations

import pytest

from toolkit.errors import RecipeError
from toolkit.sweep import expand


def test_every_combination_once_and_in_order() -> None:
    trials = expand(["lora.r=8,16", "training.seed=1", "training.learning_rate=1e-4,2e-4"])
    assert [trial.name for trial in trials] == [
        "r=8_learning_rate=1e-4", "r=8_learning_rate=2e-4", "r=16_learning_rate=1e-4", "r=16_learning_rate=2e-4",
    ]  # fmt: skip
    assert trials[1].values == {"lora.r": "8", "training.learning_rate": "2e-4"}
    assert trials[1].overrides == ("training.seed=1", "lora.r=8", "training.learning_rate=2e-4")


def test_commas_in_brackets_divide_nothing() -> None:
    trials = expand(["lora.target_modules=[q_proj, v_proj],attention", "data.columns={a: b, c: d}"])
    assert [trial.values["lora.target_modules"] for trial in trials] == ["[q_proj, v_proj]", "attention"]
    assert trials[0].overrides[0] == "data.columns={a: b, c: d}"


def test_names_are_folders_and_never_shared() -> None:
    names = [trial.name for trial in expand(["data.train=a/b.jsonl,a b.jsonl,../c.jsonl"])]
    assert len(set(names)) == 3
    assert not any(set(name) & set("/ \\:") for name in names)
    assert expand(["model.name=a,b", "data.name=c,d"])[0].name == "model.name=a_data.name=c"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lora.r=8"], "nothing is varied"),
        (["lora.r"], "give section.key=value"),
        (["lora.r=8,"], "give section.key=value"),
        (["lora.r=8,16", "lora.r=4"], "lora.r is there twice"),
        (["lora.r=8,8"], "a value is there twice"),
    ],
)
def test_what_is_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        expand(arguments)
