"""Sweeps on Ray Tune: runs like any other, failures named, finished trials taken as they are; table and picture."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.faults.conftest import Run, onecard, recipe
from tests.unit.documentation.commands import ROOT, shown_in
from tests.unit.documentation.conftest import folder
from toolkit.recipe import dump, load
from toolkit.sweep import Outcome, Trial, best_first, draw
from toolkit.sweep.grid import expand
from toolkit.sweep.run import Sweep, finished

__all__ = ["folder", "onecard", "recipe"]


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


def test_a_figure_of_examples_that_are_not_held_out_is_refused(onecard: Run, recipe: Path) -> None:
    asked = ["data.validation=null", "lora.r=4,8"]
    assert onecard("sweep", recipe, *asked, "--metric", "exact_match")[0] == 2
    rewarded = ["training.method=grpo", "rewards.functions=[exact_match]", "grpo.num_generations=2"]
    rewarded += ["training.per_device_train_batch_size=2", "grpo.max_completion_length=4"]
    status, _, err = onecard("sweep", recipe, *asked, *rewarded)
    assert status == 2
    assert err.splitlines()[-1].startswith("onecard: --metric reward: is measured on held-out examples"), err


def test_without_ray_one_line_says_what_to_install(onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.sweep.run.find_spec", lambda name: None)
    status, _, err = onecard("sweep", recipe, "lora.r=4,8")
    assert status == 2
    assert 'pip install "onecard[sweep]"' in err


def test_the_sweeps_of_the_documentation_on_ray(onecard: Run, folder: Path) -> None:
    """The commands of docs/sweep.md, results.md and verbs.md, on a cut recipe: of six trials one is trained by Ray.

    One fails; four are finished already, by a run and copies of it.
    """
    pytest.importorskip("ray")
    pages = [ROOT / "docs" / name for name in ("sweep.md", "results.md", "verbs.md")]
    shown = [each.words[1:] for page in pages for each in shown_in(page) if each.text.startswith("onecard sweep")]
    cut = {"training.max_steps=60": "training.max_steps=2", "eval.max_samples=100": "eval.max_samples=4"}
    plain, full, short = ([cut.get(word, word) for word in words] for words in shown)
    assert full == [*plain, "eval.max_samples=4", "--metric", "exact_match", "--at-once", "2"]
    recipe, *varied = plain[1:]
    *known, fails, new = expand([*varied, "eval.max_samples=4"])
    sweep = Sweep(Path(recipe).resolve(), (*known, fails, new), Path("runs/quickstart-sweep").resolve())
    first = sweep.run_of(known[0])
    assert onecard("train", recipe, *sweep.overrides_of(known[0]))[0] == 0
    for trial in known[1:]:
        finish(sweep, trial, first)
    sweep.run_of(fails).mkdir()
    (sweep.run_of(fails) / "not-a-run").touch()

    status, out, err = onecard(*full, "--json")
    assert status == 4
    assert f"1 of 6 trials failed, {fails.name} first" in err
    trials = {trial["trial"]: trial for trial in json.loads(out)["trials"]}
    assert len(trials) == 6
    assert {trials[trial.name]["seconds"] for trial in known} == {0}
    assert trials[new.name]["seconds"] > 0
    assert "exact_match" in trials[new.name]["figures"]
    assert "not a run" in trials[fails.name]["error"]
    assert json.loads((sweep.folder / "sweep.json").read_text())["trials"] == json.loads(out)["trials"]
    assert (sweep.folder / "sweep.svg").is_file()
    assert finished(sweep, new) is not None
    assert finished(sweep, Trial(new.name, {}, (*new.overrides, "lora.r=5"))) is None

    shutil.rmtree(sweep.run_of(fails))
    finish(sweep, fails, first)
    two = Sweep(sweep.recipe, tuple(expand(short[2:-2])), Path(short[-1]).resolve())
    for trial in two.trials:
        finish(two, trial, first)
    for words, count in ((full, 6), (plain, 6), (short, 2)):
        status, _, err = onecard(*words)
        assert status == 0, err
        assert f"{count} trials, runs under " in err
        assert re.search(
            r"^  onecard report .*runs/(quickstart-sweep|two)/r=", err.rpartition("next\n")[2], re.MULTILINE
        )


def finish(sweep: Sweep, trial: Trial, like: Path) -> None:
    """Leave what a finished run of the trial leaves, with another run's figures."""
    shutil.copytree(like, sweep.run_of(trial))
    (sweep.run_of(trial) / "recipe.yaml").write_text(dump(load(sweep.recipe, sweep.overrides_of(trial))))
