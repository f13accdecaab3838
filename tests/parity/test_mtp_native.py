"""Heads that checkpoints carry: loaded, trained, exported under their own names, and read by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.harness.families import build, tiny_config
from tests.harness.native_heads import native_checkpoint, our_draft, stock, stock_draft, trained
from toolkit.errors import ModelError
from toolkit.mtp.decode import can_speculate
from toolkit.mtp.head_file import head_of, head_state, load_native, merged_head_state, native_keys, read_head
from toolkit.quant import load_int8
from toolkit.run.mtp import as_it_was

# One of each layout and kind of attention; scripts/parity/mtp_families.py goes through all.
FAMILIES = ("deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe", "mellum", "mimo_v2_flash", "qwen3_next")
# transformers' own mapping lacks these families' key names, so its drafts cannot be compared with.
OURS_ALONE = {"ernie4_5_moe", "mimo_v2_flash"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_native_head_goes_through_training_back_to_stock(family: str, tmp_path: Path) -> None:
    base, merged, artifact = tmp_path / "base", tmp_path / "merged", tmp_path / "artifact"
    written = native_checkpoint(family, base)
    model, _ = load_int8(str(base))
    keys = native_keys(base, model.config)
    assert keys is not None
    head = load_native(model, keys)
    before = head_state(head, model)
    assert before.keys() == written.keys()
    for name, tensor in written.items():
        # int8 with one scale a row errs by half a step of the largest weight; the rest comes back as it was.
        is_expert = ".experts." in name
        limit = float(tensor.abs().amax()) / 254 * 1.01 if is_expert else 1e-6
        assert float((before[name] - tensor).abs().max()) <= limit, name

    after = trained(model, head)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    artifact.mkdir()
    save_file(after, artifact / "mtp_head.safetensors", metadata={"format": "pt"})
    _stitch(base, merged, merged_head_state(artifact))
    theirs = stock(merged)
    ours = read_head(artifact, theirs, keys)
    prompts = torch.randint(3, model.get_input_embeddings().weight.shape[0], (6, 9), generator=torch.Generator())
    if family in OURS_ALONE:
        assert len({our_draft(theirs, ours, prompt) for prompt in prompts}) > 1
        return
    for prompt in prompts:
        assert stock_draft(theirs, prompt) == our_draft(theirs, ours, prompt)
    if can_speculate(theirs) is None:
        plain = theirs.generate(prompts[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(
            plain, theirs.generate(prompts[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, use_mtp=True)
        )


def test_a_head_that_others_quantised_is_multiplied_out(tmp_path: Path) -> None:
    """Its FP8 codes would otherwise be taken for weights, its scales left aside without a word."""
    plain, quantised = tmp_path / "plain", tmp_path / "fp8"
    native_checkpoint("deepseek_v3", plain)
    stored, exact = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if weight.dim() != 2 or "proj" not in name:
            stored[name] = exact[name] = weight
            continue
        scale = weight.float().abs().amax() / 448
        stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        exact[name] = stored[name].float() * scale
    config = json.loads((plain / "config.json").read_text())
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    states = []
    for folder in (quantised, plain):
        model, _ = load_int8(str(folder))
        keys = native_keys(folder, model.config)
        assert keys is not None
        assert not any("scale" in key for key in keys.files)
        states.append(head_state(load_native(model, keys), model))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def _stitch(base: Path, merged: Path, head: dict[str, torch.Tensor]) -> None:
    merged.mkdir()
    save_file(
        {**load_file(base / "model.safetensors"), **head}, merged / "model.safetensors", metadata={"format": "pt"}
    )
    (merged / "config.json").write_text((base / "config.json").read_text())


def test_what_a_checkpoint_lacks_of_its_head_is_named(tmp_path: Path) -> None:
    written = native_checkpoint("mellum", tmp_path)
    model, _ = load_int8(str(tmp_path))
    keys = native_keys(tmp_path, model.config)
    assert keys is not None
    del written["mtp.fc.weight"]
    with pytest.raises(ModelError, match=r"lacks layers\.0\.eh_proj\.weight"):
        head_of(model, keys, written)


@pytest.mark.parametrize("family", ["qwen3_moe", "muse_spark"])
def test_a_checkpoint_without_a_head_has_none(family: str, tmp_path: Path) -> None:
    """muse_spark's tower for sound has more layers than its decoder."""
    model = build(tiny_config(family))
    model.save_pretrained(tmp_path)
    assert native_keys(tmp_path, model.config) is None


def test_a_head_that_nobody_asked_for_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native_checkpoint("mellum", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["mtp.fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_int8(str(tmp_path))
    native = native_keys(tmp_path, model.config)
    assert native is not None
    assert as_it_was(model, native, is_needed=False, console=Console(width=400)) is None
    assert "note: the checkpoint's own head is not measured: " in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"lacks layers\.0\.eh_proj\.weight"):
        as_it_was(model, native, is_needed=True, console=None)
