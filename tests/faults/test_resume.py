"""A rerun goes on bit by bit, or says why not: changes that matter are refused with a diff, others are listed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.faults.resume_matrix import CASES, compare
from tests.faults.conftest import MODEL, QUICKSTART, Run
from toolkit.cli import main
from toolkit.errors import ModelError
from toolkit.recipe import Effect, Recipe, changes, flat, parse
from toolkit.recipe.binding import EFFECTS, effect_of
from toolkit.run.folder import bind, find_resume, refuse_changes, versions
from toolkit.training.checkpoint import newest_checkpoint

SOME = (
    "an epoch's end with dropout",
    "two resumes in a row",
    "noise, LoRA+ and a stable schedule",
    "rows of new tokens, DoRA, smoothed labels",
    "streamed, layer by layer, cut inside a step",
    "a head over streamed experts",
    "pairs, streamed, layer by layer",
    "written answers, cut inside an accumulation and its window",
)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SOME], ids=lambda case: case.name)
def test_a_resumed_run_is_the_same_run(case: object, tmp_path: Path) -> None:
    assert compare(case, tmp_path) == []  # type: ignore[arg-type]


def fields() -> list[str]:
    sections = Recipe.model_fields.items()
    return [f"{name}.{field}" for name, info in sections for field in info.annotation.model_fields]  # type: ignore[union-attr]


def small() -> Recipe:
    return parse("model: {model_name_or_path: a/b}\ndata: {train: x.jsonl}\n")


def test_every_field_has_a_class() -> None:
    known = [f for f in fields() if f in EFFECTS or f"{f.partition('.')[0]}.*" in EFFECTS]
    assert known == fields()
    assert effect_of("invented.field") is Effect.BINDS
    stale = {f for f in EFFECTS if not f.endswith(".*")} - set(fields())
    assert not stale


@pytest.mark.parametrize("field", [field for field in fields() if field != "hub.hub_token"])
def test_no_field_changes_silently(field: str, tmp_path: Path) -> None:
    before = flat(small())
    assert field in before
    found = changes(before, {**before, field: "another"})
    said: list[str] = []
    try:
        refuse_changes(tmp_path, found, said.append)
    except ModelError as error:
        assert f"{field}: {before[field]} -> another" in str(error)
        assert "--fork" in str(error)
        assert effect_of(field) is Effect.BINDS
    else:
        assert f"{field}: {before[field]} -> another" in said[0]
        assert effect_of(field) is not Effect.BINDS


def test_a_new_field_counts_with_its_default() -> None:
    now = flat(small())
    before = {name: value for name, value in now.items() if name != "training.max_nonfinite_steps"}
    assert changes(before, now) == []


RECIPE = """\
model: {{model_name_or_path: {place}/model}}
lora: {{r: 2}}
data: {{train: {place}/rows.jsonl}}
training:
  {{output_dir: {place}/run, max_steps: 4, save_steps: 2, learning_rate: 1e-2, max_length: 96, use_cpu: true,
   packing: false, warmup_steps: 0}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, on a model and data of its own."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(MODEL, place / "model")
    rows = (QUICKSTART / "data" / "category.train.jsonl").read_text().splitlines()[:24]
    (place / "rows.jsonl").write_text("\n".join(rows))
    (place / "recipe.yaml").write_text(RECIPE.format(place=place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["onecard", "train", str(place / "recipe.yaml")])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return place


@pytest.fixture
def cut_off(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """The run as a kill after its last step left it, with whatever a test then changes put back afterwards."""
    shutil.copytree(trained, tmp_path / "kept")
    (trained / "run" / "summary.json").unlink(missing_ok=True)
    yield trained
    shutil.rmtree(trained)
    shutil.copytree(tmp_path / "kept", trained)


def other_rows(place: Path) -> None:
    text = (place / "rows.jsonl").read_text()
    (place / "rows.jsonl").write_text(text.replace("completion", "completion", 1).replace("animal", "mineral"))


def more_rows(place: Path) -> None:
    text = (place / "rows.jsonl").read_text()
    (place / "rows.jsonl").write_text(f"{text}\n{text.splitlines()[0].replace('animal', 'mineral')}")


def other_template(place: Path) -> None:
    file = place / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "<|im_start|>"}))


def other_config(place: Path) -> None:
    file = place / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.1}))


