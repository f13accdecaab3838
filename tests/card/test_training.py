"""A whole small job on the rehearsed card in bf16: losses near the CPU's, resumed to the same bits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.card.conftest import NANO
from tests.card.machine import ROOT, Machine, Outcome

Train = Callable[..., tuple[Outcome, Path]]


def losses(folder: Path) -> list[float]:
    """Of the steps, then of the held-out examples before and after."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    held_out = summary["results"]
    return [row["loss"] for row in rows if "loss" in row] + [held_out["base"]["loss"], held_out["adapted"]["loss"]]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def on_cpu(folder: Path, *overrides: str) -> Path:
    given = (f"training.output_dir={folder}", *NANO, *overrides)
    command = [sys.executable, "-m", "toolkit", "train", str(ROOT / "recipes" / "quickstart.yaml"), *given]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


KERNELS = {
    "int8": ["grouped_gemm_kernel"],
    "int4": ["four_bit_forward_kernel", "four_bit_gradient_kernel"],
    "mxfp4": ["four_bit_forward_kernel", "four_bit_gradient_kernel"],
}


@pytest.mark.parametrize("experts", KERNELS)
def test_losses_are_near_the_cpus(experts: str, train: Train, tmp_path: Path) -> None:
    given = ("training.learning_rate=3e-4", f"quantization.experts={experts}")
    outcome, folder = train("run", *given)
    outcome.require()
    assert outcome.report["counts"]["launches"] > 1000
    assert min(outcome.report["triton"][kernel] for kernel in KERNELS[experts]) > 20
    # bf16 has 8 bits, so numbers are rounded by up to 2^-9, inputs and results both. The rate is low, since Adam's
    # first steps go by a gradient's sign, which rounding turns where the gradient is small.
    wanted = losses(on_cpu(tmp_path / "cpu", *given))
    assert losses(folder) == pytest.approx(wanted, rel=2**-8)
    assert losses(folder) != wanted


def test_an_embedding_in_host_memory_changes_no_bit(train: Train, tmp_path: Path) -> None:
    model, adapters, peaks = untied(tmp_path / "untied"), [], []
    for place in ("device", "host"):
        outcome, folder = train(place, f"model.model_name_or_path={model}", f"placement.embedding={place}")
        outcome.require()
        adapters.append(adapter(folder))
        peaks.append(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["memory"]["measured"])
    assert adapters[0] == adapters[1]
    table = load_file(model / "model.safetensors")["lm_head.weight"]
    assert peaks[0] - peaks[1] >= 0.9 * table.numel() * 2, peaks


def untied(folder: Path) -> Path:
    """The embedded model with a table of its own in its head."""
    shutil.copytree(ROOT / "recipes/quickstart/nano-qwen3moe-2m", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    return folder


def test_a_resumed_run_is_the_same_run(train: Train) -> None:
    dropout = ("lora.experts=false", "lora.router=false", "lora.lora_dropout=0.2")
    given = (*dropout, "training.optim=paged_adamw_8bit", "training.save_steps=2", "training.max_steps=4")
    outcome, folder = train("run", *given)
    outcome.require()
    whole = adapter(folder)
    for left in ("checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(folder / left)
    (folder / "summary.json").unlink()
    again, _ = train("run", *given)
    assert "resuming from checkpoint-2" in again.require().err
    assert adapter(folder) == whole


def test_kernels_compile_for_the_card_that_is_rehearsed(machine: Machine, tmp_path: Path) -> None:
    program = """
import torch, triton
from tests.card import kernels, replay
replay.install(); kernels.install()
from toolkit.ops.triton.launch import Product, fused
from toolkit.ops.triton.tiles import Tile
x = torch.ones(8, 64, device="cuda", dtype=torch.bfloat16)
w = torch.ones(2, 32, 64, device="cuda", dtype=torch.int8)
offset = torch.tensor([0, 3, 8], device="cuda", dtype=torch.int32)
product = Product(x, w, offset, None, torch.bfloat16)
print(fused(product).float().unique().tolist())
try:
    fused(product, Tile(256, 128, 256, stages=4))
except triton.runtime.errors.OutOfResources as error:
    print("refused", error.limit)
"""
    done = machine.with_card(compile=1).python("-c", program)
    assert done.stdout.splitlines() == ["[64.0]", f"refused {99 << 10}"], done.stderr


def test_the_interpreter_runs_the_kernels_on_the_cards_memory(machine: Machine) -> None:
    program = """
import torch
from tests.card import kernels, replay
replay.install(); kernels.install()
from toolkit.ops.triton.launch import Product, fused
x = torch.randn(8, 64, device="cuda")
w = torch.randint(-5, 5, (2, 32, 64), device="cuda", dtype=torch.int8)
offset = torch.tensor([0, 3, 8], device="cuda", dtype=torch.int32)
found, rows, stacks = fused(Product(x, w, offset, None, torch.float32)).cpu(), x.cpu(), w.cpu().float()
wanted = torch.cat([rows[:3] @ stacks[0].t(), rows[3:] @ stacks[1].t()])
torch.testing.assert_close(found, wanted)
print(sum(kernels.launches.values()))
"""
    for interpreted, replayed in (("1", "0"), ("0", "1")):
        done = machine.python("-c", program, more={"TRITON_INTERPRET": interpreted})
        assert done.stdout.split() == [replayed], done.stderr


def test_whole_logits_are_counted_on_the_card(machine: Machine) -> None:
    """As where TRL's fused head does not compute what a family does."""
    program = """
import torch
from types import SimpleNamespace
from accelerate import Accelerator
from tests.card import replay
replay.install()
from toolkit.training.trainer import AdapterTrainer
logits, labels, told = 9 * torch.eye(4), torch.tensor([0, 1, 2, 0]), {"entropy": [], "mean_token_accuracy": []}
AdapterTrainer._count_hits(SimpleNamespace(accelerator=Accelerator()), logits.cuda(), labels.cuda(), told)
print(told["mean_token_accuracy"])
"""
    done = machine.python("-c", program)
    assert done.stdout == "[0.75]\n", done.stderr
