"""A merge with DoRA's magnitudes is stock PEFT's: the changed weight with the length of each of its rows as trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.artifact.conftest import BASE
from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError
from toolkit.export import export_adapter

gguf = pytest.importorskip("gguf")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def adapted() -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, use_dora=True, task_type="CAUSAL_LM")
    model = PeftModel(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


def test_every_merge_has_them(adapted: PeftModel, tmp_path: Path) -> None:
    artifact = write_artifact(
        adapted, AutoTokenizer.from_pretrained(BASE), tmp_path / "adapter", base=identify_base(str(BASE)),
        recipe_yaml="", results={}, coverage={}, chat={"stop_token_ids": [2]},
    )  # fmt: skip
    export_adapter(artifact, BASE, "merged", tmp_path / "merged")
    export_adapter(artifact, BASE, "gguf-merged", tmp_path / "gguf", quant="f32")
    export_adapter(artifact, BASE, "merged-vllm", tmp_path / "vllm", quant="fp8")
    for layout in ("per-expert", "gguf", "merged-source"):
        with pytest.raises(ModelError, match=f"--format {layout}: has no place for DoRA's magnitudes; take --format m"):
            export_adapter(artifact, BASE, layout, tmp_path / "out")
    before = load_file(BASE / "model.safetensors")
    wanted: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged/model.safetensors")
    rounded = load_file(tmp_path / "vllm/model-00001.safetensors")
    floats = {
        tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors
    }
    for linear, name in zip(LINEARS, ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
        key = f"model.layers.2.self_attn.{linear}.weight"
        moved = (wanted[key] - before[key].float()).abs().max()
        torch.testing.assert_close(floats[f"blk.2.{name}.weight"], wanted[key], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(merged[key].float(), wanted[key], atol=1e-6, rtol=2**-8)
        eighths = rounded[key].float() * rounded[f"{key}_scale"].float()
        torch.testing.assert_close(eighths, wanted[key], atol=float(moved) / 8, rtol=2**-4 + 2**-7)
        assert moved > 0.05 * wanted[key].abs().max()
    assert all(torch.equal(merged[key], before[key]) for key in before if "self_attn" not in key)
