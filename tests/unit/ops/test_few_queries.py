"""Attention of a few queries against its definition, where it is taken, and models that read on with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.harness.families import build, tiny_config
from toolkit.architecture import FEW_QUERIES, cache_name
from toolkit.ops import few_queries
from toolkit.ops.document_attention import per_document_attention
from toolkit.ops.few_queries import attend_to_few_together, attention_of_few

pytestmark = pytest.mark.filterwarnings("ignore")


def case(queries: int, shared: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Six heads, `shared` of keys; three sequences of 50 tokens."""
    generator = torch.Generator().manual_seed(queries)
    shapes = ((3, 6, queries, 16), (3, shared, 50, 16), (3, shared, 50, 24))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(groups, 1) for each in (key, value))
    scores = (query.double() @ key.mT * 0.3).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def left_to_others(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of the calls that transformers' function computes."""
    calls: list[int] = []

    def told(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(few_queries, "sdpa_attention_forward", told)
    return calls


@pytest.mark.parametrize(("queries", "kind"), [(1, "none"), (2, "bool"), (2, "added"), (5, "bool")])
@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_few_queries_are_attended_with_as_by_definition(
    queries: int, kind: str, shared: int, dtype: torch.dtype, left_to_others: list[int]
) -> None:
    tensors = case(queries, shared, dtype)
    seen = torch.ones(3, 1, queries, 50, dtype=torch.bool).tril(50 - queries)
    if kind != "none":
        seen[1, ..., :30] = False  # padding on the left
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    mask = {"none": None, "bool": seen, "added": added}[kind]
    module = nn.Module()
    module.num_key_value_groups = 6 // shared  # type: ignore[assignment]
    found, _ = attention_of_few(module, *tensors, mask, scaling=0.3)
    assert bool(left_to_others) == (queries == 1 and dtype == torch.float32)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), by_definition(*tensors, seen), rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "change",
    [{"grad": True}, {"dropout": 0.5}, {"position_bias": True}, {"queries": 17}, {"shared": 6}, {"heads": 6}],
    ids=str,
)
def test_other_cases_are_left_to_transformers(change: dict[str, Any], left_to_others: list[int]) -> None:
    queries, shared, heads = change.pop("queries", 2), change.pop("shared", 2), change.pop("heads", 1)
    module = nn.Module()
    module.num_key_value_groups = 6 // shared  # type: ignore[assignment]
    mask = torch.zeros(3, heads, queries, 50).bfloat16()
    if change.pop("position_bias", False):
        change["position_bias"] = torch.zeros(1, 6, queries, 50).bfloat16()
    with torch.set_grad_enabled(change.pop("grad", False)):
        attention_of_few(module, *case(queries, shared), mask, **change)
    assert left_to_others == [queries]


@torch.no_grad()
def read_on(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Logits after each piece of so many tokens, read on from a cache."""
    cache, found, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        given = {cache_name(): cache}
        if mask is not None:
            given |= {"attention_mask": mask[:, : start + size]}
            given |= {"position_ids": (mask.cumsum(1)[:, start : start + size] - 1).clamp(min=0)}
        found.append(model(input_ids=ids[:, start : start + size], use_cache=True, **given).logits[:, -1].float())
        start += size
    return torch.stack(found)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_model_reads_on_as_with_transformers_attention(
    family: str, is_padded: bool, left_to_others: list[int]
) -> None:
    model, sizes = build(tiny_config(family)).eval(), (19, 3, 1, 1)
    ids = torch.arange(3, 51).view(2, 24)
    mask = torch.ones_like(ids) if is_padded else None
    if mask is not None:
        mask[0, :7] = 0
    wanted = read_on(model, ids, mask, sizes)
    assert attend_to_few_together(model)
    found = read_on(model, ids, mask, sizes)
    layers = model.config.num_hidden_layers
    assert left_to_others == [19] * layers + [1] * 2 * layers
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    left_to_others.clear()
    with per_document_attention(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) as can:
        assert can
        assert read_on(model, ids, mask, sizes).equal(found), "in the middle of training"
    assert left_to_others == [19] * layers + [1] * 2 * layers
    assert model.config._attn_implementation == FEW_QUERIES
    left_to_others.clear()
    read_on(model.bfloat16(), ids, mask, sizes)
    assert left_to_others == [19] * layers + ([1] * 2 * layers if is_padded else [])
