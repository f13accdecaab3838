"""Weighted sums of adapters, exact by putting ranks side by side, or reduced to a rank by SVD with its error.

PEFT's `add_weighted_adapter` refuses adapters on expert stacks. On files it needs no model: the layout says how many
experts a pair has, once the configuration says its rank.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.adapters.layouts import PREFIX
from toolkit.adapters.tokens import token_ids
from toolkit.artifact.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GENERATION_CONFIG,
    file_entry,
    load_adapter_config,
    read_json,
    read_manifest,
    write_json,
)
from toolkit.artifact.privacy import portable, refuse_canaries
from toolkit.artifact.tokenizer import read_stops
from toolkit.artifact.verify import verify_artifact
from toolkit.artifact.write import FROM_ELSEWHERE, remembered, seal, stack_versions
from toolkit.checkpoint.identity import license_of
from toolkit.durable import staged_folder
from toolkit.errors import ModelError, RecipeError

__all__ = ["Combined", "combine_adapters"]

# Shapes: E experts, R rank, O outputs, I inputs.


@dataclass(frozen=True)
class Combined:
    """The new adapter: its folder, rank, pairs, and the error over the exact sum (Frobenius norms; 0 is exact)."""

    folder: str
    rank: int
    adapters: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def combine_adapters(weights: Mapping[str, float], out: str | Path, *, rank: int | None = None) -> Combined:
    """Write the sum of `weights[folder] · adapter` as an artifact to the new folder `out`.

    Args:
        weights: artifact folders and their weights; one alone with a `rank` reduces that adapter.
        rank: reduce every pair to this rank by SVD; None keeps the sum of the ranks.

    Raises:
        ModelError: the adapters have other bases or parts. RecipeError: `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise RecipeError(f"{out}: already exists; give another name")
    opened = {folder: _open(folder) for folder in weights}
    _refuse_strangers(opened)
    names = sorted(next(iter(opened.values()))[1])
    tensors: dict[str, Tensor] = {}
    ranks, lost, total = set(), 0.0, 0.0
    pairs = [(name, [_factors(*opened[folder], name, weight) for folder, weight in weights.items()]) for name in names]
    widest = rank or max(sum(A.shape[1] for A, _ in parts) for _, parts in pairs)
    for name, parts in pairs:
        A, B = torch.cat([A for A, _ in parts], dim=1), torch.cat([B for _, B in parts], dim=2)
        if rank:
            A, B, off, size = _reduced(A, B, rank)
            lost, total = lost + off, total + size
        A, B = _padded(A, B, widest)
        ranks.add(A.shape[1])
        tensors[f"{name}.lora_A.weight"] = A.reshape(-1, A.shape[2]).contiguous()
        tensors[f"{name}.lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
    first = Path(next(iter(weights)))
    plain = {"r": widest, "lora_alpha": widest, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    with staged_folder(out) as folder:
        save_file({name: tensors[name] for name in sorted(tensors)}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, {**load_adapter_config(first), **plain})
        for path in sorted(first.iterdir()):
            if path.name in FROM_ELSEWHERE:
                shutil.copyfile(path, folder / path.name)
        facts = _facts(weights, first, widest)
        if stops := sorted({one for adapter in weights for one in read_stops(Path(adapter))}):
            # An answer ends where any of the parts was taught to end one.
            write_json(folder / GENERATION_CONFIG, {**read_json(first / GENERATION_CONFIG), "eos_token_id": stops})
            facts["chat"] = {**facts.get("chat", {}), "stop_token_ids": stops}
        licences = {license_of(adapter) for adapter in weights}
        seal(folder, {**facts, **_seen(first, folder)}, licences.pop() if len(licences) == 1 else None)
        refuse_canaries(folder, known=remembered(folder), called=out)
    return Combined(str(out), widest, len(names), math.sqrt(lost / total) if total else 0.0)


def _seen(first: Path, folder: Path) -> dict[str, Any]:
    """That the first adapter's tokenizer and template were looked at holds for their copies."""
    told = read_manifest(first).get("looked_at")
    if not told:
        return {}
    files = {name: file_entry(folder / name)["sha256"] for name in told["files"] if (folder / name).is_file()}
    return {"looked_at": {**told, "files": files}}


def _facts(weights: Mapping[str, float], first: Path, rank: int) -> dict[str, Any]:
    """The first adapter's recipe and coverage hold for all, ranks aside; figures and a head were each one's own."""
    manifest = read_manifest(first)
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    lora = {**manifest["recipe"].get("lora", {}), **plain, "adapter_name_or_path": None}
    recipe = {**manifest["recipe"], "lora": lora}
    parts = [
        {
            "name": Path(folder).absolute().parent.name if Path(folder).name == "adapter" else Path(folder).name,
            "weight": weight,
            "weights_sha256": read_manifest(folder)["files"][ADAPTER_WEIGHTS]["sha256"],
        }
        for folder, weight in weights.items()
    ]
    kept = {key: manifest[key] for key in ("base", "chat", "coverage", "stacks") if manifest.get(key) is not None}
    facts: dict[str, Any] = portable(
        {**kept, "recipe": recipe, "results": {}, "versions": stack_versions(), "combined": parts}
    )
    return facts


def _open(folder: str) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    verify_artifact(folder, strict=True)
    config = load_adapter_config(Path(folder))
    if config.get("use_dora"):
        raise ModelError(f"{folder}: holds DoRA's magnitudes, which cannot be added up; merge it and train on that")
    if token_ids(config):
        raise ModelError(f"{folder}: holds rows of tokens, which cannot be added up; merge it and train on that")
    tensors = load_file(Path(folder) / ADAPTER_WEIGHTS)
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    pairs = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    return load_adapter_config(folder), pairs


def _refuse_strangers(opened: Mapping[str, tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]]) -> None:
    first, *others = opened
    base = read_manifest(first)["base"]["weights_sha256"]
    for other in others:
        if read_manifest(other)["base"]["weights_sha256"] != base:
            raise ModelError(f"{other}: another base than {first}: adapters of one base only can be combined")
        if strange := opened[first][1].keys() ^ opened[other][1].keys():
            raise ModelError(f"{other}: other parts than {first}: {min(strange)} is in one of them only")


def _factors(
    config: Mapping[str, Any], pairs: Mapping[str, tuple[Tensor, Tensor]], name: str, weight: float
) -> tuple[Tensor, Tensor]:
    """A [E, R, I] and B [E, O, R] in fp32, weight and scaling in B."""
    A, B = pairs[name]
    rank, alpha = _pattern(config, name, "r", "rank_pattern"), _pattern(config, name, "lora_alpha", "alpha_pattern")
    experts = A.shape[0] // int(rank)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    A_ERI = A.reshape(experts, -1, A.shape[1]).float()
    B_EOR = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1).float()
    return A_ERI, weight * scaling * B_EOR


def _pattern(config: Mapping[str, Any], name: str, key: str, patterns: str) -> float:
    """As PEFT looks them up: by module, or by module and parameter for a wrapped one."""
    module = name.removeprefix(PREFIX)
    depth = module.count(".base_layer")
    module = module.replace(".base_layer", "")
    owned = sorted(t for t in config.get("target_parameters") or [] if _owner(t) and module.endswith(_owner(t)))
    # The wrapper put on first is innermost, so it has most `base_layer`s above it: PEFT goes by the module's own order,
    # first the first projection.
    leaves = [t.rpartition(".")[2] for t in sorted(owned, key=lambda t: t.endswith("down_proj"))]
    full = f"{module}.{leaves[len(leaves) - 1 - depth]}" if leaves else module
    table = config.get(patterns) or {}
    return float(table.get(get_pattern_key(list(table), full), config[key]))


def _owner(target: str) -> str:
    return target.rpartition(".")[0]


def _reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The nearest pair of `rank`, the squared norm that is lost and the whole; through QR, never as [O, I]."""
    q_out, r_out = torch.linalg.qr(B.double())
    q_in, r_in = torch.linalg.qr(A.double().transpose(1, 2))
    u, s, vt = torch.linalg.svd(r_out @ r_in.transpose(1, 2), full_matrices=False)
    root = s[:, :rank].sqrt()
    smaller_B = (q_out @ u[:, :, :rank]) * root[:, None, :]
    smaller_A = root[:, :, None] * (vt[:, :rank] @ q_in.transpose(1, 2))
    return smaller_A.float(), smaller_B.float(), float((s[:, rank:] ** 2).sum()), float((s**2).sum())


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[1]
    return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
