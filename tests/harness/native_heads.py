"""Tiny checkpoints with a multi-token-prediction head in each layout that families have for one, and drafts with it.

Layouts, by the key names that published checkpoints have: `beyond`, a decoder layer after the last; `above`, its extras
one level up under `mtp`; `block`, everything of one kind under a name of its own; `own`, a numbered layer under `mtp`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.harness.families import build, tiny_config
from toolkit.adapters import attach_lora
from toolkit.mtp.drafts import HeadDrafter
from toolkit.mtp.head import MtpHead, Trunk, capture_hidden
from toolkit.mtp.head_file import config_with_head, head_state, prepared
from toolkit.mtp.training import HeadTraining

__all__ = [
    "LAYOUTS",
    "WITHOUT_NORM",
    "layout_of",
    "native_checkpoint",
    "next_token",
    "our_draft",
    "stock",
    "stock_draft",
    "trained",
]

LAYOUTS = {
    "bailing_hybrid": "beyond",
    "deepseek_v3": "beyond",
    "ernie4_5_moe": "block",
    "exaone_moe": "above",
    "glm4_moe": "beyond",
    "glm4_moe_lite": "beyond",
    "hy_v3": "beyond",
    "mellum": "above",
    "mimo_v2_flash": "own",
    "qwen3_5_moe_text": "above",
    "qwen3_next": "above",
    "solar_open": "beyond",
}
"""Families whose head loads, and the layout of their checkpoints."""

WITHOUT_NORM = {"ernie4_5_moe"}
"""Families whose head has no norm of its own at its end."""

_ABOVE = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
_BLOCK = {"enorm": "mtp_emb_norm", "hnorm": "mtp_hidden_norm", "eh_proj": "mtp_linear_proj"}


def layout_of(patterns: list[str]) -> str:
    """The layout that a model class's ignored keys speak of."""
    return "beyond" if any("layers" in pattern and "mtp" not in pattern for pattern in patterns) else "above"


def native_checkpoint(
    family: str, folder: Path, layout: str | None = None, changes: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """A tiny checkpoint with a head in the family's own layout, its config changed; gives the head's tensors."""
    config = tiny_config(family)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    model = build(config)
    model.save_pretrained(folder)
    model.config = prepared(model.config, 1)
    made = MtpModel(model, 1)
    torch.manual_seed(1)
    head: dict[str, torch.Tensor] = {}
    layers = config.get_text_config().num_hidden_layers
    for name, tensor in made.state_dict().items():
        is_end = name == "layers.0.post_norm.weight" and family in WITHOUT_NORM
        if name.startswith("layers.") and tensor.is_floating_point() and not is_end:
            noise = torch.randn_like(tensor)
            value = noise * 0.2 if tensor.dim() > 1 else tensor + noise * 0.1
            head |= _per_expert(_name(name, layout or LAYOUTS[family], layers), value)
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **head}, weights, metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_with_head(told, 1)))
    return head


def _name(name: str, layout: str, layers: int) -> str:
    rest = name.removeprefix("layers.0.")
    part, inner = rest.partition(".")[0], rest.removeprefix("mtp_block.")
    if layout == "beyond":
        return f"model.layers.{layers}." + inner.replace("post_norm.", "shared_head.norm.")
    if layout == "above":
        return f"mtp.{_ABOVE[part]}.weight" if part in _ABOVE else f"mtp.layers.0.{inner}"
    if layout == "block":
        return f"model.{_BLOCK[part]}.0.weight" if part in _BLOCK else f"model.mtp_block.0.{inner}"
    end = inner.replace("post_attention_layernorm", "pre_mlp_layernorm").replace("post_norm.", "final_layernorm.")
    return f"model.mtp.layers.0.{end}"


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


def stock(folder: Path) -> PreTrainedModel:
    """As transformers loads it; its classes name the layer of a full-size checkpoint, so a tiny one is told its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\.", r"^mtp\."]
    return model.eval()


def trained(model: PreTrainedModel, head: MtpHead) -> dict[str, torch.Tensor]:
    """The head's tensors after three steps, over which its loss must have fallen."""
    adapted = attach_lora(model, r=2)
    training = HeadTraining(head, adapted, depth=1, learning_rate=1e-2)
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


@torch.no_grad()
def next_token(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's hidden states of a prompt, and the prompt with the likeliest token after it."""
    with capture_hidden(model) as hidden:
        logits = model(input_ids=prompt[None], use_cache=False).logits
    return hidden(), torch.cat([prompt, logits[0, -1:].argmax(-1)])


@torch.no_grad()
def stock_draft(model: PreTrainedModel, prompt: torch.Tensor) -> int:
    """What transformers' own head, read from the model's folder, drafts after the prompt and one token more."""
    hidden, tokens = next_token(model, prompt)
    head = MtpModel.from_pretrained(model, device_map={"": "cpu"}).eval()
    positions = torch.arange(1, len(tokens))[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    return int(head(tokens[None, 1:], hidden, None, positions, cache)[0])


def our_draft(model: PreTrainedModel, head: MtpHead, prompt: torch.Tensor) -> int:
    """The same, with our head."""
    hidden, tokens = next_token(model, prompt)
    drafter = HeadDrafter(head, Trunk.of(model))
    draft = drafter.draft(hidden[0], tokens.tolist(), 1, lambda _, logits: (int(logits.argmax()), None))
    return draft.tokens[0]
