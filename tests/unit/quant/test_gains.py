"""Layers of int4 that a budget lets be int8: the loss decides which, and what it is measured on is what gets loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel

from tests.faults.conftest import MODEL, QUICKSTART
from tests.unit.quant.test_foreign_formats import pair
from tests.unit.quant.test_storage import LATENT, tiny
from toolkit.architecture import describe
from toolkit.errors import ModelError
from toolkit.offload.attach import load_streamed
from toolkit.quant import load_int8
from toolkit.quant.gains import Gains, measure_gains

WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 32}
EXAMPLES = [
    torch.randint(3, 40, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (9, 14, 2)
]


def kinds(model: PreTrainedModel, chosen: tuple[str, ...]) -> dict[str, str]:
    return {
        name: "int8" if layer.name in chosen else "int4" for layer in describe(model).layers for name in layer.stacks
    }


def loss(model: PreTrainedModel) -> float:
    """Of every token but an example's first, from whole forward passes."""
    total = 0.0
    for example in EXAMPLES:
        with torch.no_grad():
            logits = model(torch.tensor([example]), use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits, torch.tensor(example[1:]), reduction="sum"))
    return total / sum(len(example) - 1 for example in EXAMPLES)


def measured(model: PreTrainedModel, folder: Path, count: int = 1) -> Gains:
    """The `count` layers that gain most."""
    layers = tuple(layer.name for layer in describe(model).layers)

    def best(gains: Mapping[str, float]) -> tuple[str, ...]:
        return tuple(sorted(gains, key=lambda name: -gains[name])[:count])

    return measure_gains(model, str(folder), EXAMPLES, layers, best)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_losses_are_those_of_models_that_are_loaded_so(tmp_path: Path, family: str) -> None:
    sizes = {**WIDE, **(LATENT if family == "deepseek_v3" else {}), "num_hidden_layers": 3}
    folder = tiny(tmp_path / "float", family, **sizes)
    model, _ = load_int8(str(folder), experts="int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measured(model, folder, count=2)
    assert found.loss == pytest.approx(loss(model), rel=1e-6)
    assert len(found.gains) == len(describe(model).layers) > 1
    for name, gain in found.gains.items():
        alone, _ = load_int8(str(folder), experts="int4", stacks=kinds(model, (name,)))
        assert found.loss - gain == pytest.approx(loss(alone), rel=1e-6)
        assert abs(gain) > 1e-5
    mixed, coverage = load_int8(str(folder), experts="int4", stacks=kinds(model, found.chosen))
    assert found.mixed == pytest.approx(loss(mixed), rel=1e-6)
    assert coverage.stacks_stored["int8"] == 4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert loss(model) == pytest.approx(found.loss, rel=1e-6)


def test_streamed_layers_are_measured_as_resident_ones(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe", **{**WIDE, "num_hidden_layers": 3})
    resident, _ = load_int8(str(folder), experts="int4")
    places = {f"model.layers.{number}.mlp.experts": "disk" for number in (0, 2)}
    streamed, _ = load_streamed(str(folder), places, experts="int4", cache=tmp_path / "cache")
    assert measured(streamed, folder) == measured(resident, folder)
    chosen = kinds(resident, ("model.layers.2.mlp.experts",))
    mixed, coverage = load_streamed(str(folder), places, experts="int4", stacks=chosen, cache=tmp_path / "cache")
    assert coverage.stacks_stored == {"int4": 4, "int8": 2}
    with torch.no_grad():
        ids = torch.tensor([EXAMPLES[0]])
        wanted = load_int8(str(folder), experts="int4", stacks=chosen)[0](ids).logits
        assert torch.equal(mixed(ids).logits, wanted)


def test_a_checkpoint_of_quantised_weights_is_measured_as_what_it_stands_for(tmp_path: Path) -> None:
    quantised, exact = pair(tmp_path, "MLX")
    found, wanted = (measured(load_int8(str(each), experts="int4")[0], each) for each in (quantised, exact))
    assert found.gains == pytest.approx(wanted.gains, abs=1e-7)
    assert found.chosen == wanted.chosen


@pytest.mark.parametrize("number", [1, 2])
def test_a_layer_that_int4_spoils_is_the_one_chosen(tmp_path: Path, number: int) -> None:
    """One input in 32 of its second projection is made large and the outputs before it small: the same function, whose
    other inputs int4 rounds to nothing."""
    shutil.copytree(MODEL, tmp_path / "spoilt")
    file = tmp_path / "spoilt" / "model.safetensors"
    state = load_file(file)
    for name in [name for name in state if f"layers.{number}.mlp.experts." in name]:
        if name.endswith("up_proj.weight"):
            state[name][::32] /= 64
        if name.endswith("down_proj.weight"):
            state[name][:, ::32] *= 64
    save_file(state, file, {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (QUICKSTART / "data" / "category.train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    model, _ = load_int8(str(tmp_path / "spoilt"), experts="int4")
    layers = tuple(layer.name for layer in describe(model).layers)
    found = measure_gains(
        model, str(tmp_path / "spoilt"), [tokenizer(line)["input_ids"][:40] for line in lines], layers, lambda gains: ()
    )
    ordered = sorted(found.gains, key=lambda name: -found.gains[name])
    assert ordered[0] == f"model.layers.{number}.mlp.experts"
    assert found.gains[ordered[0]] > 3 * found.gains[ordered[1]]
    assert found.mixed == found.loss


def test_weights_that_are_rounded_already_cannot_be_measured(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe", **WIDE)
    model, _ = load_int8(str(folder), experts="int4")
    model.save_pretrained(tmp_path / "stored")
    with pytest.raises(ModelError, match="int4 already, so its original weights are not there"):
        measured(model, tmp_path / "stored")
