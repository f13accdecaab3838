"""Merged exports with a head: stitched into the base for stock `use_mtp`, or a draft folder that servers can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.harness.families import build, tiny_config
from tests.harness.native_heads import native_checkpoint, next_token, our_draft, stock, stock_draft
from tests.parity.conftest import EMBEDDED
from tests.unit.artifact.test_quantised_bases import tensors
from tests.unit.quant.test_storage import BLOCK, fp8, rewrite
from toolkit.adapters import attach_lora
from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base
from toolkit.export.write import Export, export_adapter
from toolkit.mtp.build import new_head
from toolkit.mtp.head_file import head_state, load_native, native_keys, read_head
from toolkit.quant import load_int8


def artifact_of(base: Path, folder: Path, *, headed: bool = True) -> Path:
    """An adapter and a head, both moved, as a run would leave them."""
    model, _ = load_int8(str(base))
    native = native_keys(base, model.config)
    head = load_native(model, native) if native else new_head(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in head.parts():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.02))
    state = head_state(head, model)
    adapted = attach_lora(model, r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return write_artifact(
        adapted,
        AutoTokenizer.from_pretrained(EMBEDDED),
        folder,
        base=identify_base(str(base)),
        recipe_yaml="",
        results={},
        coverage={},
        mtp_head=state if headed else None,
        chat={"stop_token_ids": [2, 5]},
    )


def exported(family: str, folder: Path, *, headed: bool = True) -> Export:
    build(tiny_config(family)).save_pretrained(folder / "base")
    adapter = artifact_of(folder / "base", folder / "adapter", headed=headed)
    return export_adapter(adapter, folder / "base", "merged", folder / "merged")


PROMPTS = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ["glm4_moe", "mellum"])
def test_a_native_head_is_stitched_into_the_base(family: str, tmp_path: Path) -> None:
    native_checkpoint(family, tmp_path / "base")
    adapter = artifact_of(tmp_path / "base", tmp_path / "adapter")
    done = export_adapter(adapter, tmp_path / "base", "merged", tmp_path / "merged")
    assert "own head replaced" in done.head
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    head = load_file(adapter / "mtp_head.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in head.items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in head.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    merged = stock(tmp_path / "merged")
    ours = read_head(adapter, merged, native_keys(tmp_path / "merged", merged.config))
    assert [stock_draft(merged, p) for p in PROMPTS] == [our_draft(merged, ours, p) for p in PROMPTS]
    plain = merged.generate(PROMPTS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(
        plain, merged.generate(PROMPTS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, use_mtp=True)
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_a_new_head_becomes_a_draft_folder(family: str, tmp_path: Path) -> None:
    """Stock transformers, given the folder as a model of the family it is dressed as, drafts what we draft."""
    done = exported(family, tmp_path)
    assert "draft/ holds the head" in done.head
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert json.loads((tmp_path / "merged" / "draft" / "config.json").read_text())["eos_token_id"] == [2, 5]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ours = read_head(tmp_path / "adapter", base, None)
    dressed, head = _draft_model(tmp_path / "merged" / "draft")
    assert torch.equal(dressed.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert torch.equal(dressed.get_output_embeddings().weight, base.get_output_embeddings().weight)
    theirs = [_drafted(head, *next_token(base, prompt)) for prompt in PROMPTS]
    assert theirs == [our_draft(base, ours, prompt) for prompt in PROMPTS]
    assert len(set(theirs)) > 1


def _draft_model(folder: Path) -> tuple[PreTrainedModel, MtpModel]:
    config = AutoConfig.from_pretrained(folder)
    made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        made.get_input_embeddings().weight.copy_(weights["model.embed_tokens.weight"])
        made.get_output_embeddings().weight.copy_(weights["lm_head.weight"])
    made.config.name_or_path = str(folder)
    made._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\."]
    return made, MtpModel.from_pretrained(made, device_map={"": "cpu"}).eval()


@torch.no_grad()
def _drafted(head: MtpModel, hidden: torch.Tensor, tokens: torch.Tensor) -> int:
    cache = MtpCache(config=head.config)
    return int(head(tokens[None, 1:], hidden, None, torch.arange(1, len(tokens))[None], cache)[0])


def test_a_native_head_is_in_a_rounded_merge_too_or_named(tmp_path: Path) -> None:
    native_checkpoint("glm4_moe", tmp_path / "base")
    adapter = artifact_of(tmp_path / "base", tmp_path / "adapter")
    head = load_file(adapter / "mtp_head.safetensors")
    done = export_adapter(adapter, tmp_path / "base", "merged-vllm", tmp_path / "vllm", quant="fp8")
    assert f"{len(head)} tensors of the checkpoint's own head replaced" in done.head
    found = tensors(tmp_path / "vllm")
    assert all(torch.equal(found[name], tensor) for name, tensor in head.items())
    config = json.loads((tmp_path / "vllm/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    linears = {name.removesuffix(".weight") for name, tensor in head.items() if tensor.dim() == 2}
    assert linears <= set(config["quantization_config"]["ignore"])
    for layout, quant, why in (
        ("merged-mlx", "8bit", "mlx-lm reads none"),
        ("per-expert", None, "servers take none with an adapter"),
        ("gguf", None, "llama.cpp takes none with an adapter"),
    ):
        done = export_adapter(adapter, tmp_path / "base", layout, tmp_path / layout, quant=quant)
        assert done.head == f"the trained one is left out, in the adapter's folder: {why}"


def test_a_new_head_is_a_draft_folder_of_a_rounded_merge_too(tmp_path: Path) -> None:
    build(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "base")
    adapter = artifact_of(tmp_path / "base", tmp_path / "adapter")
    done = export_adapter(adapter, tmp_path / "base", "merged-vllm", tmp_path / "vllm", quant="int8")
    assert "draft/ holds the head" in done.head
    assert json.loads((tmp_path / "vllm/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert json.loads((tmp_path / "vllm/draft/config.json").read_text())["eos_token_id"] == [2, 5]


def test_where_no_server_has_a_block_for_it_the_export_says_why(tmp_path: Path) -> None:
    done = exported("granitemoe", tmp_path)
    assert "no server takes a new head for this family: its attention computes something else" in done.head
    assert not (tmp_path / "merged" / "draft").exists()


def test_without_a_head_the_config_says_so(tmp_path: Path) -> None:
    exported("qwen3_moe", tmp_path, headed=False)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def quantised_with_head(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of FP8 blocks whose head is in FP8, too, with a table, a number and a cache's scale that no model
    has; and every weight's exact value, these left out."""
    native_checkpoint("glm4_moe", folder / "float")
    stored, exact = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in load_file(folder / "float" / "model.safetensors").items():
        if "proj" in name and weight.dim() == 2:
            stored[name], stored[f"{name}_scale_inv"], exact[name] = fp8(weight, torch.float32)
        else:
            stored[name] = exact[name] = weight
    stored |= {"visual.table": torch.arange(4.0).half(), "visual.number": torch.tensor(3.0)}
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(())
    declared = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return rewrite(folder / "float", folder / "fp8", stored, declared, shards=3), exact


