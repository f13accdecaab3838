"""Models whose experts are in four bits: loaded, written, streamed, adapted, compensated, planned as int8 ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import QUICKSTART
from tests.unit.quant.test_storage import tiny
from toolkit.adapters import attach_lora
from toolkit.errors import ModelError, RecipeError
from toolkit.offload.attach import load_streamed
from toolkit.plan import choose_device, make_plan
from toolkit.plan.audit import audit
from toolkit.quant import dequantize_state, load_int8, quantize_checkpoint
from toolkit.quant.gptq.calibrate import compensate_model
from toolkit.recipe import parse

WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 32}
IDS = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(0))
MODEL = QUICKSTART / "nano-qwen3moe-2m"


def is_stack(name: str) -> bool:
    return name.rpartition(".")[2] in ("gate_up_proj", "down_proj") and ".experts." in name


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_every_stack_is_in_four_bits_and_near_its_float(tmp_path: Path, family: str, kind: str) -> None:
    folder = str(tiny(tmp_path / "float", family, **WIDE))
    model, coverage = load_int8(folder, experts=kind)
    assert coverage.stacks_stored == {kind: coverage.stacks}
    assert coverage.expert_bytes_fp32 / coverage.expert_bytes > 6.5
    plain = load_int8(folder, experts="none", linears="none")[0].state_dict()
    found = dequantize_state(model)
    assert found.keys() == plain.keys()
    for name in filter(is_stack, found):
        assert found[name].shape == plain[name].shape
        error = float((found[name] - plain[name]).norm() / plain[name].norm())
        assert 0.05 < error < (0.09 if kind == "int4" else 0.12), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_has_the_shapes_and_the_kinds_of_gradients_of_an_int8_one(tmp_path: Path, family: str) -> None:
    folder = str(tiny(tmp_path / "float", family, **WIDE))
    shapes = []
    for kind in ("int8", "int4", "mxfp4"):
        torch.manual_seed(0)
        model = attach_lora(load_int8(folder, experts=kind)[0], r=2, lora_alpha=4)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        assert sum(bool(p.grad.any()) for p in trained.values() if p.grad is not None) >= len(trained) // 2
        shapes.append({name: tuple(p.shape) for name, p in trained.items()})
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_what_is_written_opens_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    folder = str(tiny(tmp_path / "float", "gpt_oss", **WIDE))
    quantize_checkpoint(folder, tmp_path / "stored", experts=kind)
    rounded, mapped = load_int8(folder, experts=kind)[0], load_int8(str(tmp_path / "stored"), experts=kind)[0]
    ours, theirs = rounded.state_dict(), mapped.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with torch.no_grad():
        assert torch.equal(rounded(IDS).logits, mapped(IDS).logits)
    assert audit(str(tmp_path / "stored")).moe_layers == 2
    with pytest.raises(ModelError, match=f"stored with experts {kind}"):
        load_int8(str(tmp_path / "stored"))


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_streamed_is_resident(tmp_path: Path, kind: str) -> None:
    folder = str(tiny(tmp_path / "float", "qwen3_moe", **WIDE))
    resident = load_int8(folder, experts=kind)[0]
    places = {f"model.layers.{number}.mlp.experts": "disk" for number in range(2)}
    streamed, coverage = load_streamed(folder, places, experts=kind, cache=tmp_path / "cache")
    assert coverage.stacks_stored == {kind: 4}
    with torch.no_grad():
        assert torch.equal(resident(IDS).logits, streamed(IDS).logits)


def test_a_stack_whose_inputs_do_not_divide_stays_int8(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe", **{**WIDE, "moe_intermediate_size": 96})
    _, coverage = load_int8(str(folder), experts="int4")
    assert coverage.stacks_stored == {"int4": 2, "int8": 2}


def test_compensation_lowers_the_error_of_outputs_and_keeps_the_storage() -> None:
    model, before = load_int8(str(MODEL), experts="int4")
    examples = [torch.randint(3, 900, (64,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(12)]
    report = compensate_model(model, str(MODEL), examples)
    stacks = [part for part in report.parts if part.experts > 1]
    assert len(stacks) == 8
    assert all(part.compensated < part.rounded for part in stacks)
    assert sum(part.compensated for part in stacks) < 0.85 * sum(part.rounded for part in stacks)
    plain = load_int8(str(MODEL), experts="int4")[0].state_dict()
    changed = {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert any(name.endswith("gate_up_proj") for name in changed)
    for name, tensor in changed.items():
        assert (tensor.shape, tensor.dtype) == (plain[name].shape, plain[name].dtype)
    steps = [tensor for name, tensor in model.state_dict().items() if name.endswith("_step")]
    assert all(int(step.abs().max()) <= 15 and int(step.abs().min()) >= 1 for step in steps)
    assert before.stacks_stored == {"int4": 8}


@pytest.mark.parametrize("kind", ["int8", "int4", "mxfp4"])
def test_the_plan_counts_the_bytes_that_are_loaded(kind: str) -> None:
    recipe = parse(
        f"model: {{model_name_or_path: {MODEL}}}\ndata: {{train: none}}\n", "r", [f"quantization.experts={kind}"]
    )
    made = make_plan(recipe, device=choose_device(use_cpu=True), for_training=False)
    assert made.bytes.experts == load_int8(str(MODEL), experts=kind)[1].expert_bytes


def test_floats_cannot_be_kept_and_int8_rows_need_integers() -> None:
    with pytest.raises(ModelError, match="source keeps what is stored in four bits, and these weights are"):
        load_int8(str(MODEL), experts="source")
    head = f"model: {{model_name_or_path: {MODEL}}}\ndata: {{train: none}}\n"
    for wrong in ("quantization.experts=int5", "quantization.experts=mxfp4 quantization.activations=int8"):
        with pytest.raises(RecipeError):
            parse(head, "r", wrong.split())
