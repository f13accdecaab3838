"""Every export read by the program it is meant for: stock transformers, stock PEFT, our own int8 loader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    conversion_mapping,
)
from transformers.core_model_loading import Split, WeightConverter

from scripts.parity.layouts import make_adapter
from toolkit.adapters import attach_lora
from toolkit.artifact import read_manifest, write_artifact
from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError, RecipeError
from toolkit.export import export_adapter
from toolkit.quant import load_int8

NANO = Path(__file__).parents[2] / "recipes" / "quickstart" / "nano-qwen3moe-2m"
IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))
ONE_BY_ONE = {"olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "qwen3_moe", "mixtral"}
"""Of the families of `checkpoint`, those whose files hold experts one by one."""


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path, randomize: Callable[[torch.nn.Module], None]) -> Path:
    """An artifact of every kind of part, ranks and scalings that differ."""
    torch.manual_seed(3)
    model, _ = load_int8(str(checkpoint))
    ranks = {"rank_pattern": {"experts": 2, "router": 1}, "alpha_pattern": {"experts": 5.0}}
    ours = attach_lora(model, r=3, lora_alpha=4, use_rslora=True, target_modules="all-linear", **ranks)
    randomize(ours)
    return write_artifact(
        ours,
        AutoTokenizer.from_pretrained(NANO),
        tmp_path / "adapter",
        base=identify_base(str(checkpoint)),
        recipe_yaml=f"model: {{model_name_or_path: {checkpoint.name}}}\n",
        results={},
        coverage={},
        chat={"stop_token_ids": [2, 5]},
    )


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found.float()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_merged_is_base_and_adapter_in_stock_transformers(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    done = export_adapter(adapter, checkpoint, "merged", tmp_path / "merged")
    with_adapter = logits(PeftModel.from_pretrained(stock(checkpoint), adapter).eval())
    merged = logits(stock(tmp_path / "merged"))
    torch.testing.assert_close(merged, with_adapter, rtol=0, atol=1e-4)
    assert (merged - logits(stock(checkpoint))).abs().max() > 0.1
    assert 0 <= done.difference <= done.bound
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "merged"))
    assert before.keys() == after.keys()
    kept = {key for key in before if torch.equal(before[key], after[key])}
    assert all(
        any(part in key for part in ("norm", "embed", "lm_head", "bias", "sinks", "gate.weight")) for key in kept
    )
    assert json.loads((tmp_path / "merged" / "export.json").read_bytes())["difference"] == done.difference


def test_per_expert_keys_are_the_checkpoints_own(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    family, out = json.loads((checkpoint / "config.json").read_bytes())["model_type"], tmp_path / "per-expert"
    made = export_adapter(adapter, checkpoint, "per-expert", out)
    assert made.difference <= made.bound
    if family not in ONE_BY_ONE:  # the checkpoint has no such names to compare with
        return
    tensors, base = load_file(out / "adapter_model.safetensors"), load_file(checkpoint / "model.safetensors")
    config = json.loads((out / "adapter_config.json").read_bytes())
    assert config["r"] == config["lora_alpha"] == 3
    merged = {**base}
    for name, A in tensors.items():
        if module := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name):
            B = tensors[name.replace("lora_A", "lora_B")]
            assert A.shape[0] == B.shape[1] == config["r"]
            merged[f"{module[1]}.weight"] = base[f"{module[1]}.weight"] + B @ A
    assert merged.keys() == base.keys()
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            (tmp_path / "by-hand").mkdir(exist_ok=True)
            (tmp_path / "by-hand" / path.name).write_bytes(path.read_bytes())
    save_file(merged, tmp_path / "by-hand" / "model.safetensors", metadata={"format": "pt"})
    export_adapter(adapter, checkpoint, "merged", tmp_path / "merged")
    torch.testing.assert_close(
        logits(stock(tmp_path / "by-hand")), logits(stock(tmp_path / "merged")), rtol=0, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_sharded_bf16_keeps_files_and_dtype(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    shards = tmp_path / "sharded" / checkpoint.name
    stock(checkpoint, torch.bfloat16).save_pretrained(shards, max_shard_size="10KB")
    manifest = read_manifest(adapter)
    manifest["base"]["weights_sha256"] = identify_base(str(shards)).weights_sha256
    write_json(adapter / "manifest.json", manifest)
    export_adapter(adapter, shards, "merged", tmp_path / "merged")
    names = {path.name: path.stat().st_size for path in shards.iterdir() if path.suffix == ".safetensors"}
    assert len(names) > 2
    assert names == {p.name: p.stat().st_size for p in (tmp_path / "merged").iterdir() if p.suffix == ".safetensors"}
    wanted = logits(PeftModel.from_pretrained(stock(shards), adapter).eval())
    found = logits(stock(tmp_path / "merged"))
    # Weights were rounded once to eight bits of mantissa. A router's near tie may fall the other way for a few tokens,
    # so the middle one is held to it; the export itself has compared every weight.
    assert (found - wanted).abs().median() < torch.finfo(torch.bfloat16).eps * wanted.std()


def test_merged_int8_loads_here(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("merged", "merged-int8"):
        export_adapter(adapter, checkpoint, name, tmp_path / name)
        assert AutoConfig.from_pretrained(tmp_path / name).get_text_config().eos_token_id == [2, 5]
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == [2, 5]
    loaded, coverage = load_int8(str(tmp_path / "merged-int8"))
    assert coverage.stacks_int8 == coverage.stacks
    torch.testing.assert_close(logits(loaded), logits(load_int8(str(tmp_path / "merged"))[0]), rtol=0, atol=0)


def test_peft_is_the_artifact(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    export_adapter(adapter, checkpoint, "peft", tmp_path / "out")
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "export.json"}
    assert there == {path.name: path.read_bytes() for path in adapter.iterdir()}


def test_what_cannot_be_exported_says_so_and_leaves_nothing(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="known: peft"):
        export_adapter(adapter, checkpoint, "gptq", tmp_path / "out")
    with pytest.raises(ModelError, match="other weights than the adapter's base"):
        export_adapter(adapter, NANO, "merged", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(RecipeError, match="already exists"):
        export_adapter(adapter, checkpoint, "merged", tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "there"]


def joined_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    """OLMoE as a family whose files hold query, key and value in one tensor."""
    mapping = [*(conversion_mapping.get_checkpoint_conversion_mapping("olmoe") or [])]
    names = [f"self_attn.{which}_proj" for which in "qkv"]
    mapping.append(WeightConverter("self_attn.qkv_proj", names, operations=[Split(dim=0)]))
    known = {**conversion_mapping._checkpoint_conversion_mapping_cache, "olmoe": mapping}
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known)
    return "olmoe"


@pytest.mark.parametrize("family", ["joined", "lara_mini"])
def test_a_tensor_that_becomes_several_parameters_has_the_update_of_each(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if family not in ("joined", *CONFIG_MAPPING):
        pytest.skip("a family of the newest stack")
    name = joined_attention(monkeypatch) if family == "joined" else family
    model, artifact = make_adapter(name, tmp_path, vocab_size=2048)
    base, out = tmp_path / "base", tmp_path / "out"
    tensor = "self_attn.qkv_proj.weight" if family == "joined" else "linear_attn.in_proj.weight"
    assert f"model.layers.0.{tensor}" in load_file(base / "model.safetensors")
    assert f"model.layers.0.{tensor}" not in model.get_base_model().state_dict()
    kinds = {"gguf-merged": "f32", "merged-vllm": "int8", "merged-mlx": "8bit"}
    for layout in ("peft", "merged", "merged-int8", *(["gguf-merged"] if family == "joined" else [])):
        made = export_adapter(artifact, base, layout, out / layout, quant=kinds.get(layout))
        assert 0 <= made.difference <= made.bound
    model.get_base_model().set_experts_implementation("onecard_per_expert")
    torch.testing.assert_close(logits(stock(out / "merged")), logits(model.eval()), rtol=0, atol=1e-4)
    refused = {"per-expert": "the checkpoint stores it fused with others: export as peft or merged"}
    if family == "lara_mini":
        refused |= {
            "gguf": "gguf: llama.cpp has no architecture for lara_mini",
            "gguf-merged": "gguf-merged: lara_mini is no architecture that is known in GGUF files: export as merged",
            "merged-vllm": "merged-vllm: this family's files hold all experts of a layer in one tensor",
            "merged-mlx": "merged-mlx: lara_mini is none of the families that mlx-lm was seen to compute alike",
            "merged-source": "its weights are floats, which merged-source does not write; export it as merged",
        }
    for layout, line in refused.items():
        with pytest.raises(ModelError, match=re.escape(line)):
            export_adapter(artifact, base, layout, out / layout, quant=kinds.get(layout), texts=IDS.tolist())
