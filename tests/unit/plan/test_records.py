"""Records of published models against what is found anew, and the command that reads them: no torch, no connection."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from scripts.record_plans import answer, joined, step_specs
from toolkit.plan import steps
from toolkit.plan.shapes import (
    by_versions,
    fold,
    is_published,
    published,
    published_config,
    published_from,
    read_record,
    recorded_shapes,
    rehearsal_versions,
    stated_billions,
    unfold,
)
from toolkit.plan.skeletons import shape_of, shapes_of
from toolkit.plan.steps import StepBytes, cache_bytes, cached_bytes
from toolkit.recipe import load

ROOT = Path(__file__).parents[3]


def record_of(name: str) -> dict[str, Any]:
    """Of the installed versions."""
    record = read_record(name)
    assert record, f"not recorded with {rehearsal_versions()}: run scripts/record_plans.py"
    return record


@pytest.mark.parametrize("pins", ["constraints.txt", "constraints-newest.txt"])
def test_no_published_model_is_rehearsed_with_supported_versions(pins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = dict(line.split("==") for line in (ROOT / pins).read_text().split() if "==" in line)
    monkeypatch.setattr("toolkit.plan.shapes._version", lambda package: lock[package].partition("+")[0])
    assert [name for name in published() if not read_record(name)] == []


def test_a_record_says_what_differs_with_other_versions() -> None:
    shapes, old, new = {"parameters": []}, {"torch": "1"}, {"torch": "2"}
    steps = {"a": [1, 1, 1], "b": [2, 2, 2]}
    first = {"versions": [old], "shapes": shapes, "steps": steps}
    same = joined({**first, "versions": [new]}, [first])
    assert same == {**first, "versions": [old, new]}
    changed = {"versions": [new], "shapes": {"parameters": ["w 2"]}, "steps": {"b": [2, 2, 3], "c": [3, 3, 3]}}
    both = joined(changed, by_versions(same))
    assert both["differing"] == [{**changed, "steps": {"a": None, "b": [2, 2, 3], "c": [3, 3, 3]}}]
    assert by_versions(both) == [first, changed]
    again = {**first, "steps": {**steps, "b": [5, 5, 5]}}
    assert by_versions(joined(again, by_versions(both))) == [again, changed]
    assert joined({**first, "versions": [new]}, by_versions(both)) == same


@pytest.mark.parametrize("name", published())
def test_recorded_shapes_are_those_of_the_installed_versions(name: str) -> None:
    record = record_of(name)
    recorded = recorded_shapes(record)
    assert recorded is not None
    fresh = shapes_of(shape_of(name))
    assert recorded.to_dict() == fresh.to_dict()
    assert list(recorded.parameters) == list(fresh.parameters)
    assert record["steps"].keys() & step_specs(name).keys()
    billions = sum(prod(shape) for shape in fresh.parameters.values()) / 1e9
    assert billions == pytest.approx(stated_billions(name), rel=0.011), "the config is not that of the model's card"


@pytest.mark.parametrize("name", published())
def test_each_config_says_which_revision_it_is_of_and_where_it_was_read(name: str) -> None:
    revision, source = published_from(name)
    assert re.fullmatch("[0-9a-f]{40}", revision)
    assert source
    config = published_config(name)
    assert {"revision", "source"}.isdisjoint(config)
    assert "max_position_embeddings" in config.get("text_config", config), "a class's default is not the model's"
    assert is_published(name, revision)
    assert not is_published(name, "0" * 40)
    assert f"{name}/tree/{revision})" in (ROOT / "docs/models.md").read_text(encoding="utf-8")


QUICK = [name for name in published() if not re.search("'(mamba|linear)_", str(published_config(name)))]
"""Without layers of a running state, whose rehearsal takes ten seconds; families with such are rehearsed in small."""


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("number", "name"), list(enumerate(QUICK)))
def test_recorded_steps_are_rehearsed_again(number: int, name: str) -> None:
    """Another one of each model: card and CPU, kept and recomputed; `scripts/record_plans.py --check` does them all."""
    pytest.importorskip("triton")
    short = sorted((spec for spec in step_specs(name).values() if spec.length <= 256), key=lambda spec: spec.lora)
    spec = short[11 * number % len(short)]
    assert cached_bytes(spec, "", record_of(name)) == answer(name, spec)


@pytest.mark.parametrize(
    "lines",
    [
        ["a 1", "m.0.x 2", "m.0.y 3", "m.1.x 2", "m.1.y 3", "b 4"],
        ["m.0.x 2", "m.1.x 5", "m.2.x 5", "m.4.x 5"],
        ["m.0.x 0.y", "n.3.z", "n.4.z", "n.4.z"],
        [],
    ],
)
def test_folding_is_undone(lines: list[str]) -> None:
    assert list(unfold(json.loads(json.dumps(fold(lines))))) == lines


def test_other_versions_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.plan.shapes._version", lambda package: "0.0")
    assert read_record(published()[0]) == {}


def test_what_was_rehearsed_is_cached_for_this_spec_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
    spec = next(iter(step_specs(published()[0]).values()))
    assert cached_bytes(spec, "config", {}) is None
    cache_bytes(spec, "config", StepBytes(7, 3))
    assert cached_bytes(spec, "config", {}) == StepBytes(7, 3)
    assert cached_bytes(spec, "another config", {}) is None
    assert cached_bytes(replace(spec, length=spec.length + 1), "config", {}) is None
    scaled = replace(spec, lora=json.dumps({**json.loads(spec.lora), "lora_alpha": 1.0}))
    assert cached_bytes(scaled, "config", {}) == StepBytes(7, 3)
    steps._sources.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(steps, "_REHEARSED", ("ops",))
        assert cached_bytes(spec, "config", {}) is None
    steps._sources.cache_clear()
    (file,) = (tmp_path / "steps").iterdir()
    file.write_text("[1")
    assert cached_bytes(spec, "config", {}) is None
    file.unlink()
    (tmp_path / "steps").rmdir()
    (tmp_path / "steps").write_text("a file where the folder should be")
    cache_bytes(spec, "config", StepBytes(7, 3))


RECIPES = [path.stem for path in (ROOT / "recipes").glob("*.yaml") if re.search(r"-a?\d+b|-lite", path.stem)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_for_a_card_loads_no_torch(recipe: str) -> None:
    record_of(load(ROOT / "recipes" / f"{recipe}.yaml").model.model_name_or_path)
    program = (
        "import sys\nfrom toolkit.cli import main\n"
        f"sys.argv = ['onecard', 'plan', 'recipes/{recipe}.yaml', '--device', sys.argv[1], '--json']\n"
        "code = 0\ntry:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "print('CODE', code, *heavy, file=sys.stderr)"
    )
    for card in ("rtx-4090", "rtx-3070"):
        command = [sys.executable, "-c", program, card]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr.strip().splitlines()[-1] in {"CODE 0", "CODE 5"}
        assert json.loads(done.stdout)["bytes"]["total"] > 1 << 30
