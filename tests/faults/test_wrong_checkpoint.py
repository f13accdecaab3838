"""Checkpoints that cannot be used, given to every verb that takes one: one line on stderr, the right exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.faults.conftest import MODEL, Run
from tests.faults.test_wrong_input import fails

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def dense(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)).save_pretrained(folder)


def unknown_format(folder: Path) -> None:
    shutil.copytree(MODEL, folder)
    configure(folder, quantization_config={"quant_method": "sesame", "bits": 4})


def missing_shard(folder: Path) -> None:
    shutil.copytree(MODEL, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    names = sorted(tensors)
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({name: tensors[name] for name in names[0::2]}, folder / SHARDS[0], metadata={"format": "pt"})
    weights.unlink()


def unknown_architecture(folder: Path) -> None:
    shutil.copytree(MODEL, folder)
    configure(folder, model_type="sesame_moe", architectures=["SesameMoeForCausalLM"])


def other_shape(folder: Path) -> None:
    shutil.copytree(MODEL, folder)
    configure(folder, moe_intermediate_size=40)


def without_a_tensor(folder: Path) -> None:
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


FROM_CONFIG_AND_HEADERS = [
    (dense, "not a Mixture-of-Experts model"),
    (unknown_format, "quantised as sesame"),
    (unknown_architecture, "sesame_moe"),
    (missing_shard, SHARDS[1]),
    (without_a_tensor, "lacks model.norm.weight (1 in all)"),
    (other_shape, "experts.down_proj is 8×128×128 in the files and 8×128×40 by config.json"),
]


@pytest.mark.parametrize("verb", ["train", "plan", "audit", "quantize"])
@pytest.mark.parametrize(("spoil", "words"), FROM_CONFIG_AND_HEADERS)
def test_one_line_before_any_work_whatever_the_verb(
    onecard: Run, recipe: Path, tmp_path: Path, verb: str, spoil: Callable[[Path], None], words: str
) -> None:
    model = tmp_path / "model"
    spoil(model)
    commands = {
        "train": ("train", recipe, f"model.model_name_or_path={model}"),
        "plan": ("plan", recipe, f"model.model_name_or_path={model}"),
        "audit": ("plan", model, "--audit"),
        "quantize": ("quantize", model, tmp_path / "int8"),
    }
    before = {path: path.read_bytes() for path in model.iterdir()}
    fails(onecard(*commands[verb]), 4, words)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "recipe.yaml"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": "sesame"}, "config.json: 'str' object has no attribute"),
        ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str"),
        ({"layer_types": 5}, "config.json: 'int' object is not iterable"),
        ({"dtype": [1]}, "config.json: list index out of range"),
        ({"num_attention_heads": 0}, "no qwen3_moe can be built of its config.json"),
        ({"vocab_size": 0}, "no qwen3_moe can be built of its config.json"),
        ({"num_experts_per_tok": 99}, "config.json sends each token to 99 of 8 experts"),
        ({"num_experts_per_tok": 0}, "config.json sends each token to 0 of 8 experts"),
    ],
)
def test_a_config_of_wrong_values_is_one_line(
    values: dict[str, object], words: str, onecard: Run, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    configure(tmp_path / "model", **values)
    fails(onecard("plan", recipe, f"model.model_name_or_path={tmp_path}/model"), 4, words)
