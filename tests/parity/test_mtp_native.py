"""Heads that checkpoints carry: loaded, trained, exported under their own names, and read by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.parity.families import build, tiny_config
from toolkit.adapters import attach_lora
from toolkit.errors import ModelError
from toolkit.mtp import (
    HeadDrafter,
    HeadTraining,
    Trunk,
    config_with_head,
    head_state,
    load_native,
    merged_head_state,
    native_keys,
    read_head,
)
from toolkit.mtp.head import capture_hidden
from toolkit.mtp.native import head_of, prepared
from toolkit.quant import load_int8

# How each family's checkpoints call a head: one level up under `mtp`, or as a layer after the last.
LAYOUTS = {"mellum": "mtp", "deepseek_v3": "beyond", "glm4_moe": "beyond", "exaone_moe": "mtp"}
_ABOVE = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}


def native_checkpoint(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """A tiny checkpoint with a head in the family's own layout; gives the head's tensors."""
    config = tiny_config(family)
    model = build(config)
    model.save_pretrained(folder)
    made = MtpModel(_with_config(model), 1)
    torch.manual_seed(1)
    head: dict[str, torch.Tensor] = {}
    for name, tensor in made.state_dict().items():
        if name.startswith("layers."):
            noise = torch.randn_like(tensor)
            value = noise * 0.2 if tensor.dim() > 1 else tensor + noise * 0.1
            head |= _per_expert(_native_name(name, family, config.num_hidden_layers), value)
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **head}, weights, metadata={"format": "pt"})
    _declare(folder)
    return head


def _with_config(model: PreTrainedModel) -> PreTrainedModel:
    model.config = prepared(model.config, 1)
    return model


def _native_name(name: str, family: str, layers: int) -> str:
    rest = name.removeprefix("layers.0.")
    part = rest.partition(".")[0]
    if LAYOUTS[family] == "beyond":
        return f"model.layers.{layers}." + rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
    return f"mtp.{_ABOVE[part]}.weight" if part in _ABOVE else "mtp.layers.0." + rest.removeprefix("mtp_block.")


def _per_expert(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if ".experts.gate_up_proj" in name:
        halves = {"gate_proj": value.chunk(2, 1)[0], "up_proj": value.chunk(2, 1)[1]}
    elif ".experts.down_proj" in name:
        halves = {"down_proj": value}
    else:
        return {name: value}
    stem = name.rpartition(".")[0]
    return {
        f"{stem}.{expert}.{leaf}.weight": half[expert].contiguous()
        for leaf, half in halves.items()
        for expert in range(len(half))
    }


def _declare(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = config_with_head(config, 1)
    (folder / "config.json").write_text(json.dumps(config))


def stock(folder: Path) -> PreTrainedModel:
    """As transformers loads it; its classes name the layer of a full-size checkpoint, so a tiny one is told its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\.", r"^mtp\."]
    return model.eval()


@pytest.mark.parametrize("family", LAYOUTS)
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

    after = _trained(model, head)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    artifact.mkdir()
    save_file(after, artifact / "mtp_head.safetensors", metadata={"format": "pt"})
    _stitch(base, merged, merged_head_state(artifact))
    theirs = stock(merged)
    ours = read_head(artifact, theirs, keys)
    prompts = torch.randint(3, model.get_input_embeddings().weight.shape[0], (6, 9), generator=torch.Generator())
    for prompt in prompts:
        assert _stock_draft(theirs, prompt) == _our_draft(theirs, ours, prompt)
    plain = theirs.generate(prompts[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(
        plain, theirs.generate(prompts[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, use_mtp=True)
    )


def _trained(model: PreTrainedModel, head: object) -> dict[str, torch.Tensor]:
    adapted = attach_lora(model, r=2)
    training = HeadTraining(head, adapted, depth=1, learning_rate=1e-2)  # type: ignore[arg-type]
    ids = torch.arange(3, 3 + 24)[None] % model.get_input_embeddings().weight.shape[0]
    losses = []
    for _ in range(3):
        with training.listen() as hidden, torch.no_grad():
            adapted(input_ids=ids, use_cache=False)
        training.learn(hidden(), {"input_ids": ids, "labels": ids}, 22)
        training.step()
        losses.append(training.result().loss)
    assert losses[-1] < losses[0]
    return head_state(training.head, adapted.get_base_model())


def _stitch(base: Path, merged: Path, head: dict[str, torch.Tensor]) -> None:
    merged.mkdir()
    save_file(
        {**load_file(base / "model.safetensors"), **head}, merged / "model.safetensors", metadata={"format": "pt"}
    )
    (merged / "config.json").write_text((base / "config.json").read_text())


@torch.no_grad()
def _next(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with capture_hidden(model) as hidden:
        logits = model(input_ids=prompt[None], use_cache=False).logits
    return hidden(), torch.cat([prompt, logits[0, -1:].argmax(-1)])


@torch.no_grad()
def _stock_draft(model: PreTrainedModel, prompt: torch.Tensor) -> int:
    hidden, tokens = _next(model, prompt)
    head = MtpModel.from_pretrained(model, device_map={"": "cpu"}).eval()
    positions = torch.arange(1, len(tokens))[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    return int(head(tokens[None, 1:], hidden, None, positions, cache)[0])


def _our_draft(model: PreTrainedModel, head: object, prompt: torch.Tensor) -> int:
    hidden, tokens = _next(model, prompt)
    drafter = HeadDrafter(head, Trunk.of(model))  # type: ignore[arg-type]
    draft = drafter.draft(hidden[0], tokens.tolist(), 1, lambda _, logits: (int(logits.argmax()), None))
    return draft.tokens[0]


def test_what_a_checkpoint_lacks_of_its_head_is_named(tmp_path: Path) -> None:
    written = native_checkpoint("mellum", tmp_path)
    model, _ = load_int8(str(tmp_path))
    keys = native_keys(tmp_path, model.config)
    assert keys is not None
    del written["mtp.fc.weight"]
    with pytest.raises(ModelError, match=r"lacks layers\.0\.eh_proj\.weight"):
        head_of(model, keys, written)


def test_a_checkpoint_without_a_head_has_none(tmp_path: Path) -> None:
    model = build(tiny_config("qwen3_moe"))
    model.save_pretrained(tmp_path)
    assert native_keys(tmp_path, model.config) is None
