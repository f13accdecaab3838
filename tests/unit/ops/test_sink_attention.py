"""Attention with sinks against its definition: a softmax over the keys' logits and the head's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.harness.families import build, tiny_config
from toolkit.ops.sink_attention import SINKS, attend_with_sinks, attention_with_sinks
from toolkit.plan.skeletons import shape_of

pytestmark = pytest.mark.filterwarnings("ignore")


def by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    weights = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:-1], 1)), -1).softmax(-1)
    return (weights[..., :-1] @ value).transpose(1, 2)


def case(queries: int, keys: int, wide: int = 12) -> list[torch.Tensor]:
    """Two sequences, six heads, two of keys; a sink decides half of a row or more."""
    generator = torch.Generator().manual_seed(queries)
    shapes = ((2, 6, queries, 12), (2, 2, keys, 12), (2, 2, keys, wide), (6,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("wide", [12, 5, 20])
def test_values_and_gradients_are_those_of_the_definition(queries: int, kind: str, wide: int) -> None:
    tensors, scale = case(queries, 40, wide), 0.3
    seen = torch.ones(1, 1, queries, 40, dtype=torch.bool).tril(40 - queries)
    if kind != "none":
        seen &= ~torch.ones_like(seen).tril(40 - queries - 9)  # a window
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)
    mask = {"none": None, "bool": seen, "added": added}[kind]
    found, _ = attention_with_sinks(nn.Module(), *tensors[:3], mask, s_aux=tensors[3], scaling=scale, dropout=0.0)
    wanted = by_definition(*tensors[:3], seen, tensors[3], scale)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # fp32 where there are few queries
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * direction).sum(), tensors) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "mimo_v2_flash"])
def test_a_model_answers_as_with_its_own_function(family: str) -> None:
    model = build(tiny_config(family)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter, std=2.0)
    ids = torch.arange(3, 43)[None]
    documents = {"position_ids": torch.cat((torch.arange(15), torch.arange(25)))[None], "use_cache": False}
    with torch.no_grad():
        plain, packed = model(ids).logits, model(ids, **documents).logits
        assert attend_with_sinks(model)
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids, **documents).logits, packed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, packed, atol=0.1)


@pytest.mark.parametrize("family", ["deepseek_v4", "qwen3_moe"])
def test_who_has_masks_of_its_own_or_no_sinks_stays_as_it_is(family: str) -> None:
    model = build(tiny_config(family))
    before = model.config._attn_implementation
    assert not attend_with_sinks(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("asked", "what"), [("auto", SINKS), ("eager", "eager")])
def test_a_plan_counts_what_the_run_will_compute(asked: str, what: str) -> None:
    assert shape_of("openai/gpt-oss-20b", attn_implementation=asked).config._attn_implementation == what
