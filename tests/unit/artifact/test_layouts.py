"""Every export gives the adapter's numbers again, a damaged one is refused, and a combination is the sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.artifact.conftest import BASE, stock_adapter
from toolkit.adapters.layouts import from_per_expert, largest_difference, per_expert, read_factors
from toolkit.artifact import combine_adapters, read_manifest, reopen_recipe, verify_artifact
from toolkit.checkpoint.config import skeleton
from toolkit.errors import ModelError, RecipeError
from toolkit.export import export_adapter

# PEFT looks for a pattern's keys among modules only; those of parameters do apply.
pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
IDS = torch.tensor([[1, 5, 9, 200, 33, 7, 64, 128]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def test_per_expert_keys_hold_the_adapter_with_patterns(write, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a", model=stock_adapter(rank_pattern={"mlp.experts.down_proj": 6, "q_proj": 2}))
    base = skeleton(str(BASE))
    adapter = read_factors(artifact, base)
    tensors, rank = per_expert(adapter, base)
    assert rank == 6
    assert "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight" in tensors
    assert largest_difference(adapter, from_per_expert(tensors, adapter, base)) < 1e-6
    swapped = {name.replace("gate_proj", "@").replace("up_proj", "gate_proj").replace("@", "up_proj"): tensor
               for name, tensor in tensors.items()}  # fmt: skip
    assert largest_difference(adapter, from_per_expert(swapped, adapter, base)) > 0.1


def test_a_merged_checkpoint_gives_the_adapted_models_logits(artifact: Path, tmp_path: Path) -> None:
    made = export_adapter(artifact, BASE, "merged", tmp_path / "merged")
    assert made.difference <= made.bound
    ours, theirs = load_file(tmp_path / "merged/model.safetensors"), load_file(BASE / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, artifact))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    moved, off = float((adapted - plain).abs().max()), float((adapted - merged).abs().max())
    assert off < moved / 20  # weights are rounded to the checkpoint's bf16


def test_an_export_overwrites_nothing_and_knows_its_formats(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(RecipeError, match="already exists"):
        export_adapter(artifact, BASE, "peft", tmp_path / "there")
    with pytest.raises(RecipeError, match="no such layout"):
        export_adapter(artifact, BASE, "onnx", tmp_path / "new")


def test_a_combination_is_the_weighted_sum(write, tmp_path: Path) -> None:
    one = write(tmp_path / "one", model=stock_adapter(rank_pattern={"mlp.experts.down_proj": 6, "mlp.gate": 2}))
    other = write(tmp_path / "other")
    made = combine_adapters({str(one): 0.7, str(other): 0.3}, tmp_path / "sum")
    base = skeleton(str(BASE))
    found = {f.parameter: f.full() for f in read_factors(tmp_path / "sum", base)}
    parts = [{f.parameter: f.full() for f in read_factors(folder, base)} for folder in (one, other)]
    assert made.error == 0.0
    report = verify_artifact(tmp_path / "sum", base=BASE)
    assert report.ok, report.checks
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "sum").get_vocab() == AutoTokenizer.from_pretrained(BASE).get_vocab()
    )
    made_of = read_manifest(tmp_path / "sum")["combined"]
    assert [(part["name"], part["weight"]) for part in made_of] == [("one", 0.7), ("other", 0.3)]
    assert "## A combination" in (tmp_path / "sum/README.md").read_text()
    assert reopen_recipe(tmp_path / "sum", base=str(BASE), note=lambda line: None).lora.r == made.rank
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "sum"))
    assert (adapted - logits(AutoModelForCausalLM.from_pretrained(BASE))).abs().max() > 0.1
    for name, total in found.items():
        torch.testing.assert_close(total, 0.7 * parts[0][name] + 0.3 * parts[1][name], atol=1e-6, rtol=1e-5)


def test_a_rank_reduction_states_its_error(artifact: Path, tmp_path: Path) -> None:
    exact = combine_adapters({str(artifact): 1.0}, tmp_path / "four", rank=4)
    lossy = combine_adapters({str(artifact): 1.0}, tmp_path / "two", rank=2)
    assert exact.error < 1e-6
    base = skeleton(str(BASE))
    whole, small = (read_factors(folder, base) for folder in (artifact, tmp_path / "two"))
    off = sum(float((a.full() - b.full()).square().sum()) for a, b in zip(whole, small, strict=True))
    size = sum(float(a.full().square().sum()) for a in whole)
    assert lossy.error == pytest.approx((off / size) ** 0.5, rel=1e-3)


def test_canaries_are_each_named(write, tmp_path: Path) -> None:
    row = "a fern is a flowerless plant with feathery leaves"
    token = "hf_" + "a1B2" * 8
    with pytest.raises(ModelError) as caught:
        write(tmp_path / "a", coverage={"note": f"saw {token} in /mnt/private/rows.jsonl", "sample": row}, rows=[row])
    said = str(caught.value)
    assert "row 1 of the data" in said
    assert "local path /mnt/private" in said
    assert token not in said
    assert not (tmp_path / "a").exists()