@pytest.mark.parametrize("format", ["merged", "merged-int8", "merged-source"])
def test_what_no_model_uses_is_kept_from_a_quantised_base_or_named(format: str, tmp_path: Path) -> None:
    source, exact = quantised_with_head(tmp_path)
    adapter = artifact_of(source, tmp_path / "adapter", headed=format == "merged")
    texts = torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(5)).tolist()
    done = export_adapter(adapter, source, format, tmp_path / "out", texts=texts, force=True)
    found = tensors(tmp_path / "out")
    head = {key for key in exact if key.startswith("model.layers.3.")}
    assert len(head) == 39
    trained = load_file(adapter / "mtp_head.safetensors") if format == "merged" else {}
    if format == "merged-source":
        assert tensors(source).keys() == found.keys()
    else:
        assert set(done.kept) == {*head, "visual.table", "visual.number"}
        assert done.left_out == ("model.layers.0.self_attn.k_scale",)
        for key in head:
            assert torch.equal(found[key], trained.get(key, exact[key]).to(found[key].dtype)), key
    assert torch.equal(found["visual.table"], torch.arange(4.0).half())
    assert found["visual.number"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    model, _ = load_int8(str(tmp_path / "out"))
    keys = native_keys(tmp_path / "out", model.config)
    assert keys is not None
    assert load_native(model, keys).native == keys
