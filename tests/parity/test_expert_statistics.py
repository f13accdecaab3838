"""What the report says of experts against plain counting: the model's own router logits, and updates written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.parity.conftest import EMBEDDED
from toolkit.adapters import ParamWrapper, attach_lora
from toolkit.architecture import describe
from toolkit.evaluate import adapter_norms, expert_statistics, router_entropy
from toolkit.quant import load_int8

EXAMPLES = [[5, 9, 11, 40, 2], [7, 3], [8, 8, 30, 31, 32, 33, 60]]


def counted(model: PreTrainedModel, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads [L, E] and mean entropies [L] by stock transformers, one example at a time without padding."""
    logits = [model(torch.tensor([ids]), output_router_logits=True).router_logits for ids in EXAMPLES]
    layers = [torch.cat(parts).float() for parts in zip(*logits, strict=True)]
    loads = [layer.topk(top_k).indices.flatten().bincount(minlength=layer.shape[1]) for layer in layers]
    return torch.stack(loads), torch.stack([torch.distributions.Categorical(logits=x).entropy().mean() for x in layers])


@torch.no_grad()
def test_loads_and_entropies_are_those_of_the_routers(randomize: Callable[[nn.Module], None]) -> None:
    base, _ = load_int8(str(EMBEDDED), dtype=torch.float32, experts="none", linears="none")
    model = attach_lora(base, r=4, lora_alpha=8)
    randomize(model)
    found = expert_statistics(model, EXAMPLES)
    stock = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    loads, entropies = counted(stock, stock.config.num_experts_per_tok)
    assert [layer["before"] for layer in found["layers"]] == loads.tolist()
    for layer, entropy in zip(found["layers"], entropies, strict=True):
        assert layer["entropy_before"] == pytest.approx(float(entropy), rel=1e-4)
    loads, entropies = counted(model.get_base_model(), stock.config.num_experts_per_tok)
    assert [layer["after"] for layer in found["layers"]] == loads.tolist()
    assert [layer["after"] for layer in found["layers"]] != [layer["before"] for layer in found["layers"]]
    for layer, entropy in zip(found["layers"], entropies, strict=True):
        assert layer["entropy_after"] == pytest.approx(float(entropy), rel=1e-4)


@torch.no_grad()
def test_every_family_gives_its_loads_and_its_updates(checkpoint: Path, randomize: Callable[[nn.Module], None]) -> None:
    base, _ = load_int8(str(checkpoint), dtype=torch.float32)
    model = attach_lora(base, r=4, lora_alpha=8)
    randomize(model)
    found = expert_statistics(model, EXAMPLES)
    architecture, tokens = describe(base), sum(map(len, EXAMPLES))
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in architecture.layers]
    for layer in found["layers"]:
        assert sum(layer["before"]) == sum(layer["after"]) > 0
        assert sum(layer["before"]) % tokens == 0, "each token goes to as many experts as any other"
        assert 0 < layer["entropy_before"] < torch.tensor(float(layer["experts"])).log() + 1e-5
    norms = adapter_norms(base, architecture)
    for layer in architecture.layers:
        wrappers = [
            module
            for name, module in base.named_modules()
            if isinstance(module, ParamWrapper) and name.replace(".base_layer", "") == layer.name
        ]
        assert len(wrappers) == 2
        updates = [wrapper.get_delta_weight("default").flatten(1).norm(dim=1) for wrapper in wrappers]
        assert norms[layer.name] == pytest.approx(torch.stack(updates).norm(dim=0).tolist(), rel=1e-5)


def test_entropy_of_logits_of_shares_and_of_neither() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    wanted = float(torch.distributions.Categorical(logits=logits).entropy().sum())
    for output in (logits, logits.softmax(-1), (torch.zeros(2, 5), logits)):
        found = router_entropy(output, 3)
        assert found is not None
        assert float(found) == pytest.approx(wanted)
    masked = router_entropy(logits, 3, torch.tensor([False, True]))
    assert masked is not None
    assert float(masked) == pytest.approx(float(torch.tensor(3.0).log()))
    assert router_entropy(torch.zeros(2, 5), 3) is None