def other_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_rows, "examples: 24 -> 24, as many, but others"),
        (more_rows, "examples: 24 -> 25, 1 more"),
        (other_template, "the tokenizer or its chat template differs"),
        (other_weights, "the base's weights differ"),
        (other_config, "the base's config.json differs"),
    ],
)
def test_other_content_under_the_same_name_is_refused(
    onecard: Run, cut_off: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(cut_off)
    status, out, err = onecard("train", cut_off / "recipe.yaml")
    assert (status, out) == (4, ""), err
    assert words in err.splitlines()[-1]
    assert "--fork" in err.splitlines()[-1]


def test_another_version_is_refused_until_it_is_allowed_and_a_patch_is_listed(
    onecard: Run, cut_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, longer = versions(), (cut_off / "recipe.yaml", "training.max_steps=5")
    other = {**here, "peft": "7.0.0", "torch": "3.1.4"}
    monkeypatch.setattr("toolkit.run.trained.versions", lambda: other)
    status, _, err = onecard("train", *longer)
    assert status == 4
    told = f"was trained with peft {here['peft']}, torch {here['torch']}, found peft 7.0.0, torch 3.1.4; "
    assert told in err.splitlines()[-1]
    assert "--other-versions" in err.splitlines()[-1]
    status, _, err = onecard("train", *longer, "--other-versions")
    assert status == 0, err
    assert f"allowed change: torch {here['torch']} -> 3.1.4" in err
    assert "resuming from checkpoint-4" in err
    said: list[str] = []  # the run is of these versions from now on, and a patch asks for nothing
    bind(find_resume(cut_off / "run" / "checkpoints", said.append), said.append, versions={**other, "torch": "3.1.5"})
    assert said == ["allowed change: torch 3.1.4 -> 3.1.5"]
    with pytest.raises(ModelError, match=re.escape("was trained with peft 7.0.0, torch 3.1.4, found peft")):
        bind(find_resume(cut_off / "run" / "checkpoints", said.append), said.append, versions=here)


def test_what_matters_is_refused_before_anything_is_written(onecard: Run, cut_off: Path) -> None:
    before = {path: path.read_bytes() for path in (cut_off / "run").rglob("*") if path.is_file()}
    status, _, err = onecard("train", cut_off / "recipe.yaml", "training.learning_rate=1e-3", "lora.r=4")
    assert status == 4
    assert "lora.r: 2 -> 4; training.learning_rate: 0.01 -> 0.001" in err
    assert {path: path.read_bytes() for path in (cut_off / "run").rglob("*") if path.is_file()} == before


def test_a_longer_run_goes_on_and_a_shorter_one_is_refused(onecard: Run, cut_off: Path) -> None:
    status, _, err = onecard("train", cut_off / "recipe.yaml", "training.max_steps=3")
    assert status == 4
    assert "has 4 steps already" in err
    finished = (cut_off / "run/checkpoints/checkpoint-4/adapter_model.safetensors").read_bytes()
    more = ["training.max_steps=6", "training.logging_steps=2", "training.save_steps=1"]
    status, _, err = onecard("train", cut_off / "recipe.yaml", *more)
    assert status == 0, err
    assert "allowed change: training.max_steps: " in err
    assert "allowed change: training.logging_steps: 1 -> 2" in err
    assert "resuming from checkpoint-4" in err
    summary = json.loads((cut_off / "run" / "summary.json").read_text())
    assert json.dumps(summary).count('"steps": 6')
    lines = [json.loads(line) for line in (cut_off / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 6]
    assert sorted(path.name for path in (cut_off / "run" / "checkpoints").iterdir()) == ["checkpoint-5", "checkpoint-6"]
    # The old schedule ended at a rate of 0; the first new step has that of the longer one.
    assert (cut_off / "run/checkpoints/checkpoint-5/adapter_model.safetensors").read_bytes() != finished


def test_a_clock_that_was_set_back_changes_nothing(
    onecard: Run, cut_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (cut_off / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(cut_off / "run" / "adapter")
    shutil.rmtree(cut_off / "run" / "checkpoints" / "checkpoint-4")
    now = time.time
    for path in (cut_off / "run").rglob("*"):  # all that is there is from the future
        os.utime(path, (now() + 1e7,) * 2)
    monkeypatch.setattr(time, "time", lambda: now() - 1e7)
    status, _, err = onecard("train", cut_off / "recipe.yaml")
    assert status == 0, err
    assert "resuming from checkpoint-2" in err
    assert (cut_off / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_every_file_of_a_checkpoint_is_missed(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained / "run" / "checkpoints", tmp_path / "checkpoints")
    names = sorted(path.name for path in (folder / "checkpoint-4").iterdir())
    assert len(names) >= 8
    for name in names:
        content = (folder / "checkpoint-4" / name).read_bytes()
        (folder / "checkpoint-4" / name).unlink()
        said: list[str] = []
        found = newest_checkpoint(folder, said.append)
        assert found
        assert found.step == 2
        assert name in said[0]
        (folder / "checkpoint-4" / name).write_bytes(content)
    newest = newest_checkpoint(folder)
    assert newest
    assert newest.step == 4


def test_a_fork_starts_from_the_weights_and_resumes_itself(onecard: Run, cut_off: Path) -> None:
    source = newest_checkpoint(cut_off / "run" / "checkpoints")
    assert source
    other = [cut_off / "recipe.yaml", "training.learning_rate=1e-3", "--fork"]
    status, _, err = onecard("train", *other)
    assert status == 0, err
    fork = cut_off / "run-fork"
    start, end = (load_file(path / "adapter_model.safetensors") for path in (fork / "start", fork / "adapter"))
    assert start.keys() == end.keys()
    name = "adapter_model.safetensors"
    assert (fork / "start" / name).read_bytes() == (source.path / name).read_bytes()
    status, _, err = onecard("train", *other)
    assert status == 0
    assert f"{fork}: already finished" in err
    status, _, err = onecard("train", cut_off / "recipe.yaml", "lora.r=8", "--fork")
    assert status == 2
    assert "lora.r: 2 -> 8" in err


def test_damage_costs_a_checkpoint_and_not_the_run(onecard: Run, cut_off: Path) -> None:
    expected = (cut_off / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(cut_off / "run" / "adapter")
    file = cut_off / "run" / "checkpoints" / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, _, err = onecard("train", cut_off / "recipe.yaml")
    assert status == 0, err
    assert "checkpoint skipped: " in err
    assert "optimizer.safetensors: changed after it was written" in err
    assert "resuming from checkpoint-2" in err
    assert (cut_off / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
