"""Wrong input by the way a person gives it: one line on stderr, the right exit code, nothing written over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.faults.conftest import MODEL, Run


def fails(result: tuple[int, str, str], code: int, *words: str) -> None:
    """One line with these words, this exit code, and nothing for programs to read."""
    status, out, err = result
    lines = err.strip().splitlines()
    assert status == code, err
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("onecard: ")
    for word in words:
        assert word in lines[0]


def spoil(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    return recipe


def own_model(folder: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    shutil.copytree(MODEL, folder)
    return folder


def test_misspelt_key(onecard: Run, recipe: Path) -> None:
    spoil(recipe, "learning_rate", "learning_rat")
    fails(onecard("train", recipe), 2, "recipe.yaml:11", "training.learning_rat", "did you mean learning_rate?")


def test_wrong_type(onecard: Run, recipe: Path) -> None:
    fails(onecard("train", recipe, "training.max_length=long"), 2, "command line", "training.max_length", "'long'")


def test_missing_recipe(onecard: Run, recipe: Path) -> None:
    fails(onecard("train", recipe.with_name("recip.yaml")), 2, "no such recipe", "did you mean recipe.yaml?")


def test_missing_data_file(onecard: Run, recipe: Path) -> None:
    spoil(recipe, "category.train.jsonl", "categori.train.jsonl")
    fails(onecard("train", recipe), 3, "categori.train.jsonl", "category.train.jsonl")


def test_empty_data_file(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    fails(onecard("train", recipe, f"data.train={tmp_path}/empty.jsonl"), 3, "empty.jsonl")


def test_broken_line(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"say {n}", "completion": "yes"}) for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:2], rows[2][:-3], rows[3]]))
    fails(onecard("train", recipe, f"data.train={tmp_path}/rows.jsonl"), 3, "rows.jsonl:3")


def test_wrong_column(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    fails(onecard("train", recipe, f"data.train={tmp_path}/rows.jsonl"), 3, "rows.jsonl", "question")


def test_no_chat_template(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    model = own_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    fails(onecard("train", recipe, f"model.model_name_or_path={model}"), 3, "chat_template_path")


def test_model_without_experts(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    fails(onecard("train", recipe, f"model.model_name_or_path={tmp_path}/dense"), 4, "not a Mixture-of-Experts model")


def test_truncated_weights(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    weights = own_model(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    fails(onecard("train", recipe, f"model.model_name_or_path={tmp_path}/model"), 4, "model.safetensors", "damaged")


def test_a_shard_that_is_missing(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    folder = own_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: tensors[name] for name in names[:20]}, folder / next(iter(shards)), metadata={"format": "pt"})
    fails(
        onecard("train", recipe, f"model.model_name_or_path={folder}"), 4, "model-00002-of-00002.safetensors", "lacks"
    )


def test_weights_that_lack_a_stack(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    weights = own_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "experts" in key)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    status, _, err = onecard("train", recipe, f"model.model_name_or_path={tmp_path}/model")
    assert status == 4
    assert "experts" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("setting", ["quantization.activations=int8", "training.activation_offloading=true"])
def test_what_only_a_card_can_do(onecard: Run, recipe: Path, setting: str) -> None:
    fails(onecard("train", recipe, "training.use_cpu=true", setting), 2, setting.partition("=")[0])


def test_no_such_model(onecard: Run, recipe: Path) -> None:
    fails(onecard("train", recipe, "model.model_name_or_path=./nowhere"), 4, "nowhere", "no such folder")


@pytest.mark.parametrize("blocker", ["file", "full"])
def test_output_folder_that_cannot_be_used(onecard: Run, recipe: Path, tmp_path: Path, blocker: str) -> None:
    place = tmp_path / "there"
    if blocker == "file":
        place.write_text("mine")
        fails(onecard("train", recipe, f"training.output_dir={place}/run"), 5, "training.output_dir")
        assert place.read_text() == "mine"
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
        fails(onecard("train", recipe, f"training.output_dir={place}"), 2, "not empty and not a run")
        assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_a_place_where_nobody_may_write(onecard: Run, recipe: Path) -> None:
    fails(onecard("train", recipe, "training.output_dir=/proc/run"), 5, "training.output_dir", "/proc")


def test_a_run_of_another_recipe_is_left_alone(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    status, _, err = onecard("train", recipe)
    assert status == 0, err
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    fails(onecard("train", recipe, "lora.r=2"), 4, "was started from another recipe", "lora.r: 4 -> 2")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    weights = own_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    status, _, err = onecard("train", recipe, f"model.model_name_or_path={tmp_path}/model", "training.packing=false")
    assert status == 6, err
    assert "step 1: the loss is nan" in err
    assert not (tmp_path / "run" / "adapter").exists()


def test_unknown_verb_and_missing_argument(onecard: Run) -> None:
    assert onecard("trian")[0] == 2
    assert onecard("train")[0] == 2
