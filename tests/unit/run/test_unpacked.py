"""Layers with a running state cannot keep packed examples apart without other packages: off by itself, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard, recipe
from tests.harness.families import build, tiny_config
from toolkit.adapters import attach_lora
from toolkit.errors import ModelError, RecipeError
from toolkit.plan import make_plan
from toolkit.quant import load_int8
from toolkit.recipe import load, parse
from toolkit.training.packing import isolate_documents

__all__ = ["onecard", "recipe"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short convolutions between attention, with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config("lfm2_moe")
    config.vocab_size = 2112
    build(config).save_pretrained(folder)
    for path in (*MODEL.glob("tokenizer*"), MODEL / "chat_template.jinja"):
        shutil.copy(path, folder)
    return folder


def asked(base: Path, folder: Path) -> tuple[str, ...]:
    """Overrides: a few examples, no evaluation."""
    for split in ("train", "validation"):
        lines = (QUICKSTART / "data" / f"category.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:24]), encoding="utf-8")
    data = (f"data.train={folder}/train.jsonl", f"data.validation={folder}/validation.jsonl")
    return (*data, f"model.model_name_or_path={base}", "training.max_steps=2", "eval.enabled=false")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_packing_is_off_where_it_was_not_asked_for(onecard: Run, recipe: Path, base: Path, tmp_path: Path) -> None:
    status, _, err = onecard("train", recipe, *asked(base, tmp_path), f"training.output_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert "training.packing: false, `" in err
    assert "packing: no example sees another" not in err
    assert not load(tmp_path / "run" / "recipe.yaml").training.packing
    status, _, err = onecard("train", recipe, *asked(base, tmp_path), f"training.output_dir={tmp_path / 'run'}")
    assert (status, "already finished" in err) == (0, True), err


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_packing_that_was_asked_for_is_refused(
    verb: str, onecard: Run, recipe: Path, base: Path, tmp_path: Path
) -> None:
    status, _, err = onecard(verb, recipe, *asked(base, tmp_path), "training.packing=true")
    assert status == 2
    assert err.splitlines()[-1].startswith("onecard: training.packing: `")
    assert err.splitlines()[-1].endswith("; set training.packing=false")


@pytest.mark.parametrize("packing", [None, True])
def test_a_family_that_sees_over_bounds_is_planned_without(packing: bool | None, tmp_path: Path) -> None:
    build(tiny_config("minimax")).save_pretrained(tmp_path)
    training = {"use_cpu": True, "max_length": 32} | ({} if packing is None else {"packing": packing})
    given = {"model": {"model_name_or_path": str(tmp_path)}, "data": {"train": "none"}, "training": training}
    if packing:
        with pytest.raises(RecipeError, match=r"^training.packing: .* see each other .*; set training.packing=false$"):
            make_plan(parse(json.dumps(given)))
        return
    made = make_plan(parse(json.dumps(given)))
    assert not made.recipe.training.packing
    assert made.notes[0] == "training.packing: false, packed examples would see each other in this family"


def test_what_no_plan_could_see_is_refused_before_the_first_step(base: Path) -> None:
    model, _ = load_int8(str(base))
    with pytest.raises(ModelError, match=r"without `[\w-]+`.*; set training\.packing=false$"):
        isolate_documents(attach_lora(model, r=2))
