"""Adapters of stock PEFT, and the same with linears for experts: does `verify` find every expert, and a hole?

    .venv/bin/python scripts/parity/foreign_adapters.py [FAMILY …]

Each family has a tiny random checkpoint and an adapter on experts, router and linears. One expert's B is then set to
zero. Exits with 1 where a tensor has no place in the base, an expert is missed, or the hole is not seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.harness.families import build, families, tiny_config  # noqa: E402
from toolkit.adapters import attach_lora  # noqa: E402
from toolkit.adapters.layouts import per_expert, read_factors  # noqa: E402
from toolkit.checkpoint.config import skeleton  # noqa: E402
from toolkit.errors import ModelError  # noqa: E402
from toolkit.export import ForeignReport, verify_foreign  # noqa: E402

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Print a line a family; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all by default")
    names = parser.parse_args(arguments).families or [family.model_type for family in families()]
    warnings.simplefilter("ignore")
    wrong, refused = 0, 0
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = list(_reports(name, Path(scratch)))
            except ModelError as error:
                refused += 1
                print(f"{name}: refused: {str(error)[:120]}")
                continue
        told = [f"{layout} {moved:,} of {every:,}" for layout, (moved, every), _ in found]
        problems = [problem for *_, problem in found if problem]
        wrong += bool(problems)
        print(f"{name}: {', '.join(told)}{f': WRONG: {problems[0]}' if problems else ''}", flush=True)
    print(f"{len(names) - refused - wrong} of {len(names) - refused} families, {refused} refused")
    return min(wrong, 1)


def _reports(name: str, folder: Path) -> Iterator[tuple[str, tuple[int, int], str | None]]:
    """Of each layout: projections moved and in all, and what is wrong."""
    base, stock = folder / "base", folder / "stock"
    model = build(tiny_config(name))
    model.save_pretrained(base)
    adapted = attach_lora(model, r=2, target_modules="all-linear")
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    adapted.save_pretrained(stock)
    whole = verify_foreign(stock, str(base))
    yield "fused", whole.slots, whole.problem
    tensors, rank = per_expert(read_factors(stock, skeleton(str(base))), skeleton(str(base)))
    taken_apart = folder / "taken-apart"
    taken_apart.mkdir()
    config = json.loads((stock / "adapter_config.json").read_bytes())
    (taken_apart / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}))
    save_file(tensors, taken_apart / "adapter_model.safetensors")
    report = verify_foreign(taken_apart, str(base))
    yield "linears", report.slots, report.problem
    hole = next(key for key in sorted(tensors) if ".experts.3." in key and "lora_B" in key)
    save_file({**tensors, hole: torch.zeros_like(tensors[hole])}, taken_apart / "adapter_model.safetensors")
    seen = verify_foreign(taken_apart, str(base))
    yield "with a hole", seen.slots, None if _is_one_less(report, seen) else f"{hole} is zero, and {seen.problem}"


def _is_one_less(before: ForeignReport, after: ForeignReport) -> bool:
    return after.problem is not None and 0 < before.slots[0] - after.slots[0] <= 2


if __name__ == "__main__":
    sys.exit(main())
