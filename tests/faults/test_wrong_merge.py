"""Merging into a quantised base or its original, by the command: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.faults.conftest import MODEL, QUICKSTART, Run
from tests.faults.test_wrong_input import fails
from tests.unit.quant.test_foreign_formats import INT4, compressed_int4, per_module
from tests.unit.quant.test_storage import rewrite
from toolkit.adapters import attach_lora
from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base
from toolkit.quant import load_int8

ROWS = QUICKSTART / "data/category.validation.jsonl"
RECIPE = """\
model: {{model_name_or_path: {base}, merge_base: {original}}}
data: {{train: {data}/category.train.jsonl, validation: {rows}}}
training: {{output_dir: {run}, max_length: 256}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded model in int4, by its adapter and its recipe, which names the original."""
    folder = tmp_path_factory.mktemp("merge")
    weights = {key: value.float() for key, value in load_file(MODEL / "model.safetensors").items()}
    base = rewrite(MODEL, folder / "nano-int4", per_module(weights, compressed_int4)[0], INT4)
    for path in MODEL.iterdir():
        if path.suffix != ".safetensors" and not (base / path.name).exists():
            shutil.copy(path, base / path.name)
    torch.manual_seed(1)
    model = attach_lora(load_int8(str(base))[0], r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    run = folder / "run"
    run.mkdir()
    text = RECIPE.format(base=base, original=MODEL, data=ROWS.parent, rows=ROWS, run=run)
    (run / "recipe.yaml").write_text(text)
    tokenizer, identity = AutoTokenizer.from_pretrained(base), identify_base(str(base))
    write_artifact(model, tokenizer, run / "adapter", base=identity, recipe_yaml=text, results={}, coverage={})
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, whose recipe a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def change(run: Path, old: str, new: str) -> None:
    recipe = run / "recipe.yaml"
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))


def test_a_merge_says_what_it_went_into(onecard: Run, run: Path, tmp_path: Path) -> None:
    status, out, err = onecard("export", run, "--format", "merged", "--json")
    assert status == 0, err
    made = json.loads(out)
    assert made["merged_into"]["name"] == MODEL.name
    assert made["survival"] is None
    assert "merged into nano-qwen3moe-2m, taken as the original of nano-int4" in err
    assert load_file(run / "export-merged/model.safetensors").keys() == load_file(MODEL / "model.safetensors").keys()
    base = tmp_path / "given"
    status, _, err = onecard("export", run, "--format", "merged", "--base", run_base(run), "--out", base)
    assert status == 0, err
    assert "merged into nano-int4, taken as its compressed-tensors weights multiplied out" in err


def run_base(run: Path) -> str:
    return (run / "recipe.yaml").read_text().split("model_name_or_path: ")[1].split(",")[0]


def test_a_merge_into_the_source_says_how_much_is_left(onecard: Run, run: Path, tmp_path: Path) -> None:
    status, out, err = onecard("export", run, "--format", "merged-source", "--json")
    assert status == 0, err
    made = json.loads(out)
    assert made["survival"]["tokens"] == 512
    assert 0.9 < made["survival"]["share"] < 1.1
    assert "% of the adapter's change of the logits is left, with a difference of" in err
    assert (run / "export-merged-source/config.json").read_bytes() == Path(run_base(run), "config.json").read_bytes()
    few = tmp_path / "rows.jsonl"
    few.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:2]))
    status, out, err = onecard(
        "export", run, "--format", "merged-source", "--data", few, "--force", "--json", "--out", tmp_path / "forced"
    )
    assert status == 0, err
    assert 20 < json.loads(out)["survival"]["tokens"] < 200


def test_without_texts_nothing_is_rounded_again(onecard: Run, run: Path, tmp_path: Path) -> None:
    change(run, f", validation: {ROWS}", "")
    export = ("export", run, "--format", "merged-source")
    fails(onecard(*export), 3, "holds out no examples", "give rows with --data FILE")
    fails(onecard(*export, "--data", tmp_path / "none.jsonl"), 3, "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    fails(onecard(*export, "--data", tmp_path / "bad.jsonl"), 3)
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]


def test_a_wrong_original_is_named(onecard: Run, run: Path, tmp_path: Path) -> None:
    export = ("export", run, "--format", "merged")
    change(run, f"merge_base: {MODEL}", f"merge_base: {tmp_path}/nothing")
    fails(onecard(*export), 4, "model.merge_base", "no such folder", "--merge-base FOLDER")
    fails(onecard(*export, "--merge-base", tmp_path / "none"), 4, "--merge-base: ", "no such folder")
    fails(onecard(*export, "--merge-base", run_base(run)), 4, "quantised as compressed-tensors")
    fails(onecard("export", run, "--format", "gguf", "--merge-base", MODEL), 2, "--merge-base", "does not start from")
    weights = load_file(MODEL / "model.safetensors")
    key = "model.layers.2.mlp.experts.3.up_proj.weight"
    other = rewrite(MODEL, tmp_path / "other", {k: v.flip(0) if "_proj" in k else v for k, v in weights.items()}, None)
    assert key in weights
    fails(onecard(*export, "--merge-base", other), 4, " apart from that of nano-int4", "was not made from this")
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]
