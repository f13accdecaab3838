#!/usr/bin/env python3
"""Peak anonymous memory and time of loading a large checkpoint into int8, against its bounds and against the disk.

    .venv/bin/python scripts/benchmarks/load.py FOLDER [--gigabytes 4.5] [--experts 64] [--json]

Makes once, in FOLDER, a sharded checkpoint of random bf16 weights with a key for each expert, and its int8 form with
`onecard quantize`; loads both in processes of their own with glibc's defaults while /proc/PID/status is sampled. The
page cache of the files is dropped first (posix_fadvise), for the load and for the plain read it is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging
from turns import anonymous, most_anonymous

from toolkit.ops.int8 import quantize
from toolkit.quant import load_int8, quantize_checkpoint

HIDDEN, INTERMEDIATE, SHARD = 1024, 512, 1 << 30
CHILD = "--child"
DTYPES = ("bfloat16", "float32")
FREE = 300 * 10**6


def config(gigabytes: float, experts: int) -> PretrainedConfig:
    """Enough layers of a common shape to fill this many GB in bf16."""
    layer = 2 * (3 * experts * HIDDEN * INTERMEDIATE + 4 * HIDDEN**2)
    return AutoConfig.for_model(
        "qwen3_moe", vocab_size=32000, hidden_size=HIDDEN, intermediate_size=2048, moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=round(gigabytes * 1e9 / layer), num_attention_heads=16, num_key_value_heads=16, head_dim=64,
        num_experts=experts, num_experts_per_tok=4, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def skeleton(settings: PretrainedConfig) -> PreTrainedModel:
    """Names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Size]]:
    """Checkpoint keys and shapes, experts one by one."""
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            yield name, parameter.shape
            continue
        parts, prefix = (["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]), name.rpartition(".")[0]
        rows = parameter.shape[1] // len(parts)
        for expert in range(parameter.shape[0]):
            for part in parts:
                yield f"{prefix}.{expert}.{part}.weight", torch.Size((rows, parameter.shape[2]))


def make(folder: Path, settings: PretrainedConfig) -> None:
    """Write the shards, then the index and the config: a folder with a config is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: dict[str, int] = {}
    size = 0
    for name, shape in tensors(skeleton(settings)):
        shards[-1][name] = torch.empty(shape).normal_(std=0.02).bfloat16()
        names[name] = len(shards)
        size += 2 * shape.numel()
        if size > SHARD:
            save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards[-1] = {}
            shards.append({})
            size = 0
    save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f"part-{number}.safetensors" for name, number in names.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings.save_pretrained(folder)


def files(folder: Path) -> list[Path]:
    """The weights."""
    return sorted(folder.glob("*.safetensors"))


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, which needs no privilege."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_seconds(folder: Path, cold: bool) -> float:
    """A plain read of every byte, as `cat FILES > /dev/null`."""
    if cold:
        drop_cache(folder)
    started, buffer = time.perf_counter(), bytearray(8 << 20)
    for path in files(folder):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def child(folder: str, goal: str) -> None:
    """Do one thing once; the parent watches."""
    logging.disable_progress_bar()
    before, started, cpu = anonymous("self"), time.perf_counter(), time.process_time()
    if goal in DTYPES:
        size = load_int8(folder, dtype=getattr(torch, goal))[1].model_bytes
    else:
        size = quantize_checkpoint(folder, goal).bytes
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({"before": before, "bytes": size, **spent}))


def watched(folder: Path, goal: str, cold: bool) -> dict[str, Any]:
    """In a process of its own, load in a dtype or write the int8 form to a folder: peak RssAnon, seconds, bytes."""
    if cold:
        drop_cache(folder)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, __file__, CHILD, str(folder), goal]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with most_anonymous(process.pid) as most, process:
        said = process.stdout.read()
    return {**json.loads(said), "peak": most[0]}


def quantizing_speed(rows: int, columns: int, seconds: float = 2.0) -> float:
    """bf16 bytes a second through `quantize` on one core, fresh experts each time."""
    experts = torch.randn(32, rows, columns).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds:
        quantize(experts)
        done += experts.nbytes
    torch.set_num_threads(threads)
    return done / spent


def measure(folder: Path, settings: PretrainedConfig) -> dict[str, Any]:
    """Every figure, in bytes and seconds."""
    layer = 2 * sum(p.numel() for n, p in skeleton(settings).named_parameters() if ".layers.0." in n)
    stored = folder.with_name(f"{folder.name}-int8")
    figures: dict[str, Any] = {"layer_bytes": layer}
    if not stored.exists():
        figures["quantize"] = {**watched(folder, str(stored), True), "bound": 2 * layer + FREE}
    for name, place in (("bf16", folder), ("int8", stored)):
        figures[f"{name}_file_bytes"] = sum(path.stat().st_size for path in files(place))
        for cold in (True, False):
            state = "cold" if cold else "warm"
            figures[f"{name}_read_{state}"] = read_seconds(place, cold)
            for dtype in DTYPES:
                result = watched(place, dtype, cold)
                figures[f"{name}_load_{dtype}_{state}"] = {**result, "bound": result["bytes"] + 2 * layer + FREE}
    figures["quantize_bytes_per_second"] = quantizing_speed(2 * INTERMEDIATE, HIDDEN)
    return figures


def show(figures: dict[str, Any]) -> None:
    """A table for people."""
    speed, whole = figures["quantize_bytes_per_second"], figures["bf16_file_bytes"]
    print(f"a layer {figures['layer_bytes'] / 1e6:.0f} MB; one core rounds {speed / 1e9:.2f} GB/s of bf16: "
          f"{whole / speed:.1f} s for {whole / 1e9:.2f} GB")  # fmt: skip
    for name, value in figures.items():
        size = figures[f"{name[:4]}_file_bytes"] if "_read_" in name else 0
        if size:
            print(f"{name:24} {value:5.1f} s, {size / value / 1e9:.2f} GB/s of {size / 1e9:.2f} GB")
        elif isinstance(value, dict):
            verdict = "within" if value["peak"] <= value["bound"] else "ABOVE"
            print(f"{name:24} {value['seconds']:5.1f} s ({value['cpu_seconds']:.1f} s of CPU), result "
                  f"{value['bytes'] / 1e6:.0f} MB, RssAnon {value['before'] / 1e6:.0f} -> {value['peak'] / 1e6:.0f} "
                  f"MB at most, {verdict} the bound {value['bound'] / 1e6:.0f} MB")  # fmt: skip


def show_bounds(figures: dict[str, Any]) -> None:
    """Which of disk and core a load of the bf16 files cannot beat, and how near to it the load comes."""
    core = figures["bf16_file_bytes"] / figures["quantize_bytes_per_second"]
    for state in ("cold", "warm"):
        read = figures[f"bf16_read_{state}"]
        bound = max(read, core)
        for dtype in DTYPES:
            taken = figures[f"bf16_load_{dtype}_{state}"]["seconds"]
            print(f"{state} load to {dtype}: {taken:.1f} s = {taken / read:.2f} × reading the files ({read:.1f} s), "
                  f"{taken / core:.2f} × rounding them on one core ({core:.1f} s); bound by the "
                  f"{'disk' if read > core else 'core'}, {bound / taken:.0%} of its speed; one after the other "
                  f"{read + core:.1f} s")  # fmt: skip


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.5)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    settings = config(wanted.gigabytes, wanted.experts)
    if not (wanted.folder / "config.json").is_file():
        make(wanted.folder, settings)
    figures = measure(wanted.folder, settings)
    if wanted.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)
        show_bounds(figures)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(*sys.argv[2:4])
    else:
        main()
