"""The job by Python and by command: the same folder, and no step that can be left out."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toolkit
from tests.faults.conftest import MODEL, Run, onecard, recipe
from tests.harness.families import build, tiny_config
from toolkit import run as job
from toolkit.errors import ModelError
from toolkit.run import model
from toolkit.run.folder import open_run, with_decided
from toolkit.run_folder import RunFolder

__all__ = ["onecard", "recipe"]

TIMED = {"metrics.jsonl", "summary.json", "report.html", "state.json", "trainer_state.json"}
"""Files that say how long something took; manifests of checkpoints have their hashes."""
MEASURED = re.compile(r"seconds|memory|peak_memory|memory_bytes|\w+_per_second|\w+_runtime")


def contents(run: Path) -> dict[str, str]:
    """Hashes of a run's files by name."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in TIMED]
    files = [path for path in files if not (path.name == "manifest.json" and "checkpoints" in path.parts)]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def untimed(value: Any) -> Any:
    """A summary without what a clock or the system's memory said."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if not MEASURED.fullmatch(key)}
    return [untimed(each) for each in value] if isinstance(value, list) else value


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """Overrides: a base whose compensation takes a moment."""
    config = tiny_config("qwen3_moe")
    config.vocab_size = 2112  # of the tokenizer beside it
    build(config).save_pretrained(tmp_path / "tiny")
    for path in (*MODEL.glob("tokenizer*"), MODEL / "chat_template.jinja"):
        shutil.copy(path, tmp_path / "tiny")
    return [f"model.model_name_or_path={tmp_path}/tiny", "quantization.error_compensation=gptq"]


def test_python_and_the_command_write_the_same_folder(
    onecard: Run, recipe: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = toolkit.run_recipe(toolkit.load_recipe(recipe, [*asked, "training.output_dir=run"]))
    assert (finished.folder, finished.adapter) == (Path("run"), Path("run/adapter"))
    assert finished.summary == RunFolder(finished.folder).read_summary()
    one = finished.folder.rename("by-python")
    status, _, err = onecard("train", recipe, *asked, "training.output_dir=run")
    assert status == 0, err
    other = Path("run")
    assert contents(one) == contents(other)
    assert {"adapter/manifest.json", "recipe.yaml", "plan.json", "chat.json", "compensated.safetensors"} <= contents(
        one
    ).keys()
    summaries = [RunFolder(run).read_summary() for run in (one, other)]
    assert untimed(summaries[0]) == untimed(summaries[1])
    assert summaries[0]["compensation"]["compensated"] < summaries[0]["compensation"]["rounded"]
    assert json.loads((one / "adapter" / "manifest.json").read_text())["recipe"]
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, other)]
    assert [untimed(json.loads(line)) for line in lines[0]] == [untimed(json.loads(line)) for line in lines[1]]


def test_a_base_that_should_be_compensated_is_not_adapted_without(recipe: Path, asked: list[str]) -> None:
    plan = toolkit.make_plan(toolkit.load_recipe(recipe, asked), for_training=False)
    model, tokenizer = job.load(plan)
    with pytest.raises(ModelError, match=r"quantization\.error_compensation: gptq: call compensate"):
        job.attach(model, plan)
    assert job.compensate(model, job.build_batches(tokenizer, plan), plan) is not None
    job.attach(model, plan)


def test_every_public_name_is_there() -> None:
    assert all(getattr(toolkit, name) is not None for name in toolkit.__all__)


def test_auto_stays_what_it_was_when_the_run_began(recipe: Path, tmp_path: Path) -> None:
    """Whatever fits today: other programs may hold more or less of the memory."""
    auto = ["lora.r=auto", "training.max_length=auto", f"training.output_dir={tmp_path}/run"]
    written = RunFolder(tmp_path / "run")
    settled = toolkit.load_recipe(recipe, ["lora.r=4", "training.max_length=96", auto[-1]])
    open_run(written.path, settled)
    asked = toolkit.load_recipe(recipe, auto)
    assert with_decided(asked) == asked  # nothing is trained yet
    written.adapter.mkdir()
    decided = with_decided(asked)
    assert (decided.lora.r, decided.training.max_length) == (4, 96)
    assert with_decided(toolkit.load_recipe(recipe, ["lora.r=2", *auto[1:]])).lora.r == 2


@pytest.mark.parametrize(("release", "limits"), [("6.6.87.2-microsoft-standard-WSL2", [0.75]), ("6.1.0-31-amd64", [])])
def test_under_wsl_a_card_does_not_spill(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, release: str, limits: list[float]
) -> None:
    set_to: list[float] = []
    plan = replace(toolkit.make_plan(toolkit.load_recipe(recipe, [])), device="cuda", memory=9 << 30)
    monkeypatch.setattr(platform, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(model, "device_memory", lambda device: 12 << 30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    model._forbid_spilling(plan)
    model._forbid_spilling(replace(plan, device="cpu"))
    assert set_to == limits


@pytest.mark.parametrize(
    ("start", "fields", "stacks", "routers", "told"),
    [
        ("a", {}, 0, 0, "lora.experts and lora.router would train, and the run adds none; set lora.experts=false lora"),
        ("a", {}, 8, 0, "what lora.router would train, and the run adds none; set lora.router=false to say so"),
        ("a", {}, 8, 4, None),
        ("a", {"experts": False, "router": False}, 0, 0, None),
        (None, {}, 0, 0, None),
    ],
)
def test_a_start_with_less_than_the_recipe_asks_for_is_told(
    start: str | None, fields: dict[str, bool], stacks: int, routers: int, told: str | None
) -> None:
    lora = toolkit.Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"train": "d"},
            "lora": {"adapter_name_or_path": start, "target_modules": "attention", **fields},
        }
    )
    counts = {"expert stacks adapted": [stacks, 8], "routers adapted": [routers, 4]}
    said = model.left_out_by_start(counts, SimpleNamespace(recipe=lora))  # type: ignore[arg-type]
    assert said is None if told is None else said is not None and told in said
