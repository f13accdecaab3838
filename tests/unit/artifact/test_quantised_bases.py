"""A base of FP8 or MXFP4 weights is merged into as if it had never been quantised; int8 alone is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tests.unit.artifact.conftest import BASE
from tests.unit.quant.test_storage import fp8_pair, mxfp4_pair
from toolkit.adapters import attach_lora
from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError
from toolkit.export import export_adapter
from toolkit.quant import load_int8, quantize_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
IDS = torch.tensor([[1, 5, 9, 33, 7, 12]])


def adapter(base: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """On every kind of part, B random; trained on `base` in int8."""
    torch.manual_seed(3)
    model = attach_lora(load_int8(str(base))[0], r=2, lora_alpha=4, rank_pattern={"experts": 3})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return write_artifact(
        model, tokenizer, folder, base=identify_base(str(base)), recipe_yaml="", results={}, coverage={}
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


@pytest.mark.parametrize(
    "pair",
    [
        lambda folder: fp8_pair(folder, "qwen3_moe", shards=3),
        lambda folder: fp8_pair(folder, "deepseek_v3"),
        lambda folder: mxfp4_pair(folder, shards=3),
    ],
    ids=["fp8", "fp8 latent attention", "mxfp4"],
)
def test_a_quantised_base_is_merged_as_its_exact_values(
    pair: Callable[[Path], tuple[Path, Path, object]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    quantised, exact, _ = pair(tmp_path)
    artifact = adapter(quantised, tokenizer, tmp_path / "adapter")
    made = export_adapter(artifact, quantised, "merged", tmp_path / "merged")
    assert made.difference <= made.bound
    export_adapter(adapter(exact, tokenizer, tmp_path / "same"), exact, "merged", tmp_path / "wanted")
    found, wanted, stored = (tensors(folder) for folder in (tmp_path / "merged", tmp_path / "wanted", quantised))
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        was_plain = key in stored and stored[key].dtype == torch.float32
        assert value.dtype == (torch.float32 if was_plain else torch.bfloat16), key
        torch.testing.assert_close(value, wanted[key].to(value.dtype), atol=1e-6, rtol=torch.finfo(value.dtype).eps)
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, artifact))
    assert (merged - adapted).abs().median() < (plain - adapted).abs().median() / 20


def test_an_int8_checkpoint_is_refused_and_the_original_taken(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    quantize_checkpoint(str(BASE), tmp_path / "int8")
    artifact = adapter(tmp_path / "int8", tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"original ones: give the checkpoint it was made from with --base") as caught:
        export_adapter(artifact, tmp_path / "int8", "merged", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    made = export_adapter(artifact, BASE, "merged", tmp_path / "out")
    assert made.difference <= made.bound
