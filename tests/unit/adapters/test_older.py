"""Adapters with an expert's projections as linears of their own, as transformers 4 had them and servers still do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from toolkit.adapters import load_adapter
from toolkit.adapters.starting import check_start
from toolkit.architecture import describe

HIDDEN, WIDTH, EXPERTS, RANK, ALPHA = 16, 8, 3, 4, 8
PARTS = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}


def made(family: str) -> PreTrainedModel:
    """One MoE layer; behind a dense one, and with a shared expert, where the family has them."""
    config = AutoConfig.for_model(
        family, vocab_size=16, hidden_size=HIDDEN, intermediate_size=WIDTH, moe_intermediate_size=WIDTH,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS,
        n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def changes(model: PreTrainedModel, tensors: dict[str, Tensor], with_linears: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters of experts (and of linears of the same names), each with its B·A; the factors go into `tensors`."""

    def change(module: str, part: str) -> Tensor:
        inputs, outputs = PARTS[part]
        A, B = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
        return B @ A

    for layer in describe(model).layers:
        for stack, parts in zip(layer.stacks, (("gate_proj", "up_proj"), ("down_proj",)), strict=True):
            experts = [[change(f"{layer.name}.{e}.{part}", part) for part in parts] for e in range(EXPERTS)]
            yield stack, torch.stack([torch.cat(one) for one in experts])
    for linear in describe(model).linears:
        if (part := linear.name.rpartition(".")[2]) in PARTS and with_linears:
            yield f"{linear.name}.weight", change(linear.name, part)


def write(folder: Path, tensors: dict[str, Tensor], **fields: object) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(PARTS), **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "with_linears", "use_rslora", "count"),
    [
        ("qwen3_moe", True, False, 4),
        ("qwen3_moe", True, True, 4),
        ("glm4_moe", True, False, 2 + 6),
        ("glm4_moe", False, False, 2),
    ],
)
def test_every_part_changes_as_it_was_trained(
    tmp_path: Path, family: str, with_linears: bool, use_rslora: bool, count: int
) -> None:
    model, tensors = made(family), dict[str, Tensor]()
    wanted = dict(changes(model, tensors, with_linears))
    assert len(wanted) == count, "stacks, and linears beside them"
    write(tmp_path, tensors, use_rslora=use_rslora)
    with torch.device("meta"):
        check_start(tmp_path, AutoModelForCausalLM.from_config(model.config))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    after = dict(load_adapter(model, tmp_path).merge_and_unload().named_parameters())
    scaling = ALPHA / (RANK**0.5 if use_rslora else RANK)
    for name, value in before.items():
        torch.testing.assert_close(after[name] - value, scaling * wanted[name] if name in wanted else 0 * value)
