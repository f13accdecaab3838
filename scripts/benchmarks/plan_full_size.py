#!/usr/bin/env python3
"""The plan's step against one that is run at full depth and width without memory, for the models of the recipes.

    .venv/bin/python scripts/benchmarks/plan_full_size.py [--model WORD] [--only NUMBER …] [--table FILE]

The counted step is the whole model: every layer, our int8 experts with LoRA on experts, router and attention, the loss,
backward, under `FakeTensorMode`, each storage counted from the operator that makes it. The plan's own figure comes from
two short models. Both run the same operators; what is compared is whether a few layers tell all.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from toolkit.offload.place import spread
from toolkit.plan.budget import Budget
from toolkit.plan.devices import Device
from toolkit.plan.shapes import published
from toolkit.plan.skeletons import shape_of
from toolkit.plan.stacks import stack_bytes
from toolkit.recipe import parse
from toolkit.rehearsal import Step, fake_model, run_step

CASES = ((512, 16, True, 0.0), (2048, 8, True, 0.5), (4096, 32, True, 0.0), (1024, 16, False, 0.25))
"""Tokens, rank, recomputed or kept, share of MoE layers streamed."""
HEAD = "| model | tokens | rank | activations | streamed | planned GiB | counted GiB | error |\n|" + "---|" * 8


def compare(name: str, length: int, r: int, checkpointing: bool, share: float) -> str:
    """One row."""
    recipe = parse(
        f"model: {{model_name_or_path: {name}}}\ndata: {{train: none}}\nlora: {{r: {r}}}\n"
        f"training: {{max_length: {length}, gradient_checkpointing: {str(checkpointing).lower()}}}\n"
    )
    device = Device("cuda", "any", 1 << 40)
    budget = Budget(name, "main", device, "bfloat16", "onecard_triton", "auto")
    count = round(share * len(budget.layers))
    placement = spread(dict.fromkeys(budget.layers, 0), count, "host")
    planned = budget.bytes(recipe, placement)
    step = Step(
        1, length, length - 1, torch.bfloat16, checkpointing, True, True, "onecard_triton",
        lora=recipe.lora.model_dump(exclude={"adapter_name_or_path"}),
    )  # fmt: skip
    began = time.perf_counter()
    model = fake_model(shape_of(name), step)
    standing = sum(p.numel() * p.element_size() for p in model.parameters())
    stacks = sum(stack_bytes(budget.shapes, "int8", budget.itemsize).values())
    standing -= stacks - planned.experts - planned.slots
    states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = run_step(model, step, FakeTensorMode(allow_non_fake_inputs=True)).peak
    counted = standing + states + max(held, states)  # AdamW's own step makes as much again on a card
    total = planned.run - planned.workspace
    kept = "recomputed" if checkpointing else "kept"
    alone = f"step alone: planned {budget.step(recipe).peak} counted {held}"
    print(f"# counted in {time.perf_counter() - began:.0f} s; {alone}", flush=True)
    return (
        f"| {name} | {length} | {r} | {kept} | {count} of {len(budget.layers)} | {total / 2**30:.2f} | "
        f"{counted / 2**30:.2f} | {total / counted - 1:+.2%} |"
    )


def main() -> None:
    """One model and case after the other."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CASES)), help="of the cases, from 0")
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    rows = [HEAD]
    print(HEAD)
    for name in published():
        for number in given.only if given.model.lower() in name.lower() else ():
            rows.append(compare(name, *CASES[number]))
            print(rows[-1], flush=True)
    if given.table:
        given.table.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
