#!/usr/bin/env python3
"""Peak anonymous memory and time of loading a checkpoint of packed int4 into int8, against the same model in bf16.

    .venv/bin/python scripts/benchmarks/load_formats.py FOLDER [--gigabytes 1] [--experts 64] [--alone] [--json]

Makes once, in FOLDER, a Qwen3-MoE of random int4 codes as compressed-tensors packs them (groups of 128, one tensor a
projection and expert), so many GB of it, and one of random bf16 weights with the same shapes. Loads each in a process
of its own, as `load.py` does, and `--alone` the first one only. Beside it: reading the files' bytes, and one core's
unpacking and rounding; which of them binds, and processor time beside the clock's, which others on the machine stretch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from load import (
    HIDDEN,
    INTERMEDIATE,
    config,
    files,
    make,
    quantizing_speed,
    read_seconds,
    skeleton,
    tensors,
    watched,
)
from safetensors.torch import save_file
from transformers import PretrainedConfig

from toolkit.checkpoint.conversion import Shards
from toolkit.checkpoint.files import declared_format
from toolkit.quant.load import read_config

GROUP = 128
BITS_OF_BF16 = 16 / (4 + 16 / GROUP)
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
DECLARED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def make_int4(folder: Path, settings: PretrainedConfig) -> None:
    """One file a layer: a linear in parts, everything else in bf16. A folder with a config is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    last = ""
    for name, shape in tensors(skeleton(settings)):
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        if layer != last and last in shards:
            _write(folder, last, shards.pop(last), names)
        last = layer
        shards.setdefault(layer, {}).update(_stored(name, shape))
    _write(folder, last, shards[last], names)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    settings.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": DECLARED}))


def _stored(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    if ".layers." not in name or not name.endswith("_proj.weight"):
        return {name: torch.empty(shape).normal_(std=0.02).bfloat16()}
    outputs, inputs = shape
    module = name.removesuffix(".weight")
    return {
        f"{module}.weight_packed": torch.randint(-(2**31), 2**31, (outputs, inputs // 8)).to(torch.int32),
        f"{module}.weight_scale": torch.empty(outputs, inputs // GROUP).uniform_(0.002, 0.01).bfloat16(),
        f"{module}.weight_shape": torch.tensor(shape),
    }


def _write(folder: Path, layer: str, shard: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Some of the rest may come before the layers and some after them."""
    file = f"part-{layer}-{len(set(names.values()))}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    names.update(dict.fromkeys(shard, file))


def unpacking_speed(folder: Path, seconds: float = 2.0) -> float:
    """Bytes of packed files a second through the reader on one core, expert after expert."""
    name, threads, done = str(folder), torch.get_num_threads(), 0
    torch.set_num_threads(1)
    with Shards(name, folder, declared_format(name, read_config(name))) as shards:
        keys = [key for key in shards.keys if ".experts." in key]
        shards.slice(keys[0]).read()
        started = time.process_time()
        while (spent := time.process_time() - started) < seconds:
            part = shards.slice(keys[done % len(keys)])
            part.read()
            done += 1
        size = part.nbytes
    torch.set_num_threads(threads)
    return done * size / spent


def measure(folders: dict[str, Path]) -> dict[str, Any]:
    """Every figure, in bytes and seconds; the files are read once before, so all of it is from memory."""
    figures: dict[str, Any] = {}
    for name, folder in folders.items():
        figures[f"{name}_file_bytes"] = sum(path.stat().st_size for path in files(folder))
        read_seconds(folder, False)
        figures[f"{name}_read"] = read_seconds(folder, False)
        figures[f"{name}_load"] = watched(folder, "bfloat16", False)
    figures["unpacking_bytes_per_second"] = unpacking_speed(folders["int4"])
    figures["rounding_bytes_per_second"] = quantizing_speed(2 * INTERMEDIATE, HIDDEN)
    return figures


def show(figures: dict[str, Any]) -> None:
    """For people."""
    loads = {name: figures[f"{name}_load"] for name in ("int4", "bf16") if f"{name}_load" in figures}
    for name, load in loads.items():
        size = figures[f"{name}_file_bytes"]
        print(
            f"{name}: {size / 1e9:.2f} GB, read in {figures[f'{name}_read']:.1f} s, loaded in {load['seconds']:.1f} s "
            f"({load['cpu_seconds']:.1f} s of CPU), result {load['bytes'] / 1e6:.0f} MB, RssAnon "
            f"{load['before'] / 1e6:.0f} -> {load['peak'] / 1e6:.0f} MB at most"
        )
    size, load = figures["int4_file_bytes"], loads["int4"]
    parts = {
        "reading": figures["int4_read"],
        "unpacking": size / figures["unpacking_bytes_per_second"],
        "rounding": size * BITS_OF_BF16 / figures["rounding_bytes_per_second"],
    }
    told = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in parts.items())
    bound = parts["reading"] + parts["unpacking"]
    print(
        f"int4: {told}, each on one core; {max(parts, key=parts.__getitem__)} binds. Loading takes "
        f"{load['seconds'] / bound:.2f} × reading and unpacking, {load['seconds'] / sum(parts.values()):.2f} × all "
        f"three; of CPU {load['cpu_seconds'] / bound:.2f} × and {load['cpu_seconds'] / sum(parts.values()):.2f} ×"
    )
    if "bf16" in loads:
        print(f"peak of int4 over that of bf16: {(load['peak'] - loads['bf16']['peak']) / 1e6:+.0f} MB")


def main() -> None:
    """Make what is missing and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the packed files")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--alone", action="store_true", help="without the bf16 model, four times as large")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = config(options.gigabytes * BITS_OF_BF16, options.experts)
    folders = {"int4": options.folder / "int4"} | ({} if options.alone else {"bf16": options.folder / "bf16"})
    for name, folder in folders.items():
        if not (folder / "config.json").exists():
            (make_int4 if name == "int4" else make)(folder, settings)
    figures = measure(folders)
    print(json.dumps(figures, indent=2)) if options.json else show(figures)


if __name__ == "__main__":
    main()
