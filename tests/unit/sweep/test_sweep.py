"""Sweeps on Ray Tune: runs like any other, failures named, finished trials taken as they are; table and picture."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.faults.conftest import Run, onecard, recipe
from toolkit.sweep import Outcome, Trial, best_first, draw
from toolkit.sweep.run import Sweep, finished

__all__ = ["onecard", "recipe"]


def outcome(name: str, values: dict[str, str], **figures: float) -> Outcome:
    return Outcome(Trial(name, values, ()), Path(name), figures, 1.0, "" if figures else "lost")


def test_a_loss_is_best_low_and_a_failure_last() -> None:
    found = [outcome("a", {}, loss=2.0, f1=0.1), outcome("b", {}), outcome("c", {}, loss=1.0, f1=0.3)]
    assert [each.trial.name for each in best_first(found, "loss")] == ["c", "a", "b"]
    assert [each.trial.name for each in best_first(found[::-1], "f1")] == ["c", "a", "b"]


@pytest.mark.parametrize("values", [[{"r": "8", "lr": "1e-4"}, {"r": "16", "lr": "1e-4"}], [{"x": "a"}, {"x": "b"}]])
def test_the_picture_names_what_was_varied(values: list[dict[str, str]], tmp_path: Path) -> None:
    found = [outcome(f"trial{index}", each, loss=1.0 + index) for index, each in enumerate(values)]
    draw([*found, outcome("failed", values[0])], "loss", tmp_path / "sweep.svg")
    text = " ".join(ElementTree.parse(tmp_path / "sweep.svg").getroot().itertext())
    assert "loss" in text
    assert all(word in text for word in (("r", "lr=1e-4") if len(values[0]) == 2 else ("trial0", "trial1")))
    assert "failed" not in text
    first = (tmp_path / "sweep.svg").read_bytes()
    draw([*found, outcome("failed", values[0])], "loss", tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").read_bytes() == first


def test_a_wrong_trial_costs_nothing(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    status, _, err = onecard("sweep", recipe, "lora.r=4,x", "--out", tmp_path / "sweep")
    assert status == 2
    assert "lora.r" in err
    assert not (tmp_path / "sweep").exists()


def test_without_ray_one_line_says_what_to_install(onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.sweep.run.find_spec", lambda name: None)
    status, _, err = onecard("sweep", recipe, "lora.r=4,8")
    assert status == 2
    assert 'pip install "onecard[sweep]"' in err


def test_trials_on_ray(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    """One trial is finished already, one is new, and one fails."""
    pytest.importorskip("ray")
    folder = tmp_path / "sweep"
    same = ["training.max_steps=2", "eval.enabled=false"]
    assert onecard("train", recipe, *same, "lora.r=2", f"training.output_dir={folder}/r=2")[0] == 0
    (folder / "r=8").mkdir()
    (folder / "r=8" / "not-a-run").touch()
    status, out, err = onecard("sweep", recipe, *same, "lora.r=2,4,8", "--out", folder, "--at-once", 2, "--json")
    assert status == 4
    assert "1 of 3 trials failed, r=8 first" in err
    trials = {trial["trial"]: trial for trial in json.loads(out)["trials"]}
    assert trials["r=2"]["seconds"] == 0 < trials["r=4"]["seconds"]
    assert "not a run" in trials["r=8"]["error"]
    assert json.loads((folder / "sweep.json").read_text())["trials"] == json.loads(out)["trials"]
    assert (folder / "sweep.svg").is_file()
    trial = Trial("r=4", {"lora.r": "4"}, (*same, "lora.r=4"))
    assert finished(Sweep(recipe, (trial,), folder), trial) is not None
    assert finished(Sweep(recipe, (trial,), folder), Trial("r=4", {}, (*same, "lora.r=5"))) is None
