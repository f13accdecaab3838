"""Streamed experts compute what resident ones do, to the last bit: losses, adapters, gradients, state dicts, text."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, set_seed

from tests.parity.conftest import EMBEDDED
from tests.parity.test_training import ARGUMENTS, rows
from toolkit.adapters import attach_lora
from toolkit.architecture import describe
from toolkit.offload import int8_folder, load_streamed, stream_of
from toolkit.plan.place import spread
from toolkit.quant import load_int8
from toolkit.recipe import TrainingSection
from toolkit.training import train_adapter

IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))


def load(checkpoint: Path, cache: Path | None, share: float = 1.0, **options: Any) -> nn.Module:
    """Resident without a cache folder, else with this share of its MoE layers streamed."""
    if cache is None:
        return load_int8(str(checkpoint), **options)[0]
    layers = describe(load_int8(str(checkpoint))[0]).layers
    placement = spread({layer.name: 1 for layer in layers}, round(share * len(layers)), "disk")
    return load_streamed(str(checkpoint), placement, cache=cache, **options)[0]


def train(model: nn.Module, folder: Path, **changes: Any) -> tuple[PeftModel, list[float], dict[str, torch.Tensor]]:
    """A fresh adapter on it; gives losses of every step and the adapter."""
    set_seed(0)
    adapted = attach_lora(model, r=2)  # type: ignore[arg-type]
    arguments = TrainingSection(**{**ARGUMENTS, **changes}).model_dump(exclude={"output_dir"})
    losses: list[float] = []
    result = train_adapter(
        adapted,
        AutoTokenizer.from_pretrained(EMBEDDED),
        rows(),
        None,
        folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        arguments={**arguments, "report_to": []},
        device="cpu",
        dtype="float32",
        train_router=True,
        console=Console(file=io.StringIO()),
    )
    losses.append(result.loss)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return adapted, [result.loss, *lines_of_losses(lines)], {n: p for n, p in adapted.named_parameters() if "lora_" in n}


def lines_of_losses(lines: list[str]) -> list[float]:
    import json

    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_is_the_same_to_the_last_bit(checkpoint: Path, tmp_path: Path, checkpointing: bool) -> None:
    changes: dict[str, Any] = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 3, "packing": False}
    _, losses, adapter = train(load(checkpoint, None), tmp_path / "resident", **changes)
    streamed = load(checkpoint, tmp_path / "cache")
    _, streamed_losses, streamed_adapter = train(streamed, tmp_path / "streamed", **changes)
    assert losses == streamed_losses
    for name, tensor in adapter.items():
        assert torch.equal(tensor, streamed_adapter[name]), name
