#!/usr/bin/env python3
"""Bytes of the models that the recipes name: fp32, bf16 and ours, from their published configurations alone.

    .venv/bin/python scripts/benchmarks/sizes.py [--json]

No weights and no network: each model is built on the meta device. The values are those of `config.json` in each
repository; the parameter count beside them, as its card states it, shows that they describe the right model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.architecture import describe
from toolkit.plan import Part
from toolkit.plan.audit import parts_of
from toolkit.plan.shapes import published, published_config, stated_billions

MODELS: dict[str, tuple[str, float, dict[str, Any]]] = {
    name: (values.pop("model_type"), stated_billions(name), values)
    for name in published()
    if (values := published_config(name))
}


@dataclass(frozen=True)
class Sizes:
    """GB of one model, and what share of their fp32 bytes the experts and the whole take in 8 bit."""

    model: str
    parameters: int
    stated_billions: float
    fp32: float
    bf16: float
    ours: float
    experts_share: float
    whole_share: float


def measure(name: str) -> Sizes:
    """Count one model."""
    family, stated, values = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    parts = parts_of(model, describe(model))
    parameters, stored = sum(part.parameters for part in parts), sum(part.bytes for part in parts)
    experts: Part = parts[0]
    return Sizes(
        name,
        parameters,
        stated,
        4 * parameters / 1e9,
        2 * parameters / 1e9,
        stored / 1e9,
        experts.bytes / (4 * experts.parameters),
        stored / (4 * parameters),
    )


def main() -> None:
    """Print the table."""
    rows = [measure(name) for name in MODELS]
    if "--json" in sys.argv:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return
    print(f"{'model':36} {'billions':>9} {'stated':>7} {'fp32 GB':>8} {'bf16 GB':>8} {'ours GB':>8}  experts   whole")
    for row in rows:
        print(
            f"{row.model:36} {row.parameters / 1e9:9.2f} {row.stated_billions:7.1f} {row.fp32:8.1f} {row.bf16:8.1f} "
            f"{row.ours:8.1f} {row.experts_share:8.2%} {row.whole_share:7.2%}"
        )


if __name__ == "__main__":
    main()
