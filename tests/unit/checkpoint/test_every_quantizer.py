"""Every quantiser that transformers knows, and what serving engines call theirs: read, or refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from transformers.integrations.metal_quantization import MetalDequantize, MetalQuantize
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from tests.harness.formats import Case, as_slice
from toolkit.checkpoint.files import METHOD, SOURCES, declared_format
from toolkit.checkpoint.formats import packed_weights
from toolkit.errors import ModelError

ALIASES = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Keys of transformers' mapping that no config says."""
KNOWN = sorted({ALIASES.get(name, name) for name in AUTO_QUANTIZATION_CONFIG_MAPPING} - {METHOD})
ENGINES = ("exl2", "exl3", "marlin", "gptq_marlin", "qqq", "deepspeedfp", "tpu_int8", "ptpc_fp8", "petit_nvfp4", "inc")
REFUSED = (
    *("aqlm", "bitnet", "eetq", "fouroversix", "fp_quant", "gemma", "higgs", "nvfp4", "quanto", "sinq", "spqr", "vptq"),
)


def test_what_is_refused_is_a_list_that_someone_has_read() -> None:
    assert [name for name in KNOWN if name not in SOURCES] == sorted(REFUSED)


@pytest.mark.parametrize("method", [*KNOWN, *ENGINES])
def test_it_is_read_or_refused_by_name(method: str) -> None:
    config = Qwen3MoeConfig(quantization_config={"quant_method": method, "bits": 4, "group_size": 64})
    if method in SOURCES and method != "gguf":  # blocks of GGUF in safetensors have a line of their own
        declared = declared_format("folder", config)
        assert (declared or {}).get("quant_method") == method
    else:
        with pytest.raises(ModelError, match="blocks of GGUF" if method == "gguf" else f"quantised as {method}; read"):
            declared_format("folder", config)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_is_worth_what_transformers_reads(bits: int) -> None:
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(bits=bits, group_size=32))
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(bits))
    stored = MetalQuantize(quantizer).convert({"a.q.weight": weight})
    parts = {key.removeprefix("a.q."): [value] for key, value in stored.items()}
    theirs = MetalDequantize(quantizer).convert(parts, full_layer_name="a.q.weight")["a.q.weight"]
    told = {"quant_method": "metal", "bits": bits, "group_size": 32}
    files = Case("mlx-affine-4").files(stored, told, {})
    assert torch.equal(as_slice(packed_weights(files)["a.q.weight"], stored).read(), theirs)
    without = {key: value for key, value in stored.items() if not key.endswith("qbiases")}
    with pytest.raises(ModelError, match=r"lacks a\.q\.qbiases"):
        packed_weights(Case("mlx-affine-4").files(without, told, {}))


def test_quanto_says_so_in_a_file_beside_the_config(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    assert declared_format(str(tmp_path), Qwen3MoeConfig()) is None
    (tmp_path / "quanto_qmap.json").write_text("{}")
    with pytest.raises(ModelError, match="its weights are quantised as quanto; read are"):
        declared_format(str(tmp_path), Qwen3MoeConfig())
