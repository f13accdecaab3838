"""Streamed experts compute what resident ones do, to the last bit: losses, adapters, gradients, state dicts, text."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from tests.parity.conftest import COMMON, EMBEDDED
from tests.parity.test_training import rows, train_adapted
from toolkit.adapters import attach_lora
from toolkit.architecture import describe
from toolkit.errors import DivergedError, RecipeError
from toolkit.offload.attach import load_streamed, stream_of
from toolkit.offload.cache import int8_folder
from toolkit.offload.place import spread
from toolkit.quant import dequantize_state, load_int8
from toolkit.training.layer_major import LayerMajor

IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))


def load(checkpoint: Path, cache: Path | None, share: float = 1.0, **options: Any) -> nn.Module:
    """Resident without a cache folder, else with this share of its MoE layers streamed."""
    if cache is None:
        return load_int8(str(checkpoint), **options)[0]
    layers = describe(load_int8(str(checkpoint))[0]).layers
    placement = spread({layer.name: 1 for layer in layers}, round(share * len(layers)), "disk")
    return load_streamed(str(checkpoint), placement, cache=cache, **options)[0]


def train(model: nn.Module, folder: Path, **changes: Any) -> tuple[PeftModel, list[float], dict[str, torch.Tensor]]:
    """A fresh adapter on it; gives the adapted model, the losses of every step and the adapter."""
    set_seed(0)
    adapted = attach_lora(model, r=2)  # type: ignore[arg-type]
    result = train_adapted(adapted, folder, rows(), **changes)
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [result.loss, *(entry["loss"] for entry in entries if "loss" in entry)]
    return adapted, losses, {name: p for name, p in adapted.named_parameters() if "lora_" in name}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_training_is_the_same_to_the_last_bit(checkpoint: Path, tmp_path: Path) -> None:
    """Three micro-batches a step: layer-major when streamed, one after the other when resident."""
    changes: dict[str, Any] = {"gradient_accumulation_steps": 3, "packing": False, "max_steps": 2}
    _, losses, adapter = train(load(checkpoint, None), tmp_path / "resident", **changes)
    streamed, streamed_losses, streamed_adapter = train(load(checkpoint, tmp_path), tmp_path / "streamed", **changes)
    assert stream_of(streamed) is not None
    assert losses == streamed_losses
    assert_same_bits(adapter, streamed_adapter)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": False}, {"share": 0.5}], ids=str)
def test_other_ways_to_train_are_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"gradient_accumulation_steps": 2, "max_steps": 2, "max_length": 32, **changes}
    share = changes.pop("share", 1.0)
    _, losses, adapter = train(load(EMBEDDED, None), tmp_path / "resident", **changes)
    model = load(EMBEDDED, tmp_path, share)
    streamed, streamed_losses, streamed_adapter = train(model, tmp_path / "streamed", **changes)
    stream = stream_of(streamed)
    assert stream is not None
    assert len(stream.layers) == round(share * len(describe(model).layers))
    assert losses == streamed_losses
    assert_same_bits(adapter, streamed_adapter)


def test_traffic_is_two_passes_a_step_however_many_micro_batches(tmp_path: Path) -> None:
    layers = 6
    checkpoint = deep_checkpoint(tmp_path / "deep", layers)
    moved, adapters = [], []
    for micro_batches, per_pass in ((2, None), (4, None), (4, 2)):
        folder = tmp_path / f"{micro_batches} {per_pass}"
        changes = {"gradient_accumulation_steps": micro_batches, "packing": False, "max_steps": 3}
        adapted, _, adapter = train(load(checkpoint, tmp_path), folder, **changes, micro_batches_per_pass=per_pass)
        adapters.append(adapter)
        stream = stream_of(adapted)
        assert stream is not None
        moved.append(stream.traffic.layers)
    # Up once and down once, less what is in the two slots at either turn; before the first step once more for the
    # probe, and twice up to see whose logits TRL's head computes.
    looks = 2 * layers
    assert moved[0] == moved[1] <= (3 + 1) * (2 * layers - 2) + looks
    # Two at a time: two passes each way, and the same bits.
    assert moved[1] < moved[2] <= (2 * 3 + 1) * (2 * layers - 2) + looks
    assert_same_bits(adapters[1], adapters[2])


def deep_checkpoint(folder: Path, layers: int) -> Path:
    """More layers than slots."""
    config = CONFIG_MAPPING["olmoe"](**{**COMMON, "num_hidden_layers": layers, "num_experts": 4})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_failing_micro_batch_stops_the_others(tmp_path: Path) -> None:
    model = load(deep_checkpoint(tmp_path / "deep", 3), tmp_path)
    stream = stream_of(model)
    assert stream is not None
    reached = []

    def task(number: int) -> None:
        with torch.no_grad():
            model(IDS)
        reached.append(number)
        if number == 1:
            raise DivergedError("the loss is nan")

    with pytest.raises(DivergedError, match="the loss is nan"):
        LayerMajor(stream).run([partial(task, number) for number in range(3)])
    assert reached == [0, 1]
    assert stream.gate is None
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_the_model_is_whole_to_everybody_else(tmp_path: Path) -> None:
    """Its state dict, a saved copy, its logits and what it writes; a bfloat16 checkpoint was quantised first."""
    checkpoint = deep_checkpoint(tmp_path / "deep", 4)
    resident, streamed = load(checkpoint, None), load(checkpoint, tmp_path / "cache")
    assert_same_bits(resident.state_dict(), streamed.state_dict())
    assert_same_bits(dequantize_state(resident), dequantize_state(streamed))
    streamed.save_pretrained(tmp_path / "saved")
    assert_same_bits(resident.state_dict(), load_int8(str(tmp_path / "saved"))[0].state_dict())
    # For one token BLAS's bits depend on where the head lies in memory, so both are mapped from the same file there.
    resident = load_int8(str(int8_folder(str(checkpoint), dtype=torch.float32, root=tmp_path / "cache")))[0]
    for ids in (IDS, IDS[:1, :1]):  # all experts are read, or only the few that are hit
        with torch.no_grad():
            assert torch.equal(resident(ids).logits, streamed(ids).logits)
    written = [model.generate(IDS[:, :5], max_new_tokens=8, do_sample=False) for model in (resident, streamed)]
    assert torch.equal(*written)


def test_decoding_reads_only_the_experts_that_are_hit(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["olmoe"](**{**COMMON, "num_hidden_layers": 3, "num_experts": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    streamed = load(tmp_path / "wide", tmp_path)
    stream = stream_of(streamed)
    assert stream is not None
    with torch.no_grad():
        streamed(IDS[:1, :1])
    expert = 3 * COMMON["hidden_size"] * COMMON["intermediate_size"]
    assert stream.traffic.bytes == 3 * COMMON["num_experts_per_tok"] * expert


def test_streaming_wants_int8_throughout(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set quantization\.linears=int8, not none"):
        load_streamed(str(EMBEDDED), {}, linears="none", cache=tmp_path)


def test_nothing_to_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no layer is streamed"):
        load_streamed(str(EMBEDDED), {"model.layers.0.mlp": "resident"}, cache=tmp_path)
    assert not list(tmp_path.iterdir())
