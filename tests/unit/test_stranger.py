"""A stranger types what a stranger types: every mistake is one line that says what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import MODEL, Run, onecard, recipe
from toolkit import __version__
from toolkit.recipe import load

__all__ = ["onecard", "recipe"]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("trian RECIPE", "Did you mean 'train'?"),
        ("train", "Missing argument 'RECIPE'; onecard train --help"),
        ("train RECIPE --epochs 3", "No such option: --epochs; write training.num_train_epochs=VALUE"),
        ("train RECIPE --learning-rate 1", "write training.learning_rate=VALUE"),
        ("train nosuch.yaml", "no such recipe"),
        ("preview RECIPE --count -1", "--count"),
        ("plan RECIPE --memory 12", "12 is not a size; write 12GiB"),
        ("generate RECIPE --prompt ''", "--prompt: is empty"),
        ("push RECIPE alice", "alice: not a repository; write OWNER/NAME"),
        ("sweep RECIPE lora.r=4,8 --metric exactmatch", "no trial will have that figure; did you mean exact_match?"),
        ("sweep RECIPE lora.r=4", "nothing is varied"),
        ("eval RUNS lora.r=4", "lora.r: was decided by training"),
        ("doctor --verbose", "No such option: --verbose; onecard doctor --help"),
    ],
)
def test_a_mistake_is_one_line(onecard: Run, recipe: Path, typed: str, words: str) -> None:
    arguments = [recipe if word == "RECIPE" else "" if word == "''" else word for word in typed.split()]
    status, out, err = onecard(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1, err


def test_runs_that_are_near_are_named(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
    for verb in (("report",), ("chat",), ("eval",), ("generate", "--prompt", "x")):
        for wrong in ("runs", "runs/three"):
            status, _, err = onecard(verb[0], tmp_path / wrong, *verb[1:])
            assert status == 4, err
            assert f"found: {tmp_path}/runs/one, {tmp_path}/runs/two" in err


def test_init_wants_data_that_are_there(onecard: Run, tmp_path: Path) -> None:
    status, _, err = onecard("init", tmp_path / "x.yaml", "--model", MODEL, "--data", tmp_path / "none.jsonl")
    assert status == 3
    assert "none.jsonl: no such file" in err
    assert not (tmp_path / "x.yaml").exists()


def test_a_name_of_another_toolkit_overrides_ours(recipe: Path) -> None:
    notes: list[str] = []
    for override in ("lora_r=2", "lora.rank=2", "lora.r=2"):
        assert load(recipe, [override], note=notes.append).lora.r == 2
    assert len(notes) == 2


def test_the_version(onecard: Run) -> None:
    assert onecard("--version")[:2] == (0, f"{__version__}\n")


def test_without_a_verb_there_is_help(onecard: Run) -> None:
    status, out, err = onecard()
    assert status in (0, 2)
    assert "doctor" in out + err
