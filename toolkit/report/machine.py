"""What this machine has, what a run would use of it and why, and what would help: the text of `onecard doctor`.

`torch.utils.collect_env` and `transformers env` list versions for bug reports; neither says what follows from them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from rich.console import Console

from toolkit.artifact import stack_versions
from toolkit.plan import Device, default_backend, default_dtype, device_memory, unusable_card

__all__ = ["facts", "machine"]

_DISK = 40 << 30


def machine() -> dict[str, Any]:
    """Driver, cards, memory and disk in bytes, versions, what a run would use and why, hints; JSON-able."""
    found = {
        "python": platform.python_version(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cards": list(_cards()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory": device_memory("cpu"),
        "disk_free": shutil.disk_usage(".").free,
        "hub_cache": {"path": constants.HF_HUB_CACHE, "free": _free(Path(constants.HF_HUB_CACHE))},
        "versions": stack_versions(),
    }
    return {**found, "used": _used(found), "hints": list(_hints(found))}


def facts(console: Console, found: Mapping[str, Any]) -> None:
    """`machine`, as lines."""
    cards = [f"{card['name']} ({card['memory'] / 2**30:.0f} GiB, sm_{card['sm']})" for card in found["cards"]]
    lines = {
        "card": ", ".join(cards) or "none",
        "driver": f"{found['driver'] or 'none'}; torch built for {'CUDA ' + found['cuda'] if found['cuda'] else 'CPU'}",
        "cores": f"{found['cores']}, {found['threads']} threads",
        "memory": f"{found['memory'] / 2**30:.1f} GiB",
        "disk": f"{found['disk_free'] / 2**30:.1f} GiB free here",
        "models": f"{found['hub_cache']['free'] / 2**30:.1f} GiB free in {found['hub_cache']['path']}",
        "python": f"{found['python']}; " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
        **{f"use {what}": f"{used['choice']}: {used['why']}" for what, used in found["used"].items()},
    }
    for what, text in lines.items():
        console.print(f"{what:<14}{text}", markup=False)
    for hint in found["hints"]:
        console.print(f"hint          {hint}", markup=False)


def _driver() -> str | None:
    """The NVIDIA driver's version, where there is one."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return told.stdout.split("\n")[0].strip() or None if told.returncode == 0 else None


def _cards() -> Iterator[dict[str, Any]]:
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield {"name": card.name, "memory": card.total_memory, "sm": f"{card.major}{card.minor}"}


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _used(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    device = next(map(_device, found["cards"]), Device("cpu", "cpu", found["memory"], is_here=True))
    has_card, dtype, experts = device.kind == "cuda", default_dtype(device), default_backend(device)
    why = {
        "bfloat16": "fast there",
        "float16": f"{device.name} has no bfloat16",
        "float32": "a CPU is no faster in 16 bit",
    }
    choices = {
        "device": (device.kind, "the first card" if has_card else "torch sees no card"),
        "dtype": (dtype, why[dtype]),
        "experts": (
            experts,
            "its kernels read int8 on the card"
            if "triton" in experts
            else "expert by expert through " + ("cuBLAS: no Triton, or a card before sm_80" if has_card else "BLAS"),
        ),
        "optimizer": ("adamw_torch", "the default; paged_adamw_8bit needs a quarter of its memory"),
    }
    return {what: {"choice": choice, "why": why} for what, (choice, why) in choices.items()}


def _device(card: Mapping[str, Any]) -> Device:
    capability = int(card["sm"][:-1]), int(card["sm"][-1])
    return Device("cuda", card["name"], card["memory"], is_here=True, capability=capability)


def _hints(found: Mapping[str, Any]) -> Iterator[str]:
    """What would help, each with the next step."""
    if (problem := unusable_card()) is not None:
        yield problem
    if found["cards"] and not importlib.util.find_spec("triton"):
        yield "no triton, so experts are computed one by one: pip install 'onecard[gpu]'"
    if len(found["cards"]) > 1:
        yield "a run uses the first card; CUDA_VISIBLE_DEVICES chooses another, accelerate launch uses several"
    if found["hub_cache"]["free"] < _DISK:
        free = found["hub_cache"]["free"] / 2**30
        yield f"{free:.0f} GiB free in {found['hub_cache']['path']}: a 16-bit checkpoint of 7 B needs 14; set HF_HOME"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield "HF_HUB_OFFLINE=1: models and data must be on this machine already"
