"""Nothing that could stop an artifact waits until the training is over, and what does stop one leaves a rerun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MODEL, Run
from tests.faults.test_wrong_input import fails, own_model, spoil
from toolkit.artifact import verify_artifact
from toolkit.artifact import write as writing
from toolkit.errors import ModelError

CANNED = "I am sorry, but I can't help with that request."


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(plan: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("toolkit.run.job.load", load)


def test_a_base_whose_template_names_a_folder_is_trained_packaged_and_pushed(
    onecard: Run, recipe: Path, tmp_path: Path
) -> None:
    base = own_model(tmp_path / "published")
    with (base / "chat_template.jinja").open("a") as file:
        file.write(f"{{# Files are kept in /mnt/data\n/mnt/data/x.csv. {CANNED} #}}")
    spoil(recipe, str(MODEL), str(base))
    assert onecard("train", recipe)[0] == 0
    assert verify_artifact(tmp_path / "run" / "adapter", base=base).ok
    status, out, err = onecard("push", tmp_path / "run", "alice/new", "--dry-run")
    assert status == 0, err
    assert out.strip().endswith("alice/new")


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("kind", ["prompt", "template"])
def test_what_the_user_adds_is_refused_before_the_model_is_loaded(
    onecard: Run, recipe: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "prompt":
        spoil(recipe, "  max_samples: 48", "  max_samples: 48\n  system_prompt: See /mnt/private/x first.")
        fails(onecard("train", recipe), 2, "data.system_prompt: holds the local path /mnt/private/x")
    else:
        template = (MODEL / "chat_template.jinja").read_text()
        (tmp_path / "mine.jinja").write_text(template + "{# from /home/alice/x #}")
        spoil(recipe, "  max_samples: 48", "  max_samples: 48\n  chat_template_path: mine.jinja")
        fails(onecard("train", recipe), 2, "data.chat_template_path: ", "mine.jinja", "the local path /home/alice/x")
    assert not (tmp_path / "run").exists()  # so that the mended recipe is another run's


@pytest.mark.usefixtures("never_loads")
def test_something_else_in_the_artifacts_place_is_told_before_the_model_is_loaded(
    onecard: Run, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.read_text())
    status, _, err = onecard("train", recipe)
    assert status == 4
    assert "holds something other than this run's artifact: move it away" in err
    assert (tmp_path / "run" / "adapter" / "notes.txt").read_text() == "mine"


def test_a_refusal_after_training_leaves_a_rerun_that_only_packages(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def refuses(folder: Path, *_: Any, **__: Any) -> None:
            raise ModelError(f"{folder}: holds row 1 of the data")

        patched.setattr(writing, "refuse_canaries", refuses)
        assert onecard("train", recipe)[0] == 4
    assert not (tmp_path / "run" / "adapter").exists()
    metrics = tmp_path / "run" / "metrics.jsonl"
    steps = metrics.read_text().splitlines()[:-1]  # the last line sums up
    assert len(steps) >= 3
    assert onecard("train", recipe)[0] == 0
    assert verify_artifact(tmp_path / "run" / "adapter", base=MODEL).ok
    assert metrics.read_text().splitlines()[:-1] == steps
