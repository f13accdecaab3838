"""The trainer on every family: the loss falls, every adapter moves, checkpointing and resuming change no bit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer, set_seed

from tests.parity.conftest import EMBEDDED
from toolkit.adapters import adapter_coverage, attach_lora
from toolkit.quant import load_int8
from toolkit.recipe import TrainingSection
from toolkit.training import RunContext, TrainResult, train_adapter
from toolkit.training.trainer import AdapterTrainer

ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "max_length": 96,
    "warmup_steps": 0,
    "use_cpu": True,
}


def rows(count: int = 12, *, masked: bool = False) -> Dataset:
    """Counting sequences of several lengths: easy to learn, so that the loss must fall; or only their ends labelled."""
    sequences = [[3 + (start + step) % 90 for step in range(20 + start % 5)] for start in range(count)]
    labels = [[-100] * (8 + start % 9) + row[8 + start % 9 :] for start, row in enumerate(sequences)]
    return Dataset.from_dict({"input_ids": sequences, "labels": labels if masked else sequences})


def train_adapted(adapted: PeftModel, folder: Path, data: Dataset, *held_out: Dataset, **changes: Any) -> TrainResult:
    """The trainer on an adapted model, as a recipe with `ARGUMENTS` and these changes; some go to the trainer."""
    names = ("head", "head_stage", "probes", "micro_batches_per_pass")
    given = {name: changes.pop(name) for name in names if name in changes}
    arguments = TrainingSection(**{**ARGUMENTS, **changes}).model_dump(exclude={"output_dir"})
    return train_adapter(
        adapted,
        AutoTokenizer.from_pretrained(EMBEDDED),
        data,
        *(held_out or (None,)),
        RunContext(
            folder=folder / "checkpoints",
            metrics=folder / "metrics.jsonl",
            arguments={**arguments, "report_to": []},
            device="cpu",
            dtype="float32",
            train_router=True,
            console=Console(file=io.StringIO()),
            **given,
        ),
    )


def train(
    checkpoint: Path, folder: Path, *, masked: bool = False, **changes: Any
) -> tuple[TrainResult, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Train a fresh adapter; gives the result, the adapter's tensors and the logged metrics."""
    model, _ = load_int8(str(checkpoint))
    set_seed(0)
    adapted = attach_lora(model, r=2)
    result = train_adapted(adapted, folder, rows(masked=masked), rows(4, masked=masked), **changes)
    coverage = adapter_coverage(adapted)
    assert coverage.moved == coverage.adapters
    tensors = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return result, tensors, [json.loads(line) for line in lines]


def test_the_loss_falls_and_every_adapter_moves(checkpoint: Path, tmp_path: Path) -> None:
    result, _, metrics = train(checkpoint, tmp_path, max_steps=6)
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    assert result.steps == len(losses) == 6
    assert losses[-1] < losses[0]
    assert all("grad_norm" in entry and entry["memory_bytes"] > 0 for entry in metrics if "loss" in entry)


def test_trying_the_longest_batch_first_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, metrics and the adapter are the same to the last bit, packed or padded, over several micro-batches."""
    tried: list[int] = []
    probe = AdapterTrainer._probe
    monkeypatch.setattr(AdapterTrainer, "_probe", lambda self, *given: (tried.append(1), probe(self, *given))[1])
    for packing in (True, False):
        changes = {"packing": packing, "max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
        runs = [train(EMBEDDED, tmp_path / f"{packing}{probes}", probes=probes, **changes) for probes in (True, False)]
        assert len(tried) == 1
        tried.clear()
        (_, adapter, metrics), (_, other, others) = runs
        assert all(torch.equal(tensor, other[name]) for name, tensor in adapter.items())
        timed = {"memory_bytes", "tokens_per_second"}
        told = [{key: value for key, value in entry.items() if key not in timed and "runtime" not in key
                 and "per_second" not in key} for entry in (*metrics, *others)]  # fmt: skip
        assert told[: len(metrics)] == told[len(metrics) :]


def test_recomputing_activations_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    kept = train(checkpoint, tmp_path / "kept", gradient_checkpointing=False)[1]
    again = train(checkpoint, tmp_path / "again", gradient_checkpointing=True)[1]
    for name, tensor in kept.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpoint", ["qwen3_moe"], indirect=True)
def test_accumulation_is_normalised_by_tokens(checkpoint: Path, tmp_path: Path) -> None:
    together = {"packing": False, "per_device_train_batch_size": 4, "router_aux_loss_coef": 0.0, "max_steps": 2}
    apart = {**together, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole, parts = (train(checkpoint, tmp_path / name, **how)[1] for name, how in (("a", together), ("b", apart)))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("packing", "on_card"), [(True, False), (False, False), (True, True)])
def test_the_loss_of_labelled_positions_is_trls(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool, on_card: bool
) -> None:
    """Loss, load-balancing loss, gradient norm and metrics, with prompts masked and several sequences a batch."""
    how = {"packing": packing, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    called = []
    with monkeypatch.context() as ways:
        if on_card:  # the way that waits for nothing, on this CPU
            ways.setattr(AdapterTrainer, "_would_wait", staticmethod(lambda tensor: True))
            ways.setattr(AdapterTrainer, "_pays_to_keep_logits", lambda self, labels: False)
        ours = train(checkpoint, tmp_path / "ours", masked=True, **how)[2]
    monkeypatch.setattr(AdapterTrainer, "_pays_to_keep_logits", lambda self, labels: called.append(1))
    theirs = train(checkpoint, tmp_path / "theirs", masked=True, **how)[2]
    assert called
    assert len(ours) == len(theirs)
    for entry, wanted in zip(ours, theirs, strict=True):
        assert entry.keys() == wanted.keys()
        for key in entry.keys() - {"memory_bytes", "tokens_per_second", "total_flos"}:
            if not key.endswith(("runtime", "per_second")):
                assert entry[key] == pytest.approx(wanted[key], rel=2e-4, abs=1e-5), key
