"""Taking stock of a checkpoint: every parameter in one part, from headers alone, and damage named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.faults.conftest import MODEL
from tests.harness.families import build, tiny_config
from toolkit.architecture import describe, on_meta
from toolkit.checkpoint.config import skeleton
from toolkit.errors import HubError, ModelError
from toolkit.plan import audit
from toolkit.plan.audit import parts_of
from toolkit.quant import load_int8


def test_parts_add_up_and_match_what_is_loaded() -> None:
    found = audit(str(MODEL))
    model, coverage = load_int8(str(MODEL))
    parts = {part.name: part for part in found.parts}
    assert found.parameters == found.checkpoint_parameters == sum(p.numel() for p in skeleton(str(MODEL)).parameters())
    assert found.checkpoint_bytes == 2 * found.parameters
    assert found.checkpoint_dtypes == ("BF16",)
    assert parts["expert stacks"].bytes == coverage.expert_bytes
    assert parts["expert stacks"].tensors == coverage.stacks
    assert parts["attention"].tensors == coverage.linears
    assert parts["routers"].tensors == found.moe_layers == len(describe(model).layers)


def test_experts_that_transformers_computes_in_another_way_are_named() -> None:
    with pytest.raises(ModelError, match="experts are not behind transformers' interface"):
        describe(on_meta(tiny_config("llama4_text")))


def test_every_family_is_accounted_for(family_skeleton: Path) -> None:
    model = skeleton(str(family_skeleton))
    parts = parts_of(model, describe(model))
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in model.parameters())
    assert sum(part.tensors for part in parts) == len(list(model.named_parameters()))


def test_experts_that_only_images_reach_are_int8_and_not_adapted() -> None:
    with torch.device("meta"):
        model = build(tiny_config("ernie4_5_vl_moe"))
    parts = {part.name: part for part in parts_of(model, describe(model))}
    seen, unseen = parts["expert stacks"], parts["expert stacks that text never reaches"]
    assert (seen.adapted, unseen.adapted) == ("yes", "no")
    assert seen.stored == unseen.stored == "int8"
    assert seen.tensors == unseen.tensors == 2 * parts["routers"].tensors
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())


def test_damage_and_absence_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a safetensors file"):
        audit(str(folder))
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        audit(str(folder))
    with pytest.raises((ModelError, HubError), match="owner/nothing"):
        audit("owner/nothing")
