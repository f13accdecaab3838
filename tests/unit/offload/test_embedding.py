"""The embedding table in host memory: the same numbers, and refused where it is more than rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.harness.families import build, tiny_config
from toolkit import load_recipe, make_plan
from toolkit.adapters import attach_lora
from toolkit.errors import RecipeError
from toolkit.offload.embedding import HostEmbedding, check_table, keep_on_host
from toolkit.ops import DEFAULT_BACKEND
from toolkit.plan import choose_device

ROOT = Path(__file__).resolve().parents[3]
IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))


def stepped(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_logits_and_gradients_are_the_same_to_the_bit(checkpoints: bool) -> None:
    found = []
    for is_on_host in (False, True):
        model = build(tiny_config("qwen3_moe"))
        model.requires_grad_(False)
        model.set_experts_implementation(DEFAULT_BACKEND)
        if is_on_host:
            keep_on_host(model, torch.device("cpu"))
        torch.manual_seed(0)
        adapted = attach_lora(model, r=2).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        if checkpoints:
            adapted.activation_checkpointing_enable()
            adapted.enable_input_require_grads()
        found.append(stepped(adapted))
    (logits, gradients), (others, other_gradients) = found
    assert torch.equal(logits, others)
    assert len(gradients) == len(other_gradients) > 10
    assert all(map(torch.equal, gradients, other_gradients))


def test_the_device_holds_one_number_and_state_dicts_the_table() -> None:
    model = build(tiny_config("mixtral"))
    wanted = model.get_input_embeddings().weight.detach().clone()
    keep_on_host(model, torch.device("cpu"))
    table = model.get_input_embeddings()
    assert isinstance(table, HostEmbedding)
    assert table.weight.shape == wanted.shape
    assert table.weight.untyped_storage().nbytes() == wanted.element_size()
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], wanted)
    assert torch.equal(table(IDS), wanted[IDS])


@pytest.mark.parametrize(("family", "words"), [("gemma4_text", "more than look rows up"), ("olmoe", "same table")])
def test_a_table_that_is_more_than_rows_is_refused(family: str, words: str) -> None:
    config = tiny_config(family)
    config.tie_word_embeddings = True
    with pytest.raises(RecipeError, match=rf"placement.embedding: .*{words}.*; set placement.embedding=device"):
        check_table(build(config))


def test_the_plan_has_its_bytes_less_and_offers_it() -> None:
    recipe, table = ROOT / "recipes/gpt-oss-20b.yaml", 201_088 * 2_880 * 2
    given = ["placement.experts=resident"]
    plans = [
        make_plan(load_recipe(recipe, [*given, f"placement.embedding={place}"]), device=choose_device("rtx-5090"))
        for place in ("device", "host")
    ]
    assert plans[0].bytes.total - plans[1].bytes.total == table
    small = make_plan(load_recipe(recipe, given), device=choose_device(memory="23GiB"))
    assert small.changes[0].what == "placement.embedding=host"
    assert small.changes[0].total == plans[1].bytes.total


def test_new_rows_cannot_be_trained_on_the_host() -> None:
    given = ["placement.embedding=host", 'model.new_tokens=["<a>"]']
    with pytest.raises(RecipeError, match=r"placement.embedding: model.new_tokens trains rows"):
        load_recipe(ROOT / "recipes/gpt-oss-20b.yaml", given)
