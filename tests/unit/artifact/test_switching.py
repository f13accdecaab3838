"""Several adapters on one base: each gives its own numbers, and the base is neither loaded again nor copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.artifact.conftest import BASE, stock_adapter
from toolkit.adapters import add_adapter, load_adapter
from toolkit.quant import load_int8

# PEFT looks for a pattern's keys among modules only; those of parameters do apply.
pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
IDS = torch.tensor([[1, 5, 9, 200, 33, 7, 64, 128]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def test_switching_gives_each_adapters_own_numbers_on_the_same_base(
    write: Callable[..., Path], artifact: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other", model=stock_adapter(rank_pattern={"mlp.experts.down_proj": 6, "q_proj": 2}))
    alone = [logits(load_adapter(load_int8(str(BASE))[0], folder)) for folder in (artifact, other)]
    base, _ = load_int8(str(BASE))
    plain = logits(base)
    places = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    model = load_adapter(base, artifact)
    add_adapter(model, other, "other")
    for name, wanted in (("default", alone[0]), ("other", alone[1]), ("default", alone[0])):
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted)
    assert (alone[0] - alone[1]).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    after = {name.replace(".base_layer", ""): parameter.data_ptr()
             for name, parameter in model.get_base_model().named_parameters() if "lora_" not in name}  # fmt: skip
    assert after == places
