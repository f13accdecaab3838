"""Rows of small experts in blocks of equal height: each row once, hardly any padding, and whose it is."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from toolkit.ops import LoraFactors, per_expert, reference
from toolkit.ops.equal_rows import EqualBlock, EqualRouting
from toolkit.ops.experts import ExpertStack, ExpertWeights
from toolkit.ops.int8 import quantize
from toolkit.ops.small_experts import experts_at_a_time

COUNTS = [
    [1],
    [0, 3, 0, 1],
    [5] * 13,
    [1100, 0],
    [900, *[22, 19, 31, 25] * 10],
    [700, 680, 810, 760, 900, 500, 1200, 450],
    [5000, 10, 3],
]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("most_experts", [3, 100])
def test_blocks_have_each_row_once_and_hardly_any_padding(counts: list[int], most_experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = chosen[torch.randperm(len(chosen), generator=generator)].unsqueeze(1)
    routing, tokens = EqualRouting(index, len(counts), most_experts), torch.arange(len(chosen)).unsqueeze(1)
    expert_S, token_S, done = routing.sort(index), routing.sort(tokens), 0
    assert torch.equal(token_S.sort().values, tokens.flatten())
    assert torch.equal(index.flatten()[token_S], expert_S)
    for block in routing.blocks:
        assert isinstance(block, EqualBlock)
        assert block.rows.start == done
        done = block.rows.stop
        experts_G = routing.experts[block.experts]
        height = len(block.token) // len(experts_G)
        assert torch.equal(block.strip(block.token), token_S[block.rows])
        assert torch.equal(block.strip(experts_G.repeat_interleave(height)), expert_S[block.rows])
        assert block.batch(block.token.unsqueeze(1)).shape == (len(experts_G), height, 1)
        assert len(block.token) <= 4096 + 4 * len(counts)
    assert done == len(chosen)
    assert sum(len(block.token) for block in routing.blocks) <= 1.3 * done + 4 * len(counts)
    assert torch.equal(routing.unsort(token_S, tokens), tokens)


def test_rows_that_no_expert_here_computes_are_in_no_block() -> None:
    index = torch.tensor([[0, 9], [9, 1], [1, 0], [9, 9]])
    routing = EqualRouting(index, 2, 8)
    assert sum(block.rows.stop - block.rows.start for block in routing.blocks) == 4
    assert sorted(routing.sort(index).tolist()) == [0, 0, 1, 1, 9, 9, 9, 9]
    assert EqualRouting(torch.full((3, 1), 9), 2, 8).blocks == []


def test_small_experts_are_multiplied_together_and_large_ones_one_by_one() -> None:
    def stack(experts: int, outputs: int, inputs: int) -> ExpertStack:
        return ExpertStack(torch.empty(experts, outputs, inputs, device="meta"), None, None, False)

    small, large = stack(8, 256, 128), stack(8, 1024, 512)
    with patch.object(torch.Tensor, "device", torch.device("cpu")):
        assert experts_at_a_time((small, small), 2048, torch.float32) == 64
        assert experts_at_a_time((small, small), 8, torch.float32) == 0, "so few rows are not worth all experts"
        assert experts_at_a_time((small, large), 2048, torch.float32) == 0
        assert experts_at_a_time((large, large), 2048, torch.bfloat16) == 4
    assert experts_at_a_time((small, small), 2048, torch.float32) == 0, "a device that is no CPU"


@pytest.mark.parametrize("tokens", [1, 8, 16, 40])
def test_bf16_rows_meet_factors_in_fp32_however_few_they_are(tokens: int) -> None:
    """One by one or together: frozen factors stay in fp32, and only a few rows are multiplied so."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    up, down = (quantize(random(4, *sides) / 8) for sides in ((64, 32), (32, 32)))
    weights = ExpertWeights(
        ExpertStack(*up, None, False), ExpertStack(*down, None, False), lambda y: y[..., :32] * y[..., 32:].sigmoid()
    )
    factors = [LoraFactors(random(4, 2, 32), random(4, out, 2) / 4, 0.5) for out in (64, 32)]
    x, weight = random(tokens, 32).bfloat16(), torch.full((tokens, 2), 0.5)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    with torch.no_grad():
        found = per_expert.expert_layer(x, index, weight, weights, *factors)
        wanted = reference.expert_layer(x.double(), index, weight, weights, *factors)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
